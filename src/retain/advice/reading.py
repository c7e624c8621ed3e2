"""Rows as a model sees them: per-token loss of their answers, and vectors of what they are about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retain.data.chat import to_chat, with_choices
from retain.data.sources import load_rows
from retain.errors import DataError

#: Share of the layers that are run for vectors; the lower ones tell domains apart (docs/routing.md).
DEPTH = 0.5
#: Name of the general rows that come with the package: items of the built-in suite with their answers.
BUILT_IN = "core"

#: Tokens of a row that are read at most: the end of what stands before the answer, and the answer's beginning.
BEFORE, ANSWER = 96, 64
#: Padded tokens per pass on a GPU; on a CPU fewer.
BATCH_TOKENS = 4096

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """Rows of one source.

    Args:
        name: for tables.
        turns: what stands before the answer, as chat turns; empty for plain texts.
        answers: what is learned: the answer, or the whole text.
        total: rows of the source, of which these are a sample.
    """

    name: str
    turns: list[list[dict[str, Any]]]
    answers: list[str]
    total: int

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def texts(self) -> list[str]:
        """Everything that is said in each row."""
        return ["\n".join([*(t["content"] or "" for t in turns), a]) for turns, a in zip(self.turns, self.answers)]

    @property
    def questions(self) -> list[str]:
        """What is asked; the whole of a plain text."""
        return ["\n".join(t["content"] or "" for t in turns) or a for turns, a in zip(self.turns, self.answers)]

    def part(self, places: Sequence[int]) -> Sample:
        """Some of the rows."""
        return Sample(self.name, [self.turns[i] for i in places], [self.answers[i] for i in places], self.total)


def sample_of(rows: Any, name: str, most: int | None = None, seed: int = 0) -> Sample:
    """At most `most` rows, drawn with the seed, of a data set in one of the trainer's forms."""
    total, places = len(rows), np.arange(len(rows))
    if most is not None and most < total:
        places = np.sort(np.random.default_rng(seed).permutation(total)[:most])
    turns: list[list[dict[str, Any]]] = []
    answers: list[str] = []
    for row in rows.select(places):
        if row.get("text") is not None:
            turns.append([])
            answers.append(row["text"])
        elif row.get("messages"):
            turns.append(list(row["messages"][:-1]))
            answers.append(row["messages"][-1]["content"] or "")
        else:
            turns.append(list(row["prompt"]))
            answers.append(row["completion"][-1]["content"] or "")
    return Sample(name, turns, answers, total)


def read_sample(where: str, most: int | None = None, seed: int = 0, name: str | None = None) -> Sample:
    """The same of a file, folder or hub id.

    Raises:
        DataError: not there, unreadable, or rows that cannot be trained on.
    """
    return sample_of(to_chat(load_rows(where), where), name or where, most, seed)


def built_in(most: int | None = None, seed: int = 0) -> Sample:
    """General rows where the user has none: questions of the core suite with their choices and the right one.

    Only those with choices: an answer in one word is hard to foresee where nothing in the question asks for one.
    """
    from datasets import Dataset

    from retain.probes.suite import load_probes

    rows = []
    for probe in load_probes(BUILT_IN):
        for item in probe.items:
            if probe.kind == "choice":
                question, choices = item.fields["prompt"], item.fields["choices"]
                turns = [{"role": "user", "content": with_choices(question, choices)}]
                answer = [{"role": "assistant", "content": choices[item.fields["answer"]]}]
                rows.append({"prompt": turns, "completion": answer})
    return sample_of(Dataset.from_list(rows), f"the built-in suite {BUILT_IN}", most, seed)


class Reader:
    """One model that reads rows.

    Args:
        model, tokenizer: a causal language model; adapters are part of it for losses, and off for vectors.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from retain.models.states import StateReader

        self.model, self.tokenizer = model, tokenizer
        self._states = StateReader(model, tokenizer, DEPTH)

    def short(self, rows: Sample) -> Sample:
        """The same rows, the long ones cut: reading takes as long as there are tokens."""
        turns = [
            [{"role": "user", "content": self._cut(t[-1]["content"] or "", BEFORE, end=True)}] if t else []
            for t in rows.turns
        ]
        most = [ANSWER if t else BEFORE + ANSWER for t in rows.turns]
        return Sample(rows.name, turns, [self._cut(a, n) for a, n in zip(rows.answers, most)], rows.total)

    def _cut(self, text: str, most: int, end: bool = False) -> str:
        ids = self.tokenizer(text[-40 * most :] if end else text[: 40 * most], add_special_tokens=False)["input_ids"]
        if len(ids) <= most and len(text) <= 40 * most:
            return text
        return self.tokenizer.decode(ids[-most:] if end else ids[:most])

    def losses(self, rows: Sample, progress: Progress = lambda n: None) -> NDArray[np.float64]:
        """[n, 2]: −log p of every row's answer given what stands before it, in nats, and its tokens.

        Raises:
            DataError: a row whose answer has no tokens.
        """
        from retain.models.generation import encode_prompts
        from retain.models.likelihood import text_log_likelihood
        from retain.models.rows import looking, plain_row, score_rows

        rows = self.short(rows)
        chats = [i for i, turns in enumerate(rows.turns) if turns]
        texts = [i for i, turns in enumerate(rows.turns) if not turns]
        empty = next((i for i, answer in enumerate(rows.answers) if not answer.strip()), None)
        if empty is not None:
            raise DataError(f"{rows.name}: row {empty + 1} of the sample has an empty answer. Leave it out.")
        found = np.zeros((len(rows), 2))
        if chats:
            before = encode_prompts(self.tokenizer, [rows.turns[i] for i in chats])
            own = self.tokenizer([rows.answers[i] for i in chats], add_special_tokens=False)["input_ids"]
            parts = [plain_row(a, b, i) for i, (a, b) in enumerate(zip(before, own))]
            for i, part in enumerate(parts):
                part.items = [i]
            with looking(self.model):
                sums = score_rows(self.model, self.tokenizer, parts, len(chats), BATCH_TOKENS, progress)
            found[chats] = [(-total, len(ids)) for total, ids in zip(sums, own)]
        if texts:
            plain = text_log_likelihood(
                self.model, self.tokenizer, [rows.answers[i] for i in texts], window=512, progress=progress
            )
            found[texts] = [(-one.log_likelihood, max(1, one.tokens)) for one in plain]
        return found

    def vectors(self, rows: Sample, progress: Progress = lambda n: None) -> NDArray[np.float64]:
        """Mean hidden states [n, H] of rows, questions and answers, after the lower half of the layers."""
        return self._states(self.short(rows).texts, progress).astype(np.float64)
