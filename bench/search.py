"""What a search finds on the small world: two objectives (TPE), at random, and on a grid of the same number of trials.

    python bench/search.py --seeds 0 1 2 --write docs/search.md

A model that knows A learns B, then C (bench/small_world.py). Varied are the strengths of `l2sp` and `distill`, the
share of replay and the learning rate. The number that is compared is the hypervolume: the area of learned (0 to 1)
times kept (1 − lost) that some trial's numbers cover, of 1; doing nothing covers none, as it learns nothing.
Everything is kept under --out: the same command goes on where it was stopped. The runs write no reports.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import small_world
from scipy import stats

from retain.advice.search import Search, prepare, work
from retain.advice.search_result import conclude
from retain.advice.search_space import read_over
from retain.config import RunConfig, parse
from retain.report.search import Found, Tried, load, on_front

STEPS, BATCH, OLD = 60, 16, 96
OVER = [
    "methods.l2sp.strength=0.01..10:log",
    "methods.distill.strength=0.05..5:log",
    "methods.replay.fraction=0..0.5",
    "train.learning_rate=3e-4..3e-3:log",
]
MODES = {"tpe": "TPE, two objectives", "random": "at random", "grid": "grid"}
#: 3 values of each range are 81 points; as many as the others have trials are drawn of them.
POINTS = 3


def config(seed: int, folder: Path, base: Path) -> RunConfig:
    """A run of the small world, with its model, rows and probes as files in the folder."""
    from retain.results import write_text

    if not (folder / "model" / "config.json").is_file():
        small_world.tokenizer().save_pretrained(folder / "model")
        small_world.pretrained(seed, base).save_pretrained(folder / "model")

    def lines(name: str, rows: Sequence[small_world.Row], probe: str = "") -> str:
        given = [
            {"id": f"{name}-{i}", "probe": probe, "prompt": prompt, "answers": [answer], "score": "exact"}
            if probe
            else {"prompt": prompt, "response": answer}
            for i, (prompt, answer) in enumerate(rows)
        ]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in given))
        return str(folder / f"{name}.jsonl")

    facts, words = small_world.exam("A")[: -small_world.WORDS], small_world.exam("A")[-small_world.WORDS :]
    text = lines("facts", facts, "facts"), lines("words", words, "words")
    tasks = []
    for family in ("B", "C"):
        data = lines(family, small_world.exam(family))  # all of its facts, over and over
        tasks.append({"name": family, "data": data, "test": "same"})
    return parse(
        {
            "name": "small-world",
            "model": str(folder / "model"),
            "tasks": tasks,
            "old": lines("old", small_world.lessons("A", OLD, 10_000 + seed)),
            "methods": ["l2sp", {"replay": {"fraction": 0.25}}, {"distill": {"strength": 0.5}}],
            "probes": {"reference": [{"data": path, "max_tokens": 4} for path in text], "tasks": {"max_tokens": 4}},
            "train": {
                "learning_rate": 1e-3,
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "max_length": 32,
                "bf16": False,
            },
            "seed": seed,
        }
    )


def hypervolume(trials: Sequence[Tried]) -> float:
    """Area of learned × kept, both from 0 to 1, that the finished trials cover."""
    area = kept = 0.0
    for trial in reversed(on_front(trials)):  # the most learned first: each further one keeps more
        assert trial.learned is not None
        assert trial.lost is not None
        if trial.learned.value > 0 and 1 - trial.lost.value > kept:
            area += trial.learned.value * (1 - trial.lost.value - kept)
            kept = 1 - trial.lost.value
    return area


def search(mode: str, seed: int, trials: int, out: Path, base: Path) -> Found:
    """One search, or what is kept of it."""
    folder = out / f"{mode}-{trials}-{seed}"
    if (folder / "search.json").is_file():
        return load(folder)
    run = config(seed, out / f"world-{seed}", base)
    made = Search(run, read_over(OVER, run), folder, mode, trials, points=POINTS)
    units = prepare(made, lambda line: None)
    begin = time.monotonic()

    def told(trial: Tried) -> None:
        print(f"{folder.name}: trial {trial.number} {trial.state}, {time.monotonic() - begin:.0f} s", flush=True)

    with mock.patch("retain.report.page.write_report"):
        work(made, units, lambda line: None, told)
    return conclude(made, units)


def table(found: Sequence[tuple[str, int, Found]]) -> str:
    """A row per search, in Markdown."""
    rows = ["| search | seed | trials | ended early | steps saved | on the front | hypervolume | the recommended one |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for mode, seed, one in found:
        early = sum(t.state == "hopeless" for t in one.trials)
        best = next(t for t in one.trials if t.number == one.best)
        assert best.learned is not None
        assert best.lost is not None
        numbers = ", ".join(
            f"{word} {round(100 * one.value, 1) + 0:.1f}"
            for word, one in (("learned", best.learned), ("lost", best.lost))
        )
        saved = f"{100 * (one.steps_saved or 0):.0f} %"
        rows.append(
            f"| {MODES[mode]} | {seed} | {len(one.trials)} | {early} | {saved} | {len(on_front(one.trials))} "
            f"| {hypervolume(one.trials):.3f} | {numbers} |"
        )
    return "\n".join(rows) + means(found)


def means(found: Sequence[tuple[str, int, Found]]) -> str:
    """The hypervolume of every mode over the seeds, with Student's interval; nothing where there is one seed."""
    volumes = {mode: [hypervolume(one.trials) for name, _, one in found if name == mode] for mode, _, _ in found}
    if min(map(len, volumes.values())) < 2:
        return ""
    said = []
    for mode, values in volumes.items():
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        said.append(f"{MODES[mode]} {np.mean(values):.2f} ± {half:.2f}")
    return f"\n\nHypervolume, mean over the seeds with its 95 % interval: {', '.join(said)}."


def main(words: list[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--out", type=Path, default=here / "out" / "search", help="where everything is kept")
    parser.add_argument("--base", type=Path, default=here / "out" / "two_tasks" / "base", help="models that know A")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args(words)
    from retain.cli.common import quiet_libraries

    quiet_libraries()
    found = [
        (mode, seed, search(mode, seed, given.trials, given.out, given.base))
        for seed in given.seeds
        for mode in given.modes
    ]
    text = table(found)
    print(text)
    if given.write:
        page = given.write.read_text(encoding="utf-8")
        mark = re.compile(r"(<!-- bench/search\.py -->\n).*?(\n<!-- end -->)", re.DOTALL)
        given.write.write_text(mark.sub(lambda m: m[1] + text + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
