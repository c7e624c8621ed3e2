"""What there is to do in a run: rows, tokens and steps of every task, rows to write, questions to answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retain.data.chat import row_lengths
from retain.functional.pacing import mean_share
from retain.models.generation import has_chat_template, render
from retain.probes.asking import is_written
from retain.probes.base import Item, Probe, Subject
from retain.probes.divergence import Divergence
from retain.training.monitor import ForgettingMonitor
from retain.training.rehearsal import Batch

#: Rows of a task whose tokens are counted, spread evenly over it.
SAMPLE = 1000
#: Of a self-written row: tokens of the instruction, and of the answer as a share of `max_tokens`; and the share of
#: what is begun that is kept. Means of 110 rows that SmolLM2-135M-Instruct wrote with `max_tokens: 48` (of 192).
WRITTEN_PROMPT, WRITTEN_ANSWER, WRITTEN_KEPT = 17, 0.6, 0.57
#: Prompts in a call of the model while rows are written, and tokens of an instruction at most (`write_own`).
WRITTEN_BATCH, INSTRUCTION_LIMIT = 32, 32


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows as they are trained on: of the whole row, and those of them that are learned; both [n]."""

    tokens: np.ndarray
    learned: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Lengths]) -> Lengths:
        """Rows of several sources; each counts alike, however many rows were measured."""
        size = max(len(part.tokens) for part in parts)
        tokens, learned = ([np.resize(getattr(part, name), size) for part in parts] for name in ("tokens", "learned"))
        return cls(np.concatenate(tokens), np.concatenate(learned))

    def batch(self, rows: int) -> tuple[int, int]:
        """(tokens of the longest row, learned tokens) of a random batch, on average."""
        drawn = np.random.default_rng(0).integers(len(self.tokens), size=(256, rows))
        return round(self.tokens[drawn].max(1).mean()), round(self.learned[drawn].sum(1).mean())


@dataclass(frozen=True)
class TaskWork:
    """What one task takes.

    Args:
        rows: new rows of one pass; None for a stream.
        replayed: replayed rows in all steps.
        steps: optimizer steps, of `batches` micro-batches each.
        usual, largest: a micro-batch on average, and the one that needs most memory.
    """

    name: str
    rows: int | None
    replayed: int
    steps: int
    batches: int
    usual: Batch
    largest: Batch

    @property
    def tokens(self) -> int:
        """Tokens that go through the model in a step, padding included."""
        return self.batches * self.usual.rows * self.usual.width


@dataclass(frozen=True)
class Questions:
    """The work of one look.

    Args:
        read: tokens that are read: prompts, choices, texts.
        calls: (rows, calls) of batches that are answered; each call writes one token for every row.
    """

    read: int
    calls: list[tuple[int, int]]


def measured(rows: Any, tokenizer: Any, max_length: int | None, on: str = "completion") -> Lengths:
    """Lengths of rows in one of TRL's forms, from a sample of at most `SAMPLE`."""
    from datasets import Dataset

    if hasattr(rows, "__len__"):
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).round().astype(int)
        rows = rows.select(np.unique(chosen))
    else:
        rows = Dataset.from_list(list(rows.take(SAMPLE)))
    tokens = learned = row_lengths(rows, tokenizer)
    turns = rows["completion"] if "completion" in rows.column_names else None
    if on == "assistant" and "messages" in rows.column_names:
        turns = rows["messages"]
    if turns is not None:
        said = ["\n".join(t["content"] or "" for t in row if t["role"] == "assistant") for row in turns]
        learned = np.array([len(ids) + 1 for ids in tokenizer(said, add_special_tokens=False)["input_ids"]])
    kept = np.minimum(tokens, max_length or int(tokens.max()))
    return Lengths(kept, np.clip(learned - (tokens - kept), 0, kept))


def written_lengths(tokenizer: Any, max_tokens: int) -> Lengths:
    """Lengths that rows written by the model itself usually have."""
    header = len(tokenizer(render(tokenizer, "?"))["input_ids"]) if has_chat_template(tokenizer) else 0
    answer = round(WRITTEN_ANSWER * max_tokens)
    return Lengths(np.array([header + WRITTEN_PROMPT + answer]), np.array([answer]))


def rows_to_write(methods: dict[str, Any], old: bool, rows: int | None) -> tuple[int, int]:
    """(rows, tokens of an answer at most) that the model writes before the first task; (0, 0) for none.

    Args:
        methods: settings by name of method.
        old: whether the user gave rows that stand for old data.
        rows: new rows of the first task; None for a stream.
    """
    replay, ewc = methods.get("replay"), methods.get("ewc")
    written = {"self", "demonstrations", "on_policy" if old else "auto"}
    if replay is not None and replay.asked & written and replay.endpoint is None:
        share = mean_share(replay.share)
        needed = replay.rows if rows is None else math.ceil(rows * share / (1 - share))
        return min(replay.rows, max(16, 2 * needed)), replay.max_tokens
    if ewc is not None and ewc.importance is None and not old:
        return ewc.samples, 64
    return 0, 0


def calls_to_write(number: int, max_tokens: int) -> int:
    """Calls of the model, each a token for `WRITTEN_BATCH` rows, until so many rows are kept."""
    return math.ceil(number / WRITTEN_KEPT / WRITTEN_BATCH) * (INSTRUCTION_LIMIT + max_tokens)


def task_work(
    name: str, rows: int | None, new: Lengths, train: dict[str, Any], replay: Any = None, old: Lengths | None = None
) -> TaskWork:
    """Steps and batches of a task, counted as the trainer counts them.

    Args:
        rows: new rows of one pass; None for a stream, which needs `max_steps`.
        new, old: lengths of new and of replayed rows.
        train: fields of `trl.SFTConfig`.
        replay: settings of `replay`; None, like `old`, where nothing is replayed.
    """
    batch, batches = train["per_device_train_batch_size"], train.get("gradient_accumulation_steps", 1)
    window, steps, passes = batch * batches, train.get("max_steps", -1), train.get("num_train_epochs", 1)
    if train.get("packing"):
        new, rows = _packed(new, rows, train["max_length"])
    epochs = math.ceil(passes) if steps <= 0 else max(1, round(steps * window / max(rows or 1, 1)))
    owed, moves = 0.0, False  # replayed rows to a new one; whether the share moves
    if replay is not None and old is not None:
        share = mean_share(replay.share, new.learned.mean() / old.learned.mean() if replay.by == "tokens" else 1.0)
        owed, moves = share / (1 - share), replay.schedule != "constant" or bool(replay.every)
    if steps <= 0:
        shown = np.floor(owed * (rows or 0) * np.arange(epochs + 1) + 0.5) + (rows or 0) * np.arange(epochs + 1)
        if epochs > 1 and (moves or len(set(np.diff(shown))) > 1):
            whole, rest = divmod(shown[-1], window)  # a last step that lacks micro-batches is left out
            last = math.ceil(rest * batches / window) == batches
            steps = int(min(math.ceil(passes / epochs * shown[-1] / window), whole + last))
        else:
            steps = math.ceil(passes * math.ceil(shown[1] / window))
    share = owed / (1 + owed)
    if old is not None and share:
        new = _mixed(new, old, share)
    width, learned = new.batch(batch)
    usual = Batch(batch, max(1, width), max(1, learned))
    largest = Batch(batch, int(new.tokens.max()), int(batch * new.learned.max()))
    return TaskWork(name, rows, round(steps * window * share), steps, batches, usual, largest)


def _mixed(new: Lengths, old: Lengths, share: float) -> Lengths:
    """New and replayed rows in the proportion of the mixture, the longest old row among them."""
    number = max(1, round(len(new.tokens) * share / (1 - share)))
    drawn = np.append(old.tokens.argmax(), np.random.default_rng(0).integers(len(old.tokens), size=number - 1))
    return Lengths(np.append(new.tokens, old.tokens[drawn]), np.append(new.learned, old.learned[drawn]))


def _packed(new: Lengths, rows: int | None, length: int) -> tuple[Lengths, int | None]:
    """Rows filled up to `length` tokens with one another."""
    together = max(1.0, length / float(new.tokens.mean()))
    learned = np.array([min(length, round(together * float(new.learned.mean())))])
    return Lengths(np.array([length]), learned), None if rows is None else math.ceil(rows / together)


def questions(probes: Sequence[Probe], tokenizer: Any) -> Questions:
    """The work of asking all probes once."""
    texts: list[str] = []
    read = 0
    answers: list[tuple[int, int]] = []  # (tokens at most, tokens of the prompt)
    for probe in probes:
        for item in probe.items:
            if is_written(probe):
                prompt = render(tokenizer, item.fields["prompt"])
                answers += [(probe.limit(item), len(tokenizer(prompt)["input_ids"]))] * probe.times(item)
            elif isinstance(probe, Divergence):
                read += sum(_context(probe, item, tokenizer))
            elif "max_tokens" in item.fields:  # written for lm-evaluation-harness
                answers.append((item.fields["max_tokens"], len(tokenizer(item.fields["prompt"])["input_ids"])))
            else:
                texts += [text for text in item.fields.values() if isinstance(text, str)]
                texts += map(str, item.fields.get("choices") or getattr(probe, "labels", []))
    read += sum(map(len, tokenizer(texts)["input_ids"])) if texts else 0
    return Questions(read + sum(prompt for _, prompt in answers), _calls(answers))


def said_by_base(probes: Sequence[Probe], tokenizer: Any) -> Questions:
    """The work of the base for probes of divergence: the continuations that it writes, and the contexts it reads."""
    contexts = [
        _context(probe, item, tokenizer) for probe in probes if isinstance(probe, Divergence) for item in probe.items
    ]
    answers = [(answer, prompt) for prompt, answer in contexts if answer]
    return Questions(sum(map(sum, contexts)) + sum(prompt for _, prompt in answers), _calls(answers))


def watching(
    monitor: ForgettingMonitor, tasks: Sequence[TaskWork], own: Sequence[Sequence[Probe]], tokenizer: Any
) -> list[tuple[int, Questions]]:
    """What a monitor does in a run: how often, and each time what. Probes are counted at their turn, not where they are
    asked because something moved.

    Args:
        own: probes of each task, beside the monitor's old ones.
    """
    c = monitor.settings
    anchors = Questions(sum(map(len, monitor.with_tokenizer(tokenizer).rows)), [])
    looks = [-(-task.steps // c.every) for task in tasks]
    turns = [task.steps // c.every // c.probes_every for task in tasks]
    # the last look asks, too, and it may be one whose turn it is
    asked = [n + bool(task.steps % (c.every * c.probes_every)) for n, task in zip(turns, tasks)]
    # the base reads the anchors twice, and a later task begins with a look
    found = [(2 + len(tasks) - 1 + sum(looks), anchors)]
    if monitor.old or any(own):
        found.append((1 + sum(asked), questions(monitor.old, tokenizer)))
        found += [(1 + times, questions(mine, tokenizer)) for times, mine in zip(asked, own)]
    return found


def _context(probe: Divergence, item: Item, tokenizer: Any) -> tuple[int, int]:
    """Tokens of a context: of the text or prompt, and, at most, of the base's answer."""
    if "text" in item.fields:
        return min(len(tokenizer(item.fields["text"])["input_ids"]), probe.limit(item)), 0
    return len(tokenizer(render(tokenizer, item.fields["prompt"]))["input_ids"]), probe.limit(item)


def _calls(answers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(rows, calls) of batches as `generate` makes them, for (tokens at most, tokens of the prompt)."""
    calls, rest = [], sorted(answers, reverse=True)
    while rest:
        limit, width = rest[0][0], max(prompt for _, prompt in rest)
        size = max(1, Subject.batch_tokens // (limit + width))
        calls.append((len(rest[:size]), limit))
        rest = rest[size:]
    return calls
