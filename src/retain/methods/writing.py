"""Settings and work of rows that are written for replay: from demonstrations, or on policy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from retain.data.checking import checker
from retain.data.filters import Avoided, Filters
from retain.errors import ConfigError
from retain.methods.base import MethodConfig
from retain.methods.context import Run
from retain.models.endpoint import Endpoint
from retain.models.own_rows import Engine, Recall, asked, fingerprint, kept, local, mean_states, self_written

Made = tuple[Any, dict[str, Any], str]


class Demonstrations(MethodConfig):
    """How rows are written from a few that are shown."""

    shown: int = Field(4, ge=1, le=16)
    """Old rows shown in a prompt; each of them equally often."""
    clusters: int = Field(20, ge=1)
    """Kinds of inputs, by k-means, of which each must be there."""
    surplus: float = Field(1.5, ge=1)
    """Inputs written for each row that is kept; the most diverse stay."""
    features: Literal["tfidf", "hidden"] = "tfidf"
    """What inputs are compared by: their words, or mean hidden states of the model."""


class OnPolicy(MethodConfig):
    """How old prompts are answered anew."""

    check: str = "contains"
    """When an answer is right: `exact`, `contains` (the stored answer, as whole words), `f1`, or `module:function`."""
    threshold: float = Field(0.5, gt=0, le=1)
    """Smallest token F1, or score of your own function, that passes."""
    resample: int = Field(4, ge=0)
    """How often a prompt is asked again whose answer did not pass."""
    fallback: Literal["stored", "drop"] = "stored"
    """Prompts that never pass: keep the stored answer, or leave them out."""

    @field_validator("threshold")
    @classmethod
    def _has_effect(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("check") in ("exact", "contains") and value != cls.model_fields["threshold"].default:
            raise ValueError(f"without effect at check: {info.data['check']}; it belongs to f1 and to module:function")
        return value


class Server(MethodConfig):
    """An OpenAI-compatible server that writes in place of the model in training."""

    url: str
    """Base of its routes, such as `http://127.0.0.1:8000/v1`."""
    model: str
    """Name of the model there."""
    key: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key."""
    parallel: int = Field(16, ge=1)
    """Requests at a time."""


class Writing:
    """Who writes rows for one task of a run, and where they go.

    Args:
        run: the task.
        max_tokens: of an answer.
        refresh: whether answers are made before every task, or once and kept.
        server: who writes in place of the model.
    """

    def __init__(self, run: Run, max_tokens: int, refresh: bool = True, server: Server | None = None) -> None:
        self.run, self.max_tokens, self.refresh = run, max_tokens, refresh
        self.engine: Engine = local(run.model, run.tokenizer)
        self.who = fingerprint(run.model)
        self.writer = {"checkpoint": f"the model before task {run.task_index} ({run.task})", "weights": self.who}
        if server is not None:
            self.engine = Endpoint(server.url, server.model, server.key, server.parallel)
            self.who = f"{server.model} at {server.url}"
            self.writer = {"endpoint": server.url, "model": server.model}

    def freely(self, number: int) -> Any:
        """Rows in which the writer talks to itself (`source: self`)."""
        run, writer = self.run, self.who if isinstance(self.engine, Endpoint) else ""
        return self_written(
            run.model, run.tokenizer, run.buffer, number, run.seed, run.say, self.max_tokens,
            self.engine if writer else None, writer, run.avoid,
        )  # fmt: skip

    def from_demonstrations(self, shown: Any, number: int, settings: Demonstrations) -> Any:
        """At most `number` rows like those shown: inputs once per run, answers by the latest model."""
        from datasets import Dataset

        from retain.data import demonstrations as ssr
        from retain.data.diversity import diverse, tfidf
        from retain.data.synthesis import special_tokens
        from retain.models.generation import has_chat_template
        from retain.models.likelihood import context_length

        run = self.run
        specials = special_tokens(run.tokenizer)
        texts = ssr.questions(shown)
        wanted = round(settings.surplus * number)
        longest = max(len(ids) for ids in run.tokenizer(texts)["input_ids"])
        filters = Filters(
            prompt_tokens=min(context_length(run.model, run.tokenizer) // 2, max(32, round(1.5 * longest))),
            response_tokens=self.max_tokens,
            min_prompt_words=min(3, *(len(text.split()) for text in texts)),
            avoid=run.avoid,
        )
        about = {"source": "demonstrations", "writer": self.writer, "seed": run.seed, "settings": settings.model_dump()}

        def inputs(advance: Callable[[int], None], recall: Recall) -> Made:
            chat = has_chat_template(run.tokenizer)
            rows, report = ssr.write_inputs(
                self._ask(recall), texts, wanted, run.seed, chat=chat, shown=settings.shown, filters=filters,
                specials=specials, progress=advance,
            )  # fmt: skip
            made = about | {"tried": report.tried, "dropped": dict(report.dropped)}
            sentence = f"replay: inputs from {len(texts)} demonstrations: {report.sentence()}."
            return Dataset.from_list([{"input": text} for text in rows]), made, sentence

        def answers(advance: Callable[[int], None], recall: Recall) -> Made:
            rows, report = ssr.write_answers(
                self._ask(recall), written["input"], self.max_tokens, specials, filters, advance
            )
            asked_for = [row["prompt"][0]["content"] for row in rows]
            by_words = settings.features == "tfidf"
            features = tfidf(asked_for) if by_words else mean_states(run.model, run.tokenizer, asked_for)
            chosen = diverse(features, number, settings.clusters, run.seed)
            kinds = f"{chosen.covered} of {chosen.clusters} clusters"
            found = [rows[place] | {"cluster": int(chosen.labels[place])} for place in chosen.places]
            made = about | {"tried": report.tried, "dropped": dict(report.dropped), "clusters": chosen.clusters}
            made |= {"covered": chosen.covered, "left out as alike": len(rows) - len(found)}
            few = f" {number} were wanted." if len(found) < number else ""
            sentence = f"replay: answers by {self._said}: {report.sentence()}; {len(found)} chosen, {kinds}.{few}"
            return Dataset.from_list(found), made, sentence

        path = run.buffer / "demonstrations-inputs.parquet"
        stamp = [self.who, run.seed, wanted, self.max_tokens, settings.model_dump()]
        written = kept(
            path, "the model writes inputs", wanted, stamp, inputs, run.say, run.avoid, lambda row: [row["input"]]
        )
        path = run.buffer / f"demonstrations-{run.task_index if self.refresh else 1:02d}.parquet"
        rows = kept(path, "the model answers them", len(written), stamp, answers, run.say, run.avoid)
        return rows.select_columns(["prompt", "completion"])

    def on_policy(self, parts: list[Any], settings: OnPolicy) -> Any:
        """Old rows with answers of the latest model where they pass the check.

        Raises:
            ConfigError: not one row is left.
        """
        from datasets import Dataset

        from retain.data.on_policy import answer_anew, key_of

        run = self.run
        check = checker(settings.check, settings.threshold)
        old = [row for part in parts for row in part]
        known = {} if self.refresh else self._answered()

        def answers(advance: Callable[[int], None], recall: Recall) -> Made:
            new = [row for row in old if key_of(row) not in known]
            rows, report = answer_anew(
                self._ask(recall), new, check, self.max_tokens, resample=settings.resample,
                fallback=settings.fallback, avoid=run.avoid, progress=advance,
            )  # fmt: skip
            rows = [known[key] for key in map(key_of, old) if key in known] + rows
            if not rows:
                raise ConfigError(
                    f"methods.replay.on_policy: no row is left ({report.sentence()}). Raise `max_tokens`, choose "
                    "another `check`, or set `fallback: stored`."
                )
            made = {"source": "on_policy", "writer": self.writer, "settings": settings.model_dump()}
            before = f"; {len(rows) - report.rows} answered before an earlier task" if known else ""
            sentence = f"replay: {report.sentence()}; by {self._said}{before}."
            return Dataset.from_list(rows), made | report.as_json(), sentence

        path = run.buffer / f"on-policy-{run.task_index:02d}.parquet"
        stamp = [self.who, run.seed, self.max_tokens, settings.model_dump()]
        rows = kept(path, "the model answers old prompts", len(old), stamp, answers, run.say, run.avoid, _own_words)
        return rows.select_columns(["prompt", "completion"])

    def _answered(self) -> dict[str, dict[str, Any]]:
        """Rows of the latest earlier task, by the key of what they were made of."""
        from datasets import Dataset

        paths = [self.run.buffer / f"on-policy-{number:02d}.parquet" for number in range(1, self.run.task_index)]
        there = [path for path in paths if path.is_file()]
        rows = Dataset.from_parquet(str(there[-1]), cache_dir=str(self.run.buffer / ".cache")) if there else []
        avoided = Avoided(self.run.avoid)  # there may be more of them than when the row was written
        return {row["key"]: row for row in rows if not any(map(avoided, _own_words(row)))}

    @property
    def _said(self) -> str:
        return self.writer.get("checkpoint") or self.who

    def _ask(self, recall: Recall) -> Any:
        return functools.partial(_asked, self.engine, recall, self.run.seed)


def _own_words(row: dict[str, Any]) -> list[str]:
    """What the model wrote of a row whose prompt was given."""
    return [turn["content"] for turn in row["completion"] if row["answer_of"] == "model"]


def _asked(
    engine: Engine, recall: Recall, seed: int, prompts: list[Any], limit: int, temperature: float, draw: int
) -> list[Any]:
    return asked(engine, prompts, limit, temperature, 1000 * seed + draw, recall)
