"""A run directory as a real run leaves it, filled by a seeded simulation instead of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retain.drift import SHIFTS
from retain.functional.flip_shares import Outcomes, lost_shares
from retain.functional.statistics import macro_interval
from retain.report.changed import AGREEMENT
from retain.results import (
    Change,
    Drift,
    Estimate,
    ProbeInfo,
    Results,
    Shift,
    StepSummary,
    Verdict,
    save_items,
    save_results,
)
from retain.results import (
    Sequence as SequenceNumbers,
)

HOSTILE = (
    "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\" $x_1$ {{ 7*7 }} | *b* [a](http:b)"
)

REFERENCES = [  # name, kind, group, metric, chance, items, accuracy before
    ("countries", "choice", "knowledge", "accuracy", 0.25, 120, 0.62),
    ("everyday facts", "choice", "knowledge", "accuracy", 0.25, 100, 0.71),
    ("grammar", "pairs", "capability", "accuracy", 0.5, 160, 0.88),
    ("arithmetic", "answer", "capability", "exact match", None, 80, 0.34),
    ("instructions", "follow", "behaviour", "constraints met", None, 60, 0.55),
]


def _mean(values: np.ndarray) -> Estimate:
    half = 1.96 * values.std() / np.sqrt(len(values))
    return Estimate(value=values.mean(), low=max(0, values.mean() - half), high=min(1, values.mean() + half))


def _change(info: ProbeInfo, before: np.ndarray, after: np.ndarray) -> Change:
    step = after - before
    half = 1.96 * step.std() / np.sqrt(len(step))
    paired = Estimate(value=step.mean(), low=step.mean() - half, high=step.mean() + half)
    word = (
        "lost" if paired.high < 0 else "gained" if paired.low > 0 else "kept" if paired.low > -0.02 else "cannot tell"
    )
    ratio = after.mean() / before.mean() if before.mean() else 1.0
    shares = {}
    if info.role == "reference":
        found = lost_shares([Outcomes(before, after, _options(info))])._asdict()
        shares = {f"forgetting_{k}": _estimate(v) for k, v in found.items() if info.chance or k == "raw"}
    return Change(
        probe=info.name,
        before=_mean(before),
        after=_mean(after),
        difference=paired,
        p=0.0123,
        p_holm=0.0456,
        lost=int(((before == 1) & (after == 0)).sum()),
        gained=int(((before == 0) & (after == 1)).sum()),
        kept=int(((before == 1) & (after == 1)).sum()),
        items=len(before),
        forgetting=1 - ratio,
        retention=min(100.0, 100 * ratio),
        band="excellent" if ratio > 0.9 else "good" if ratio > 0.7 else "fair",
        detectable=2.8 * step.std() / np.sqrt(len(step)),
        conclusion=word,
        intervals=shares,
        **{name: share.value for name, share in shares.items()},
    )


def _options(info: ProbeInfo) -> int | None:
    return round(1 / info.chance) if info.chance else None


def _estimate(interval) -> Estimate:
    return Estimate(**interval._asdict())


def _judged(infos: list[ProbeInfo], first: dict, last: dict) -> list[Outcomes]:
    old = [i for i in infos if i.role == "reference" and i.name in first]
    return [Outcomes(first[i.name], last[i.name], _options(i)) for i in old]


def _drift(drop: float) -> Drift:
    """Every number that there is, smaller after by `drop`."""
    agreement = {name: Estimate(value=1 - drop, low=0.9 - drop, high=1.0) for name in AGREEMENT}
    shifts = {
        name: Shift(
            before=0.4 + place,
            after=(0.4 + place) * (1 - drop),
            difference=Estimate(value=-drop * (0.4 + place), low=-drop * (0.6 + place), high=-drop * (0.2 + place)),
            items=100 + place,
        )
        for place, name in enumerate(SHIFTS)
    }
    return Drift(agreement=agreement, shifts=shifts, divergence={"kl": Estimate(value=drop, low=0.011, high=0.789)})


def _group_deltas(infos: list[ProbeInfo], outcomes: dict, stages: Sequence[str]) -> dict:
    deltas: dict = {}
    for group in dict.fromkeys(i.group for i in infos if i.role == "reference"):
        names = [i.name for i in infos if i.group == group and i.name in outcomes[stages[0]]]
        steps = [[outcomes[stage][n] - outcomes[stages[0]][n] for n in names] for stage in stages[1:]]
        deltas[group] = [_estimate(macro_interval(step)) for step in steps]
    return deltas


def build_run(
    directory: Path,
    tasks: Sequence[str] = ("reasoning",),
    drop: float = 0.05,
    methods: dict | None = None,
    seed: int = 0,
    name: str | None = None,
    metrics: bool = True,
    items: bool = True,
    hostile: bool = False,
) -> Results:
    """Write results.json, metrics.jsonl, run.yaml, env.json and item tables; `drop` is the share of items lost."""
    random = np.random.default_rng(seed)
    stages = ["00-base", *(f"{k + 1:02d}-{task}" for k, task in enumerate(tasks))]
    infos = [
        ProbeInfo(name=n, kind=k, group=g, role="reference", metric=m, chance=c, items=size)
        for n, k, g, m, c, size, _ in REFERENCES
    ]
    start = {n: accuracy for n, *_, accuracy in REFERENCES}
    for task in tasks:
        infos.append(
            ProbeInfo(
                name=f"{task} test",
                kind="answer",
                group="new",
                role="task",
                task=task,
                metric="exact match",
                items=90,
            )
        )
        start[f"{task} test"] = 0.08
    same = np.random.default_rng(99)
    outcomes = {stages[0]: {info.name: (same.random(info.items) < start[info.name]).astype(float) for info in infos}}
    for place, stage in enumerate(stages[1:]):
        previous, now = outcomes[stages[place]], {}
        for info in infos:
            right = previous[info.name].copy()
            if info.task == tasks[place]:
                right[random.random(info.items) < 0.6] = 1
            else:
                right[random.random(info.items) < drop] = 0
                right[random.random(info.items) < 0.01] = 1
            now[info.name] = right
        outcomes[stage] = now
    scores = {stage: {name: _mean(v) for name, v in found.items()} for stage, found in outcomes.items()}
    text = ProbeInfo(
        name="plain text",
        kind="perplexity",
        group="knowledge",
        role="reference",
        metric="perplexity",
        higher_is_better=False,
        items=40,
    )
    infos.append(text)
    for k, stage in enumerate(stages):
        value = 14.2 * (1 + drop) ** k
        scores[stage][text.name] = Estimate(value=value, low=value * 0.93, high=value * 1.07)
    changes = []
    if tasks:
        first, last = outcomes[stages[0]], outcomes[stages[-1]]
        changes = [_change(info, first[info.name], last[info.name]) for info in infos if info is not text]
        nats = float(np.log(scores[stages[-1]][text.name].value / scores[stages[0]][text.name].value))
        changes.append(
            Change(
                probe=text.name,
                before=scores[stages[0]][text.name],
                after=scores[stages[-1]][text.name],
                difference=Estimate(value=nats, low=nats - 0.012, high=nats + 0.012),
                p=0.001,
                p_holm=0.0004,
                lost=0,
                gained=0,
                kept=0,
                items=40,
                forgetting=float(np.exp(nats)) - 1,
                retention=max(0.0, 100 * (2 - float(np.exp(nats)))),
                band="good",
                detectable=0.017,
                conclusion="lost" if nats > 0.02 else "kept",
            )
        )
    verdict = None
    if tasks:
        references = [c for c in changes if c.probe in {n for n, *_ in REFERENCES}]
        macro = float(np.mean([c.difference.value for c in references]))
        half = float(np.sqrt(np.mean([(c.difference.high - c.difference.low) ** 2 for c in references]) / 5) / 2)
        gain = float(np.mean([c.difference.value for c in changes if c.probe.endswith(" test")]))
        verdict = Verdict(
            forgetting=-macro,
            improvement=gain,
            improvement_score=0.8,
            balance=0.7,
            mean_reference=0.72,
            stability_efficiency=0.5,
            successful=True,
            lost_over_threshold=[c.probe for c in references if c.forgetting > 0.3],
            sentence=f"Learned {100 * gain:+.0f} points on {len(tasks)} task(s); old abilities changed by "
            f"{100 * macro:+.1f} points [{100 * (macro - half):.1f}, {100 * (macro + half):.1f}] on "
            f"{len(references)} probes (perplexity not in this mean).",
            difference=Estimate(value=macro, low=macro - half, high=macro + half),
            intervals={
                name: Estimate(value=value, low=value - half, high=value + half)
                for name, value in (("improvement", gain), ("forgetting", -macro), ("balance", 0.7))
            }
            | {"stability_efficiency": Estimate(value=0.5, low=0.471, high=0.532)}
            | {f"forgetting_{k}": _estimate(v) for k, v in lost_shares(_judged(infos, first, last))._asdict().items()},
        )
    names = [f"{task} test" for task in tasks]
    filled = len(tasks) > 1
    results = Results(
        name=name or (HOSTILE if hostile else directory.name),
        created="2026-03-14T09:26:53Z",
        model="acme/small-135M-instruct",
        seed=17,
        command="retain run run.yaml -o seed=17",
        old="text the model wrote itself (400 rows)",
        methods=methods if methods is not None else {"replay": {"fraction": 0.15}, "ewc": {"strength": 1000.0}},
        tasks=list(tasks),
        stages=stages,
        probes=infos,
        scores=scores,
        matrix=[[float(outcomes[stage][n].mean()) for n in names] for stage in stages] if tasks else [],
        sequence=SequenceNumbers(
            accuracy=0.613 if filled else None,
            incremental_accuracy=0.587 if filled else None,
            backward_transfer=-0.041 if filled else None,
            forward_transfer=0.012 if filled else None,
            forgetting=0.043 if filled else None,
            plasticity=0.655 if filled else None,
            stability=0.937 if filled else None,
        ),
        changes=changes,
        group_deltas=_group_deltas(infos, outcomes, stages),
        verdict=verdict,
        drift={stage: _drift(drop) for stage in stages[1:]},
        training=[
            StepSummary(
                task=task,
                stage=stage,
                steps=60,
                new_rows=800,
                replay_rows=141,
                seconds=412.5,
                trainable=4_884_480,
                parameters=134_515_008,
                final_loss=1.234,
            )
            for task, stage in zip(tasks, stages[1:])
        ],
    )
    save_results(results, directory)
    if metrics:
        _metrics(directory, results, random)
    if items:
        _items(directory, infos, outcomes, hostile)
    (directory / "run.yaml").write_text("model: acme/small-135M-instruct\nseed: 17\n", encoding="utf-8")
    env = {
        "versions": {"torch": "2.13.0", "retain": "0.1.0"},
        "hardware": {"device": "cpu", "cores": 2},
        "seed": 17,
    }
    (directory / "env.json").write_text(json.dumps(env), encoding="utf-8")
    return results


def _metrics(directory: Path, results: Results, random: np.random.Generator) -> None:
    records = []
    for task, stage in zip(results.tasks, results.stages[1:]):
        for step in range(1, 61):
            loss = 1.1 + 1.6 * np.exp(-step / 18) + 0.06 * random.standard_normal()
            records.append({"kind": "step", "task": task, "step": step, "loss": loss, "loss/distill": 0.4 * loss / 3})
            if step % 15 == 0 or (step == 1 and stage == results.stages[1]):
                before = results.scores[results.stages[results.stages.index(stage) - 1]]
                for probe, end in results.scores[stage].items():
                    score = before[probe].value + (end.value - before[probe].value) * step / 60
                    score *= 1 + 0.01 * random.standard_normal()
                    records.append({"kind": "look", "stage": stage, "probe": probe, "score": score})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")


def _items(directory: Path, infos: list[ProbeInfo], outcomes: dict, hostile: bool) -> None:
    for stage, found in outcomes.items():
        rows = []
        for info in infos:
            for k in range(info.items):
                if info.kind == "perplexity":
                    prompt, reference, output, score, correct = (
                        f"A long text, number {k}.",
                        "",
                        "",
                        92.5,
                        None,
                    )
                else:
                    score = float(found[info.name][k])
                    correct = bool(score)
                    prompt = f"{info.name}: what is the right answer to question {k} of this set, and why is it so?"
                    reference = json.dumps([f"answer {k}", f"the answer {k}"])
                    output = f"answer {k}" if correct else f"something else after {stage}"
                if hostile and k == 0:
                    prompt = output = HOSTILE
                rows.append(
                    {
                        "probe": info.name,
                        "item": f"q{k:03d}",
                        "prompt": prompt,
                        "reference": reference,
                        "output": output,
                        "score": score,
                        "correct": correct,
                        "tokens": 1,
                        "details": "{}",
                    }
                )
        save_items(rows, directory / "probes" / f"{stage}.parquet")
