"""What every router does: learn from example questions, choose with a calibrated confidence, say why, be a folder.

A kind of router says what it reads of a question, what it learns from that, and how it scores; see `Router`'s hooks.
Saved are `router.json` and `router.safetensors`: no pickle, so that a folder from elsewhere can do no harm.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from retain.errors import DataError, RunError
from retain.experts.choice import Choice
from retain.experts.routing import confidence
from retain.experts.routing.confidence import Calibration

#: Changes whenever what is saved, or how it is read, changes; older folders are fitted anew.
VERSION = 1
#: An expert with fewer different questions cannot be held out and learnt from at once.
FEWEST = 2
_JSON, _TENSORS = "router.json", "router.safetensors"

Progress = Callable[[int], None]
Labels = NDArray[np.intp]
#: What a router has learnt: arrays, or lists of texts.
Learned = dict[str, Any]


class Router:
    """One way to find the expert of a question. A kind overrides `read`, `learn`, `score` and `explain`.

    Args:
        settings: of the kind; written with it, and part of what tells one fitted router from another.
    """

    name: ClassVar[str]
    needs_model: ClassVar[bool] = True

    def __init__(self, **settings: Any):
        self.settings = settings
        self.fingerprint = ""
        self.experts: list[str] = []
        self.examples: list[str] = []
        self.labels: Labels = np.zeros(0, dtype=int)
        self.about: dict[str, list[str]] = {}
        self.learned: Learned = {}
        self.calibration = Calibration(1.0, 0.0, 0.5, 0.0)

    # hooks

    def read(self, prompts: Sequence[str], progress: Progress = lambda n: None) -> Any:
        """What the router sees of the prompts: an array whose first axis is theirs."""
        raise NotImplementedError

    def learn(self, rows: Any, labels: Labels) -> Learned:
        """What is learnt from rows with their labels 0..K; K is nobody's."""
        raise NotImplementedError

    def score(self, learned: Learned, rows: Any) -> NDArray[np.float64]:
        """Scores [n, K + 1] in any unit, one temperature for all columns; nobody's is last."""
        raise NotImplementedError

    def explain(self, prompt: str, row: Any, scores: NDArray[np.float64], expert: int) -> str:
        """What speaks for an expert, for one prompt, in words that go on after "medicine: "."""
        raise NotImplementedError

    def held_out(self, rows: Any, labels: Labels) -> NDArray[np.float64]:
        """Scores of questions that were not learnt from."""
        return confidence.held_out(rows, labels, self.learn, self.score)

    # what all do

    def fit(
        self,
        examples: Mapping[str, Sequence[str]],
        others: Sequence[str],
        about: Mapping[str, Sequence[str]] | None = None,
        progress: Progress = lambda n: None,
    ) -> Self:
        """Learn which questions are whose, and from held-out ones how sure a choice is and when nobody is meant.

        Args:
            examples: questions of every expert, at least two different ones each.
            others: questions that are for no expert, at least two.
            about: words about an expert (its description and keywords); used by `keyword`.
            progress: called with the number of questions just read.

        Raises:
            DataError: no expert, or too few questions.
        """
        self.experts = list(examples)
        self.about = {name: list((about or {}).get(name, ())) for name in self.experts}
        if not self.experts:
            raise DataError("routing: no experts given. Give at least one, with questions.")
        own = {name: _different(texts) for name, texts in examples.items()}
        taken = {text for texts in own.values() for text in texts}
        left = [text for text in _different(others) if text not in taken]
        for name, texts in [*own.items(), ("questions for nobody", left)]:
            if len(texts) < FEWEST:
                raise DataError(
                    f"routing, {name}: {len(texts)} different questions given; at least {FEWEST} are needed to learn "
                    "from one and to measure on the other. Give more; 30 or more make a good router."
                )
        groups = [*own.values(), left]
        self.examples = [text for texts in groups for text in texts]
        self.labels = np.repeat(np.arange(len(groups)), [len(texts) for texts in groups])
        rows = self.read(self.examples, progress)
        self.calibration = confidence.calibrate(self.held_out(rows, self.labels), self.labels)
        self.learned = self.learn(rows, self.labels)
        return self

    def route(self, prompts: Sequence[str]) -> list[Choice]:
        """The expert of every prompt; None where none is likely enough. An empty prompt is the base model's.

        Raises:
            DataError: it is not fitted.
        """
        if not self.learned:
            raise DataError(f"router '{self.name}': has learnt nothing yet. Call fit first, or load a saved one.")
        start = time.perf_counter()
        told = [i for i, prompt in enumerate(prompts) if prompt.strip()]
        found: dict[int, tuple[str | None, float, dict[str, float], str]] = {}
        if told:
            rows = self.read([prompts[i] for i in told])
            scores = self.score(self.learned, rows)
            chances = self.calibration.probabilities(scores)
            for place, (i, label) in enumerate(zip(told, self.calibration.decisions(chances).tolist())):
                best = int(chances[place, :-1].argmax())
                reason = self.explain(prompts[i], rows[place], scores[place], best)
                name = self.experts[label] if label < len(self.experts) else None
                why = self._why(chances[place], best, name, reason)
                each = dict(zip(self.experts, chances[place].tolist()))
                found[i] = (name, float(chances[place, label]), each, why)
        seconds = (time.perf_counter() - start) / max(1, len(prompts))
        nothing = (None, 1.0, dict.fromkeys(self.experts, 0.0), "the question is empty")
        return [Choice(*found.get(i, nothing), seconds) for i in range(len(prompts))]

    def _why(self, chances: NDArray[np.float64], best: int, name: str | None, reason: str) -> str:
        if name is None:
            needed = self.calibration.threshold
            return f"no expert is likely enough: {self.experts[best]} {chances[best]:.0%} of {needed:.0%} ({reason})"
        others = [i for i in range(len(self.experts)) if i != best]
        second = max(others, key=lambda i: chances[i], default=best)
        close = second != best and chances[best] < 3 * chances[second]
        return f"{name}: {reason}" + (f"; {self.experts[second]} is near ({chances[second]:.0%})" if close else "")

    def nearest(self, similarity: NDArray[np.float64], expert: int) -> str:
        """The example question of an expert that is most similar, quoted; similarity [n] to all examples."""
        own = np.flatnonzero(self.labels == expert)
        return f"“{shortened(self.examples[own[similarity[own].argmax()]])}”"

    def save(self, folder: Path) -> None:
        """Write `router.json` and `router.safetensors` into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {key: np.ascontiguousarray(v) for key, v in self.learned.items() if isinstance(v, np.ndarray)}
        content = {
            "version": VERSION,
            "router": self.name,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "experts": self.experts,
            "about": self.about,
            "examples": self.examples,
            "labels": self.labels.tolist(),
            "calibration": asdict(self.calibration),
            "learned": {key: v for key, v in self.learned.items() if key not in arrays},
        }
        save_file(arrays, folder / _TENSORS)
        (folder / _JSON).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def load(self, folder: Path) -> Self:
        """Take over what `save` wrote.

        Raises:
            RunError: not there, damaged, of another kind or version.
        """
        try:
            content = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            arrays = load_file(folder / _TENSORS)
            if (content["version"], content["router"]) != (VERSION, self.name):
                raise ValueError(f"a '{content['router']}' router of version {content['version']}")
            self.settings = content["settings"]
            self.fingerprint = content["fingerprint"]
            self.experts, self.about = content["experts"], content["about"]
            self.examples, self.labels = content["examples"], np.array(content["labels"], dtype=int)
            self.calibration = Calibration(**content["calibration"])
            self.learned = arrays | content["learned"]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise RunError(
                f"{folder}: no '{self.name}' router of version {VERSION} ({error}). Delete the folder; it is made anew."
            ) from error
        return self


def shortened(text: str, most: int = 60) -> str:
    """A text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def ends(text: str, most: int) -> str:
    """A text, or the beginning and the end of a long one: the question stands before a document or behind it."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} {text[-half:]}"


def _different(texts: Sequence[str]) -> list[str]:
    """The texts that are not empty, each once, in their order."""
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))
