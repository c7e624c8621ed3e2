"""Tasks of lm-evaluation-harness as probes: its prompts, its scoring, on the model that is in memory.

The kind is `lm_eval`, not the name of this module, so that no row of a probe file is taken for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from retain.errors import DataError, ModelError
from retain.models.rows import looking
from retain.probes.base import Item, Outcome, Probe, Progress, Subject
from retain.probes.harness_tasks import as_the_harness, tasks_of

#: What a choice's log-likelihood is divided by before the best is taken, by metric; by 1 for all others.
_LENGTHS = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode("utf-8"))}
_GUESSABLE = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


class HarnessProbe(Probe):
    """One task of the harness. An item's score is its value of the metric, so that their mean is the harness's number.

    - metrics that are means: the value itself;
    - perplexities (of words, bytes or answers): −log p in nats, weighted by words, bytes or 1.

    Details hold the item's other metrics, and for multiple choice the log-likelihoods.

    Args:
        name: of the task.
        items: the first so many of the task.
        task: of the harness, loaded.
        metric: the one that is the score.
    """

    kind = "lm_eval"
    group = "capability"
    fields = frozenset()

    def __init__(self, name: str, items: Sequence[Item], task: Any, metric: str) -> None:
        super().__init__(name, items)
        self.task = task
        self.metric = metric
        self.weighted = _form(task, metric) == "perplexity"
        self.higher_is_better = bool(task.higher_is_better()[metric]) and not self.weighted  # type: ignore[misc]
        self.fewest = 2 if self.weighted else 1  # type: ignore[misc]

    @property
    def chance(self) -> float | None:
        """Mean of 1/choices, where one choice is right and picking it is the score."""
        counts = [len(item.fields.get("choices", ())) for item in self.items]
        if self.metric not in _GUESSABLE or self.task.OUTPUT_TYPE != "multiple_choice" or not all(counts):
            return None
        return None if self.task.multiple_target else sum(1 / count for count in counts) / len(counts)

    def look(self, subject: Subject, progress: Progress = lambda n: None) -> list[Outcome]:
        """Ask every item; outcomes in the order of `self.items`.

        Raises:
            ModelError: an answer or a limit that does not fit the model's context.
            DataError: an item without a value of the metric.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate

        from retain.models.harness import LiveLM

        with as_the_harness(), looking(subject.model), contextlib.redirect_stderr(io.StringIO()):  # bars of its own
            lm = LiveLM(subject.model, subject.tokenizer, subject.batch_tokens, len(self.items), progress)
            self.task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the same examples at every stage
            try:
                found = evaluate(lm=lm, task_dict={"tasks": {self.name: self.task}}, limit=len(self.items),
                                 bootstrap_iters=0)  # fmt: skip
            except AssertionError as error:
                reason = str(error) or "an answer is longer than the model's context"
                raise ModelError(f"probe '{self.name}': the harness cannot ask this model ({reason}).") from error
        lm.cache_hook.tell(len(self.items))
        samples = found["samples"][self.name]
        first = samples[0]["filter"]  # of several ways to read an answer, the task's first is the score
        others: list[dict[str, Any]] = [{} for _ in self.items]
        for sample in samples:
            for name in sample["metrics"]:
                if sample["filter"] != first:
                    others[sample["doc_id"]][f"{name},{sample['filter']}"] = _plain(sample[name])
                elif name != self.metric:
                    others[sample["doc_id"]][name] = _plain(sample[name])
        main = sorted((s for s in samples if s["filter"] == first), key=lambda sample: sample["doc_id"])
        return [self._outcome(*row) for row in zip(self.items, main, others, strict=True)]

    def _outcome(self, item: Item, sample: Mapping[str, Any], details: dict[str, Any]) -> Outcome:
        if self.metric not in sample["metrics"]:
            raise DataError(f"probe '{self.name}', item '{item.id}': the task gives no '{self.metric}' for it.")
        value, tokens = sample[self.metric], 1
        if self.weighted:
            value, tokens = value if isinstance(value, Sequence) else (value, 1)
            value = -value
        score = float(value)
        correct = bool(score == 1) == self.higher_is_better if score in (0, 1) and not self.weighted else None
        prompt, reference, output, more = self._answer(item, sample)
        return Outcome(item.id, prompt, reference, output, score, correct, int(tokens), details | more)

    def _answer(self, item: Item, sample: Mapping[str, Any]) -> tuple[str, str, str, dict[str, Any]]:
        """What was shown, what is right, what was answered, and what else is to be kept."""
        asked, target = sample["arguments"], _text(sample["target"])
        kind = self.task.OUTPUT_TYPE
        if kind == "multiple_choice":
            return self._choice(item, sample)
        if kind == "loglikelihood_rolling":
            return asked[0][0], "", "", {}
        answer = sample["filtered_resps"][0]
        if kind == "loglikelihood":
            return asked[0][0], target, target if answer[1] else "", {"log_likelihood": float(answer[0])}
        raw = _text(sample["resps"][0][0])
        return asked[0][0], target, _text(answer), {"written": raw} if raw != _text(answer) else {}

    def _choice(self, item: Item, sample: Mapping[str, Any]) -> tuple[str, str, str, dict[str, Any]]:
        texts, answers = item.fields["choices"], [answer for answer, _ in sample["filtered_resps"]]
        given = np.array(answers[: len(texts)])
        values = given / [max(1, _LENGTHS[self.metric](text)) for text in texts] if self.metric in _LENGTHS else given
        if self.metric == "acc_mutual_info":
            values = given - answers[len(texts) :]
        best, right = int(np.argmax(values)), item.fields["right"]
        details: dict[str, Any] = {"chosen": best, "answer": right, "log_likelihoods": given.tolist()}
        if self.metric in _GUESSABLE and not isinstance(right, list):
            details["choices"] = len(texts)
        named = [texts[i] for i in ([right] if isinstance(right, int) else right) if 0 <= i < len(texts)]
        reference = named[0] if len(named) == 1 else json.dumps(named, ensure_ascii=False)
        prompt = item.fields["prompt"] if self.task.multiple_input else sample["arguments"][0][0]
        return prompt, reference, texts[best], details


def harness_probes(source: str, limit: int | None = None) -> list[HarnessProbe]:
    """One probe per task of a source (`harness_tasks.tasks_of`).

    Args:
        limit: at most this many items of each: the first ones, as the harness's own limit takes them.

    Raises:
        DataError: as `tasks_of`; no items; a metric that the task lacks, or that is no mean over items.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit {limit} given; allowed is 1 or more.")
    tasks, wanted = tasks_of(source)
    probes = []
    for name, task in tasks.items():
        metric = _metric(source, name, task, wanted)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        try:
            with as_the_harness():
                items = [_item(task, number, doc) for number, doc in task.doc_iterator(limit=limit)]
        except Exception as error:  # as above: templates and functions of the task
            line = " ".join(str(error).split())[:300]
            raise DataError(
                f"{source}: the rows of '{name}' do not fit it ({type(error).__name__}: {line}). Check the task file."
            ) from error
        if not items:
            raise DataError(f"{source}: '{name}' has no rows. Check its split and its data.")
        probes.append(HarnessProbe(name, items, task, metric))
    return probes


def _metric(source: str, name: str, task: Any, wanted: str) -> str:
    """The metric that is the score: the wanted one, else the task's first that items have a value of."""
    known = list(task.aggregation())
    if wanted and wanted not in known:
        raise DataError(f"{source}: '{name}' has no metric '{wanted}'. Its metrics: {', '.join(known)}.")
    for metric in [wanted] if wanted else known:
        if _form(task, metric):
            return metric
    raise DataError(
        f"{source}: {', '.join([wanted] if wanted else known)} of '{name}' is of all items together, none of them has "
        "a score of its own that could be compared before and after. Add a metric that is a mean to its `metric_list`."
    )


def _form(task: Any, metric: str) -> str:
    """How the harness makes a number of the items' values: "mean", "perplexity", or "" for any other way."""
    from lm_eval.api.metrics import mean, perplexity, weighted_perplexity

    how = task.aggregation()[metric]
    if how in (mean, np.mean):
        return "mean"
    return "perplexity" if how in (perplexity, weighted_perplexity) else ""


def _item(task: Any, number: int, doc: Mapping[str, Any]) -> Item:
    """A document by its number and content; what it shows, so that written rows can stay away from it."""
    content = json.dumps(doc, ensure_ascii=False, sort_keys=True, default=str)
    fields: dict[str, Any] = {}
    target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        fields["prompt"] = target
    elif task.OUTPUT_TYPE == "multiple_choice":
        choices, text = list(task.doc_to_choice(doc)), task.doc_to_text(doc)
        several = isinstance(text, int)  # the choices are what is shown, with one ending for all
        right = text if several else target
        if isinstance(right, str):
            right = choices.index(right) if right in choices else -1
        fields |= {"choices": choices, "right": right, "prompt": _text(target) if several else text}
        if not fields["prompt"] and isinstance(right, int) and 0 <= right < len(choices):
            fields["good"] = choices[right]  # a pair without a question
    else:
        fields["prompt"] = task.doc_to_text(doc)
    if task.OUTPUT_TYPE == "generate_until":
        fields["max_tokens"] = int((task.get_config("generation_kwargs") or {}).get("max_gen_toks", 256))
    return Item(f"{number}-{hashlib.sha256(content.encode('utf-8')).hexdigest()[:8]}", fields)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else str(value)
