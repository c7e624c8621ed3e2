"""What a monitor sees of a model in training: loss and divergence on fixed texts, and answers to probes, each beside
what the model said at the start."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retain import analysis
from retain.errors import DataError, RunError
from retain.functional import outputs, statistics
from retain.functional.divergence import tail_kl
from retain.functional.tiled_head import Head, log_probs
from retain.models import params, passes
from retain.models.generation import has_chat_template
from retain.models.likelihood import encode
from retain.models.rows import looking
from retain.probes.asking import ask
from retain.probes.base import Item, Probe, Subject
from retain.probes.suite import load_probes
from retain.results import ProbeInfo, Verdict, load_items, save_items, without_text
from retain.training.watch import bar

BASELINE, ANSWERS = "baseline.safetensors", "baseline.parquet"
TOP = 64  # likeliest tokens of the base that are kept for every position
_TOKENS = {"cpu": 1024}  # padded tokens of a pass; elsewhere `_MOST_TOKENS`
_MOST_TOKENS = 8192
_RESAMPLES = 2_000  # a look is one of many: its intervals may be coarser than those of a report


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A look that leaves no trace: training flags and random states are put back; no gradient, the student's precision.

    Adapters, gradient checkpointing and what wraps `forward` are not touched: in eval mode nothing is checkpointed.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), looking(model), passes.precision(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def anchor_texts(count: int, seed: int = 0, tokenizer: Any = None) -> list[str]:
    """Texts of the core suite, the same at every call: questions with their right answer, sentences, passages.

    With a tokenizer that has a chat template, the questions and answers are turns of a chat: the form in which such a
    model is trained and asked. Written out plainly they move much less.
    """
    items = {item.id: item for probe in load_probes("core") for item in probe.items}
    ranked = sorted(items, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return [_text(items[name], tokenizer) for name in ranked[:count]]


def _text(item: Item, tokenizer: Any) -> str:
    f = item.fields
    if "prompt" not in f:
        return str(f.get("text") or f["good"])
    answer = f["choices"][f["answer"]] if "choices" in f else (f.get("answers") or [""])[0]
    if tokenizer is None or not has_chat_template(tokenizer):
        return f"{f['prompt']}\n{answer}".strip()
    turns = [{"role": "user", "content": f["prompt"]}, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


@dataclass
class Proxies:
    """Numbers of the n anchors at one look, (n,) each: KL(base ‖ model) per token and −log p per token, in nats."""

    kl: np.ndarray
    loss: np.ndarray


@dataclass
class Baseline:
    """The model before training, as the anchors and the probes saw it.

    Shapes: `labels` [N], `ids` and `top` [N, K] (likeliest tokens and their log-probabilities), `loss` [N], for the N
    predicted tokens of all anchors in order. `noise` is what arithmetic alone changes, in nats per token: the anchors
    were read twice, in batches of other shapes.
    """

    step: int
    digest: str
    noise: float
    ids: torch.Tensor
    top: torch.Tensor
    loss: torch.Tensor
    answers: list[dict[str, Any]]

    def save(self, folder: Path) -> None:
        """Write it; the tensors last, and under a temporary name first, as they mark the rest as whole."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BASELINE).unlink(missing_ok=True)
        save_items(self.answers, folder / ANSWERS)
        about = {"step": self.step, "digest": self.digest, "noise": self.noise}
        tensors = {"ids": self.ids.to(torch.int32), "top": self.top, "loss": self.loss}
        partial = folder / (BASELINE + ".part")
        save_file(tensors, partial, metadata={"about": json.dumps(about)})
        os.replace(partial, folder / BASELINE)

    @classmethod
    def load(cls, folder: Path) -> Baseline | None:
        """What `save` wrote; None where there is none.

        Raises:
            RunError: a damaged file.
        """
        path = folder / BASELINE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise RunError(
                f"{path}: damaged ({error}). Delete the folder {folder}, and begin the training anew."
            ) from None
        return cls(
            **about, ids=found["ids"].long(), top=found["top"], loss=found["loss"], answers=load_items(folder / ANSWERS)
        )


class Looker:
    """Fixed anchors and probes, and the model that they are put to.

    Args:
        texts: the anchors.
        old: probes of old abilities.
        new: probes of what is being learned.
        tokenizer: of the model.
        most_tokens: of an anchor; the rest is cut off.
        confidence: of intervals.
        where: the setting that they belong to.

    Raises:
        DataError: fewer than two anchors that hold two tokens, a probe with too few items, or two with one name.
    """

    def __init__(
        self,
        texts: Sequence[str],
        old: Sequence[Probe],
        new: Sequence[Probe],
        tokenizer: Any,
        most_tokens: int = 64,
        confidence: float = 0.95,
        where: str = "monitor",
    ) -> None:
        self.tokenizer, self.confidence = tokenizer, confidence
        rows = [tokens[:most_tokens] for tokens in encode(tokenizer, list(texts))]
        self.rows = [row for row in rows if len(row) > 1]
        if len(self.rows) < 2:
            raise DataError(
                f"{where}.anchors: {len(self.rows)} of {len(texts)} texts have two tokens or more; an interval needs "
                "2 such texts. Give more."
            )
        self.lengths = np.array([len(row) - 1 for row in self.rows])
        self.probes = [*old, *new]
        self.infos: list[ProbeInfo] = [p.info("reference") for p in old] + [p.info("task", p.name) for p in new]
        names = [info.name for info in self.infos]
        for probe in self.probes:
            if len(probe.items) < max(2, probe.fewest):
                raise DataError(
                    f"monitor.probes: '{probe.name}' has {len(probe.items)} item; an interval needs at least 2. "
                    "Give more items, or raise `monitor.limit`."
                )
            if names.count(probe.name) > 1:
                raise DataError(f"monitor.probes: two probes are called '{probe.name}'. Give one another name.")

    @property
    def digest(self) -> str:
        """By which a stored baseline is known to be about the same anchors and old probes."""
        asked = [(p.name, [item.id for item in p.items]) for p in self.probes if self._is_old(p.name)]
        return hashlib.sha256(json.dumps([self.rows, asked, TOP]).encode()).hexdigest()[:16]

    def _is_old(self, name: str) -> bool:
        return any(info.name == name and info.role == "reference" for info in self.infos)

    def baseline(self, model: Any, step: int) -> Baseline:
        """The model as it is now; called under `undisturbed`."""
        top = min(TOP, params.head(model)[0].shape[0])
        ids, values, loss = self._read(model, None, top)
        again = self._read(model, ids, top, halved=True)
        noise = max(float((again[2] - loss).mean().abs()), float(tail_kl(values, again[1]).mean().abs()))
        answers = [without_text(row) for row in self._ask(model, self.probes)]
        return Baseline(step, self.digest, noise, ids, values, loss, answers)

    def complete(self, base: Baseline, model: Any) -> bool:
        """Ask the probes that a baseline of an earlier task did not have; whether there were any."""
        known = {row["probe"] for row in base.answers}
        missing = [probe for probe in self.probes if probe.name not in known]
        base.answers += [without_text(row) for row in self._ask(model, missing)] if missing else []
        return bool(missing)

    def proxies(self, model: Any, base: Baseline) -> Proxies:
        """Divergence and loss on the anchors; called under `undisturbed`."""
        _, values, loss = self._read(model, base.ids, base.ids.shape[1])
        return Proxies(self.means(tail_kl(base.top, values)), self.means(loss))

    def summary(self, now: Proxies, base: Baseline) -> dict[str, Any]:
        """Means over all tokens: divergence, loss, and how much the loss rose, each with its interval over texts."""
        before = self.means(base.loss)
        kl = statistics.mean_interval(now.kl, self.confidence, self.lengths, resamples=_RESAMPLES)
        rise = self._rise(before, now.loss)
        loss = float(np.average(now.loss, weights=self.lengths))
        return {"kl": kl._asdict(), "loss": loss, "loss_rise": rise._asdict(), "noise": base.noise}

    def moved(self, before: Proxies, now: Proxies, least: float) -> bool:
        """Whether loss or divergence rose by more than `least` nats per token: the whole paired interval did."""
        return any(self._rise(a, b).low > least for a, b in ((before.kl, now.kl), (before.loss, now.loss)))

    def answers(self, model: Any, base: Baseline) -> tuple[dict[str, Any], Verdict | None]:
        """Every probe now against the baseline, and the verdict; called under `undisturbed`."""
        rows = self._ask(model, self.probes)
        wanted = {probe.name for probe in self.probes}
        before = [row for row in base.answers if row["probe"] in wanted]
        changes = analysis.changes(before, rows, self.infos, self.confidence)
        shown = {
            c.probe: {
                "role": info.role,
                "score": c.after.model_dump(),
                "before": c.before.value,
                "difference": c.difference.model_dump(),
                "forgetting": c.forgetting,
                "retention": c.retention,
            }
            for c, info in zip(changes, self.infos, strict=True)
        }
        return shown, analysis.verdict(changes, self.infos, before, rows, self.confidence)

    def _rise(self, before: np.ndarray, after: np.ndarray) -> statistics.Interval:
        return statistics.paired_interval(before, after, self.confidence, self.lengths, resamples=_RESAMPLES)

    def means(self, per_token: torch.Tensor) -> np.ndarray:
        """Numbers of all predicted tokens [N] as means over each anchor (n,)."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        return np.add.reduceat(per_token.double().numpy(), starts) / self.lengths

    def _ask(self, model: Any, probes: Sequence[Probe]) -> list[dict[str, Any]]:
        if not probes:
            return []
        with bar(transient=True) as progress:
            job = progress.add_task("looking", total=sum(len(p.items) for p in probes), note="")
            return ask(probes, Subject(model, self.tokenizer), lambda n: progress.update(job, advance=n))

    def _read(
        self, model: Any, ids: torch.Tensor | None, top: int, halved: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids [N, K], their log-probabilities [N, K], −log p of the labels [N]) on the CPU, in order of the anchors.

        Args:
            ids: tokens to score at every position; None for the K likeliest.
            top: K.
            halved: in batches of half the size.
        """
        device = params.causal(model).get_input_embeddings().weight.device
        head = Head(*params.head(model), *params.logit_rules(model))
        most = _TOKENS.get(device.type, _MOST_TOKENS) // (2 if halved else 1)
        begins = np.concatenate([[0], np.cumsum(self.lengths)])
        found_ids = torch.empty(int(begins[-1]), top, dtype=torch.long) if ids is None else ids
        values, loss = torch.empty(found_ids.shape), torch.empty(len(found_ids))
        for batch in _batches(self.rows, most):
            width = max(len(self.rows[i]) for i in batch)
            tokens = torch.tensor([self.rows[i] + [0] * (width - len(self.rows[i])) for i in batch])
            real = torch.tensor([[1] * len(self.rows[i]) + [0] * (width - len(self.rows[i])) for i in batch])
            inputs = {"input_ids": tokens.to(device), "attention_mask": real.to(device)}
            mask = inputs["attention_mask"][:, 1:].bool()
            hidden, labels = params.hidden_states(model, inputs)[:, :-1][mask], inputs["input_ids"][:, 1:][mask]
            places = torch.cat([torch.arange(begins[i], begins[i + 1]) for i in batch])
            if ids is None:
                listed, theirs = outputs.top_k(hidden, head, top)
                found_ids[places], values[places] = listed.cpu(), theirs.float().cpu()
                loss[places] = -log_probs(hidden, head, labels)[0].float().cpu()
            else:
                wanted = torch.cat([labels[:, None], ids[places].to(device)], dim=1)
                scores = log_probs(hidden, head, wanted)[0].float().cpu()
                loss[places], values[places] = -scores[:, 0], scores[:, 1:]
        return found_ids, values, loss


def _batches(rows: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Numbers of rows, longest first, in batches of at most so many padded tokens."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
