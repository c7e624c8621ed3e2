"""Rows that the model writes itself, to replay when the old data is gone.

An instruct model that is shown the bare header of a user's turn goes on with a user's turn: an instruction of
the kind it was tuned on. Answered by the same model, it is a row of old behaviour (Magpie, arXiv:2406.08464;
self-dialogues against forgetting: arXiv:2602.20162). A model without a chat template writes plain text from its
start token. No model code is here: `write` may be a local model or any engine.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from retain.data.filters import Filters, Sieve, to_last_sentence
from retain.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from datasets import Dataset

#: (prompts, temperature, most new tokens) → one continuation each. Prompts hold their special tokens already: add
#: none. A continuation that ended by itself keeps its end-of-turn token, or is shorter than asked.
Write = Callable[[list[str], float, int], list[str]]

#: First words of an instruction. Without them a small model at its own header soon repeats a few topics.
STARTS = (
    *("What is", "What are", "What does", "What was", "Which", "Who", "When did", "Where is", "Why do", "Why is"),
    *("How do", "How does", "How can I", "How many", "How to", "Can you explain", "Is it true that", "Explain"),
    *("Describe", "Define", "Write a short", "Write a sentence", "Write a poem about", "Write a Python function"),
    *("Summarize", "Rewrite", "Translate", "Correct the", "List three", "Name two", "Give an example of"),
    *("Give me tips for", "Compare", "Suggest", "Create a", "Calculate", "Solve", "Convert", "Find the", "Classify"),
    *("Complete the sentence:", "Tell me about", "I need help with", "I want to", "My friend", "In the story"),
)
#: Put behind instructions when answers are to be short. A small chat model left to itself writes paragraphs: of
#: its answers one in five ends within 50 tokens, of those asked for one sentence three in four (SmolLM2-135M).
_BRIEF = (" Answer in one sentence.", " Answer in one short sentence.", " Keep it to one sentence.")
SHORT = (*_BRIEF, *_BRIEF, "")
_TURN = "\u2063turn{}\u2063"  # stands for what somebody says; no template has it


@dataclass(frozen=True)
class Header:
    """The fixed text of a chat template around one exchange.

    `before` opens the user's turn, `between` closes it and opens the assistant's, `ends` are the texts that end
    a turn, `roles` the tokens that no turn may hold.
    """

    before: str
    between: str
    ends: tuple[str, ...]
    roles: tuple[str, ...]


@dataclass
class Report:
    """What became of everything that was written.

    Args:
        kept: rows.
        tried: instructions (or texts) that were begun.
        dropped: reason → count; `kept` and these add up to `tried`.
        seconds: wall time.
    """

    kept: int = 0
    tried: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def sentence(self) -> str:
        """One line for the plan and the report."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.kept} of {self.tried} rows kept in {self.seconds:.0f} s" + (
            f" (dropped: {reasons})" if reasons else ""
        )


def chat_header(tokenizer: Any) -> Header:
    """Cut the fixed parts out of a tokenizer's chat template, by rendering stand-ins and cutting around them.

    Raises:
        ModelError: there is no template, or it changes or repeats what is said.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name}: no chat template. Use an instruct model, or let it write plain text (chat=False).")
    user, assistant, again = (_TURN.format(i) for i in range(3))
    talk = [{"role": "user", "content": user}]
    once = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    talk += [{"role": "assistant", "content": assistant}, {"role": "user", "content": again}]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    if once.count(user) != 1 or any(whole.count(said) != 1 for said in (user, assistant, again)):
        raise ModelError(f"{name}: its chat template changes what is said, so no header can be cut from it.")
    before, between = once.split(user)
    after_answer = whole.split(assistant)[1].split(again)[0]
    specials = [token for token in special_tokens(tokenizer) if token.strip()]
    ends = [_first_mark(text, specials) for text in (between, after_answer)]
    if tokenizer.eos_token:
        ends.append(tokenizer.eos_token)
    return Header(before, between, tuple(dict.fromkeys(end for end in ends if end)), tuple(specials))


def write_rows(
    write: Write,
    tokenizer: Any,
    number: int,
    seed: int = 0,
    *,
    chat: bool | None = None,
    starts: Sequence[str] = STARTS,
    bare: float = 0.1,
    endings: Sequence[str] | None = None,
    filters: Filters | None = None,
    temperature: float = 1.0,
    answer_temperature: float = 0.7,
    batch: int = 128,
    tries: float = 8.0,
    progress: Callable[[int], None] = lambda kept: None,
) -> tuple[Dataset, Report]:
    """Let a model write rows.

    Args:
        write: the model. With a deterministic `write` the rows depend on `seed` alone.
        tokenizer: its tokenizer.
        number: rows wanted (the budget).
        seed: of the order of the first words.
        chat: instructions and answers, or plain text; default: chat where there is a template.
        starts: first words of instructions, or of texts; () for none.
        bare: share of instructions that begin with the header alone, in the model's own mix of topics.
        endings: texts put behind instructions, dealt out in turn; default: `SHORT` when
            `filters.response_tokens` is 100 or less, else none.
        filters: what a row must be like.
        temperature: for instructions and plain text; low values make a few topics return over and over.
        answer_temperature: at most 0.7, 0 for greedy: answers are to be the model's usual ones.
        batch: most prompts per call of `write`; the first has twice the rows wanted, 32 at least.
        tries: give up after tries · number instructions (at least one batch).
        progress: called after each batch with the number of rows just kept.

    Returns:
        Rows as `prompt`/`completion` chats (or `text`), at most `number`, and what became of the rest.

    Raises:
        ConfigError: an impossible setting.
        ModelError: no usable template.
        DataError: not one usable row came of it; the reasons are in the message.
    """
    from datasets import Dataset

    filters = filters or Filters()
    _check(number, batch, temperature, answer_temperature, bare, filters)
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    writer = _Writer(write, tokenizer, filters, temperature, answer_temperature, chat)
    if endings is None:
        endings = SHORT if filters.response_tokens <= 100 else ()
    report, begun = Report(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    random = np.random.default_rng(seed)
    first, last = _Deck(starts, bare if chat else 0.0), _Deck(endings if chat else ())
    sieve = Sieve(number, filters, report.dropped)
    most = max(batch, int(tries * number))
    while len(rows) < number and report.tried < most:
        missing = number - len(rows)
        # as many at once as should be enough: a step of few rows takes nearly as long as one of many
        enough = max(32, 2 * number) if not report.tried else batch
        if rows:
            enough = math.ceil(1.3 * missing * report.tried / len(rows))
        heads = [first.draw(random) for _ in range(min(batch, most - report.tried, max(enough, 4)))]
        report.tried += len(heads)
        new = writer.batch(heads, [last.draw(random) for _ in heads], sieve)
        rows += new[:missing]
        report.dropped += Counter({"not needed": max(0, len(new) - missing)})
        report.kept, report.seconds = len(rows), time.perf_counter() - begun
        progress(min(len(new), missing))
    if not rows:
        raise DataError(
            f"synthesis: no usable row was written. {report.sentence()}. Allow longer rows, try another seed, or give "
            "rows of your own."
        )
    return Dataset.from_list(rows), report


class _Deck:
    """Texts, each as often as the others: shuffled, dealt out, shuffled again; a share of the draws is ""."""

    def __init__(self, texts: Sequence[str], bare: float = 0.0) -> None:
        self.texts, self.bare, self.left = list(texts), bare, list[str]()

    def draw(self, random: np.random.Generator) -> str:
        if not self.texts or random.random() < self.bare:
            return ""
        if not self.left:
            self.left = [self.texts[i] for i in random.permutation(len(self.texts))]
        return self.left.pop()


class _Writer:
    """Asks the model and cuts what it wrote."""

    def __init__(
        self, write: Write, tokenizer: Any, filters: Filters, temperature: float, answer_temperature: float, chat: bool
    ) -> None:
        self.write, self.tokenizer, self.filters, self.chat = write, tokenizer, filters, chat
        self.temperature, self.answer_temperature = temperature, answer_temperature
        if chat:
            self.header = chat_header(tokenizer)
        else:
            end = tokenizer.eos_token or ""
            self.header = Header(
                tokenizer.bos_token or end, "", (end,) if end else (), tuple(special_tokens(tokenizer))
            )

    def batch(self, heads: list[str], endings: list[str], sieve: Sieve) -> list[dict[str, Any]]:
        limit = self.filters.prompt_tokens if self.chat else self.filters.response_tokens
        written = self.write([self.header.before + head for head in heads], self.temperature, limit)
        firsts = []
        for head, text in zip(heads, written, strict=True):
            text, done = self._cut(head, text, limit)
            # Only answers are trained on, so an instruction may lose an unfinished last sentence.
            whole = text if done else to_last_sentence(text)
            firsts.append((whole or text, bool(whole) or done))
        if not self.chat:
            return [{"text": text} for text, _ in firsts if sieve.text(text, self.header.roles)]
        asked = [
            text + ending
            for (text, done), ending in zip(firsts, endings)
            if sieve.instruction(text, done, self.header.roles)
        ]
        if not asked:
            return []
        limit = self.filters.response_tokens
        prompts = [self.header.before + text + self.header.between for text in asked]
        answers = self.write(prompts, self.answer_temperature, limit)
        rows = []
        for instruction, answer in zip(asked, answers, strict=True):
            text, done = self._cut("", answer, limit)
            if sieve.response(instruction, text, done, self.header.roles):
                rows.append(
                    {
                        "prompt": [{"role": "user", "content": instruction}],
                        "completion": [{"role": "assistant", "content": text}],
                    }
                )
        return rows

    def _cut(self, head: str, text: str, limit: int) -> tuple[str, bool]:
        """What was said up to the first end mark, and whether it was finished."""
        places = [text.find(end) for end in self.header.ends if end in text]
        if places:
            return _joined(head, text[: min(places)]), True
        # Without a mark (an engine that strips it) a text shorter than asked has ended by itself. Tokenising
        # again can give one token less than was written, never many.
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return _joined(head, text), tokens < limit - 1


def _joined(head: str, text: str) -> str:
    """First words and what follows, with the space that some engines strip from the front of a continuation."""
    space = " " if head[-1:].isalnum() and text[:1].isalnum() else ""
    return (head + space + text).strip()


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}) or {}
    marked = [str(token) for token in added.values() if getattr(token, "special", True)]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *marked]))


def _first_mark(text: str, specials: Sequence[str]) -> str:
    """The special token that stands first in a text between two turns, else its first word."""
    found = sorted((text.find(token), -len(token), token) for token in specials if token in text)
    if found:
        return found[0][2]
    return next(iter(text.split()), "")


def _check(
    number: int, batch: int, temperature: float, answer_temperature: float, bare: float, filters: Filters
) -> None:
    if number < 1 or batch < 1:
        raise ConfigError(f"synthesis: number {number}, batch {batch}. Both must be 1 or more.")
    if temperature <= 0:
        raise ConfigError(f"synthesis.temperature: {temperature} given. Allowed: above 0; 1 is usual.")
    if not 0 <= answer_temperature <= 0.7:
        raise ConfigError(f"synthesis.answer_temperature: {answer_temperature} given. Allowed: 0 (greedy) to 0.7.")
    if not 0 <= bare <= 1:
        raise ConfigError(f"synthesis.bare: {bare} given. Allowed: 0 to 1.")
    if min(filters.prompt_tokens, filters.response_tokens) < 4:
        raise ConfigError("synthesis: prompt_tokens and response_tokens must be 4 or more.")
