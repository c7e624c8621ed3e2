"""The time of a run: what is learned and asked in it, and how long that takes at the speed of single passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retain.inputs import budget_probes
from retain.probes.base import Probe
from retain.training.budget import drift_looker
from retain.training.monitor import ForgettingMonitor
from retain.training.rehearsal import Batch
from retain.workload import Questions, TaskWork, questions, said_by_base, watching

if TYPE_CHECKING:
    from retain.config import BudgetConfig, RunConfig
    from retain.results import ProbeInfo

#: Rows and tokens of a pass by which reading is timed; about what a CPU reads at once (`retain.models.rows`).
READ = (8, 128)

Asked = dict[str, list[tuple[int, Questions]]]


def asked(
    config: RunConfig,
    work: Sequence[TaskWork],
    probes: Sequence[Probe],
    infos: Sequence[ProbeInfo],
    tokenizer: Any,
    notes: list[str],
) -> Asked:
    """What is asked in a run: name → how often, and each time what.

    Args:
        notes: receives what is not counted.
    """
    stages = len(work) + 1
    again = stages if config.private else 1  # a private run keeps nothing of what the base said
    found = {
        **_at_stages(config, stages, probes, infos, tokenizer),
        "what the base says (divergence)": [(again, said_by_base(probes, tokenizer))],
    }
    own = [[p for p, info in zip(probes, infos) if info.task == one.name] for one in work]
    if config.monitor is not None:
        monitor = ForgettingMonitor(**config.monitor.model_dump())
        found["looks of the monitor"] = watching(monitor, work, own, tokenizer)
        if monitor.old or any(own):
            notes.append("monitor: probes are asked more often where loss or divergence on the anchors rises")
    if config.budget is not None:
        found |= budgeted(config.budget, work, budget_probes(config, probes, infos), own, tokenizer)
    return found


def _at_stages(
    config: RunConfig, stages: int, probes: Sequence[Probe], infos: Sequence[ProbeInfo], tokenizer: Any
) -> Asked:
    """The probes at the base and after every task, or those of the tasks alone between these two."""
    if config.probes.between == "all" or stages < 3:
        return {f"asking the probes {stages} times": [(stages, questions(probes, tokenizer))]}
    learned = [p for p, info in zip(probes, infos) if info.role == "task"]
    return {
        "asking all probes twice": [(2, questions(probes, tokenizer))],
        f"asking those of the tasks {stages - 2} times between": [(stages - 2, questions(learned, tokenizer))],
    }


def budgeted(
    c: BudgetConfig,
    work: Sequence[TaskWork],
    kept: Sequence[Probe],
    own: Sequence[Sequence[Probe]],
    tokenizer: Any,
) -> Asked:
    """What a budget asks: the drift while training, the probes at some of these looks, and the search afterwards.

    The search is counted with all its tries; it ends at the first where the whole step is inside.

    Args:
        kept: probes that it is on.
        own: probes of each task, asked at the chosen share and at the end.
    """
    drift = Questions(sum(map(len, drift_looker(c, tokenizer).rows)), [])
    # the base reads the anchors twice, a later task begins with a look, and the last step has one
    looks = 2 + len(work) - 1 + sum(-(-task.steps // c.every) for task in work)
    asked = sum(min(c.calibrate, max(0, (task.steps - 1) // c.every)) for task in work)
    once = questions(kept, tokenizer)
    return {
        "budget: looks while training": [(looks, drift), (asked, once)],
        "budget: search afterwards, at most": [
            (c.tries * len(work), once),
            *((2, questions(mine, tokenizer)) for mine in own),
        ],
    }


def learning(work: Sequence[TaskWork], takes: Mapping[str, float], usual: Batch, largest: Batch) -> dict[str, float]:
    """Seconds of every task's steps.

    Args:
        takes: seconds of single passes: "usual" and "largest" micro-batch, "update".
        usual, largest: the two batches of these.
    """
    found = {}
    for one in work:
        # between the two batches that were rehearsed, time grows with the tokens
        small, large = (batch.rows * batch.width for batch in (usual, largest))
        tokens = one.usual.rows * one.usual.width
        slope = (takes["largest"] - takes["usual"]) / (large - small) if large > small else 0.0
        micro = max(takes["usual"] + slope * (tokens - small), takes["usual"] * tokens / small)
        found[f"learning {one.name}"] = one.steps * (one.batches * micro + takes["update"])
    return found


def asking(asked: Asked, takes: Mapping[str, float]) -> dict[str, float]:
    """Seconds of everything that is asked, where it takes any.

    Args:
        takes: seconds of single passes: "read" of `READ`, "write" of a token for a batch.
    """
    found = {}
    for name, parts in asked.items():
        read = sum(times * one.read for times, one in parts) / (READ[0] * READ[1])
        calls = sum(times * number for times, one in parts for _, number in one.calls)
        if seconds := read * takes["read"] + calls * takes["write"]:
            found[name] = seconds
    return found
