"""Multiple choice by likelihood: the choice that the model finds most likely is its answer."""

from __future__ import annotations

import re
from typing import Any

from retain.data.matching import UNSPACED
from retain.errors import DataError, unknown
from retain.models.generation import has_chat_template, render
from retain.models.likelihood import choice_log_likelihoods
from retain.probes.base import Item, Outcome, Probe, Progress, Subject

_NORMALISATIONS = ("characters", "raw", "tokens", "unconditional")
_LAYOUTS = ("auto", "question", "continue", "chat")


class Choice(Probe):
    """Fields `prompt`, `choices` (two or more), `answer` (index from 0).

    Options, for the probe or in an item:
        normalisation: what a log-likelihood is divided by before the best is taken: `characters` of the
            choice without the space in front (`acc_norm` of lm-evaluation-harness; default), `tokens`,
            nothing (`raw`, its `acc`); or minus log p(choice) without the prompt (`unconditional`,
            its `acc_mutual_info`; costs one more pass).
        layout: `question` writes "Question: …\\nAnswer:" around the prompt, `continue` takes the prompt as the
            beginning of the text, `chat` puts it through the chat template; `auto` is `question` for a prompt
            that ends in a question mark and `continue` otherwise.

    A space goes between prompt and choice unless one is there or either side is written without spaces.
    """

    kind = "choice"
    metric = "accuracy"
    group = "knowledge"
    fields = frozenset({"prompt", "choices", "answer"})
    settings = frozenset({"normalisation", "layout"})

    def __init__(self, name: str, items: list[Item], group: str | None = None, **options: Any):
        super().__init__(name, items, group, **options)
        for item in self.items:
            where = f"probe '{name}', item '{item.id}'"
            choices, answer = item.fields["choices"], item.fields["answer"]
            if not isinstance(choices, list) or len(choices) < 2 or not all(map(_text, choices)):
                raise DataError(f"{where}: choices must be a list of two or more texts, not {choices!r}.")
            if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
                raise DataError(
                    f"{where}: answer {answer!r} given; allowed is the index of the right choice, "
                    f"0 to {len(choices) - 1}."
                )
            for option, allowed in (("normalisation", _NORMALISATIONS), ("layout", _LAYOUTS)):
                if (word := self.option(item, option, allowed[0])) not in allowed:
                    raise DataError(unknown(f"{where}, {option}", str(word), allowed))

    @property
    def chance(self) -> float | None:
        """Mean of 1/choices over the items."""
        if not self.items:
            return None
        return sum(1 / len(item.fields["choices"]) for item in self.items) / len(self.items)

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Score every item; outcomes in the order of `self.items`."""
        prompts, choices = [], []
        for item in self.items:
            prompt = self._layout(item, subject)
            prompts.append(prompt)
            choices.append([_gap(prompt, choice) + choice for choice in item.fields["choices"]])
        model, tokenizer, room = subject.model, subject.tokenizer, subject.batch_tokens
        scores = choice_log_likelihoods(model, tokenizer, prompts, choices, room, progress)
        alone = {}
        bare = [i for i, item in enumerate(self.items) if self._normalisation(item) == "unconditional"]
        if bare:
            found = choice_log_likelihoods(model, tokenizer, [""] * len(bare), [choices[i] for i in bare], room)
            alone = {i: score.log_likelihoods for i, score in zip(bare, found)}

        outcomes = []
        for i, (item, prompt, score) in enumerate(zip(self.items, prompts, scores)):
            texts, answer = item.fields["choices"], item.fields["answer"]
            given = score.log_likelihoods
            values = {
                "raw": given,
                "tokens": [value / n for value, n in zip(given, score.tokens)],
                "characters": [value / max(1, len(text)) for value, text in zip(given, texts)],
                "unconditional": [a - b for a, b in zip(given, alone.get(i, given))],
            }[self._normalisation(item)]
            best = max(range(len(values)), key=values.__getitem__)
            details: dict[str, Any] = {
                "choices": len(texts),
                "chosen": best,
                "answer": answer,
                "log_likelihoods": given,
                "tokens": score.tokens,
                "characters": [len(text) for text in texts],
            }
            if i in alone:
                details["unconditional"] = alone[i]
            if score.truncated:
                details["truncated"] = score.truncated
            right = best == answer
            outcomes.append(Outcome(item.id, prompt, texts[answer], texts[best], float(right), right, details=details))
        return outcomes

    def _normalisation(self, item: Item) -> str:
        return self.option(item, "normalisation", "characters")

    def _layout(self, item: Item, subject: Subject) -> str:
        prompt, layout = item.fields["prompt"], self.option(item, "layout", "auto")
        if layout == "chat" and subject.chat and has_chat_template(subject.tokenizer):
            return render(subject.tokenizer, prompt)
        if layout in ("question", "chat") or (layout == "auto" and re.search(r"[?？]\s*$", prompt)):
            return f"Question: {prompt.strip()}\nAnswer:"
        return prompt


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _gap(prompt: str, choice: str) -> str:
    """The space between a prompt and a choice, where one belongs."""
    if not prompt or prompt[-1].isspace() or choice[0].isspace():
        return ""
    unspaced = re.compile(f"[{UNSPACED}\u3000-\u303f\uff00-\uffef]")
    return "" if unspaced.match(prompt[-1]) or unspaced.match(choice[0]) else " "
