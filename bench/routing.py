"""Which router finds the right expert, how sure it is, and what that costs: docs/routing.md.

    python bench/routing.py --data DATA    # measure, and write the page
    python bench/routing.py --data DATA --experts 30    # also `likelihood`, with six experts of so many steps
    python bench/routing.py --data DATA --experts 30 --add    # it alone; the others' numbers stay
    python bench/routing.py                # the page from the numbers that are there

DATA is a folder with data sets (reasoning_gym, chinese_idioms, chinese_poetry, trivia_history, medmcqa,
cl_benchmark/dbpedia, dolly), each with train.jsonl and test.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from routing_experts import BATCH, RANK, Scores, trained
from routing_page import page
from routing_questions import NEAR, Questions, near_prompts, read, stripped
from safetensors.numpy import load_file, save_file
from side_by_side import Company, Settings
from sklearn.metrics import roc_auc_score
from speed import about

from retain.experts.choice import Choice
from retain.experts.pool import AdapterPool
from retain.experts.routing.base import Router
from retain.experts.routing.combined import Combined
from retain.experts.routing.gate import Gate
from retain.experts.routing.keyword import Keyword
from retain.experts.routing.likelihood import Likelihood, pool_scorer
from retain.experts.routing.opening import DEPTH
from retain.experts.routing.prototype import Prototype
from retain.functional.statistics import mean_interval
from retain.models.states import StateReader

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "routing.json"
TOKENS = 32  # of the answer that a choice is compared with
DEPTHS = (1 / 15, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 9 / 10)


class Store:
    """States of questions after some layers, read once and kept on disk: what `StateReader` gives, looked up.

    Args:
        file: a safetensors file of [n, H] per number of layers, with the texts beside it as JSON.
    """

    def __init__(self, model: Any, tokenizer: Any, file: Path, say: Callable[[str], None]) -> None:
        self.model, self.tokenizer, self.file, self.say = model, tokenizer, file, say
        self.known: dict[str, dict[str, Any]] = {}
        if file.is_file():
            texts = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            self.known = {layers: dict(zip(texts[layers], rows)) for layers, rows in load_file(file).items()}

    def reader(self, depth: float) -> Callable[..., Any]:
        live = StateReader(self.model, self.tokenizer, depth)
        known = self.known.setdefault(str(live.layers), {})

        def look_up(texts: Sequence[str], progress: Any = None) -> Any:
            new = list(dict.fromkeys(text for text in texts if text not in known))
            if new:
                start = time.perf_counter()
                known.update(zip(new, live(new)))
                self._keep()
                self.say(f"{len(new)} questions after {live.layers} layers: {time.perf_counter() - start:.0f} s")
            return np.stack([known[text] for text in texts])

        return look_up

    def _keep(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        full = {layers: rows for layers, rows in self.known.items() if rows}
        save_file({layers: np.stack(list(rows.values())) for layers, rows in full.items()}, self.file)
        texts = json.dumps({layers: list(rows) for layers, rows in full.items()}, ensure_ascii=False)
        self.file.with_suffix(".json").write_text(texts, encoding="utf-8")


def measure(router: Router, asked: Questions, near: set[str]) -> dict[str, Any]:
    """Everything that one fitted router got right and wrong."""
    own = {name: router.route(texts) for name, texts in asked.held.items()}
    core, everyday, elsewhere = (router.route(t) for t in (asked.core, asked.everyday, asked.elsewhere))
    right = {name: [c.expert == name for c in choices] for name, choices in own.items()}
    refused = [c.expert is None for c in core]
    domains = [flag for flags in right.values() for flag in flags]
    apart = [c.expert is None for c, text in zip(core, asked.core) if text not in near]
    every = [c for choices in own.values() for c in choices]
    certain = [c.confidence for c in [*every, *core]]
    return {
        "domains": interval(domains),
        "core": interval(refused),
        "apart": interval(apart),
        "all": interval([*domains, *refused]),
        "everyday": interval([c.expert is None for c in everyday]),
        "elsewhere": interval([c.expert is None for c in elsewhere]),
        "auroc": auroc(every, core),
        "auroc_elsewhere": auroc(every, elsewhere),
        "each": {name: interval(flags) for name, flags in right.items()},
        "confidence": float(np.mean(certain)),
        "threshold": router.calibration.threshold,
    }


def interval(flags: Sequence[bool]) -> list[float]:
    """Share, its 95 % interval (Wilson), and of how many."""
    return [*mean_interval(np.array(flags, dtype=float)), len(flags)]


def auroc(own: Sequence[Choice], nobody: Sequence[Choice]) -> float:
    """How well the likeliest expert's chance tells experts' questions from nobody's: 0.5 not at all, 1 always."""
    tops = [max(choice.scores.values()) for choice in [*own, *nobody]]
    return float(roc_auc_score([1] * len(own) + [0] * len(nobody), tops))


def timed(routers: dict[str, Router], model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Seconds of one choice, and of an answer of `TOKENS` tokens, one question at a time and in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in [*routers, "answer"]}
    for prompt in [prompts[0], *prompts]:  # the first one warms up
        for name, router in routers.items():
            start = time.perf_counter()
            router.route([prompt])
            seconds[name].append(time.perf_counter() - start)
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        start = time.perf_counter()
        model.generate(**inputs, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
        seconds["answer"].append(time.perf_counter() - start)
    return {name: {"median": float(np.median(s[1:])), "sum": float(np.sum(s[1:]))} for name, s in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--fit", type=int, default=48)
    parser.add_argument("--held", type=int, default=80)
    parser.add_argument("--nobody", type=int, default=120)
    parser.add_argument("--timed", type=int, default=24)
    parser.add_argument("--depths", type=float, nargs="*", default=DEPTHS)
    parser.add_argument("--states", type=Path, default=ROOT / "bench" / "out" / "routing")  # a file per model
    parser.add_argument("--experts", type=int, metavar="STEPS", help="train and keep six experts, for `likelihood`")
    parser.add_argument("--add", action="store_true", help="measure `likelihood` alone, beside the numbers in --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "routing.md")
    given = parser.parse_args(argv)
    if given.data:
        results = carry_out(given, lambda line: print(line, file=sys.stderr, flush=True))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = page(json.loads(given.out.read_text(encoding="utf-8")))
    given.page.write_text(text, encoding="utf-8")
    print(text)
    return 0


def carry_out(given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    from retain.models.load import load_model

    model, tokenizer = load_model(given.model)
    model.eval()
    near, plain = near_prompts(), read(given.data, given.fit, given.held, given.nobody)
    bare = Questions(**{**vars(plain), "fit": stripped(plain.fit), "held": stripped(plain.held)})
    store = Store(model, tokenizer, given.states / f"{Path(given.model).name}.safetensors", say)
    if given.add:
        return beside(json.loads(given.out.read_text(encoding="utf-8")), given, model, tokenizer, plain, near, say)
    kinds: dict[str, Callable[[], Router]] = {
        "keyword": Keyword,
        "prototype": lambda: Prototype(store.reader(DEPTH)),
        "gate": lambda: Gate(store.reader(DEPTH)),
        "combined": lambda: Combined(store.reader(DEPTH)),
    }
    found: dict[str, Any] = {}
    for name, make in kinds.items():
        router = make().fit(plain.fit, plain.nobody)
        found[name] = {
            "given": measure(router, plain, near),
            "taken off when asked": measure(router, bare, near),
            "without": measure(make().fit(bare.fit, bare.nobody), bare, near),
        }
        say(f"{name}: {found[name]['given']['all']}")
    likelihood = None
    if given.experts:
        likelihood, found["likelihood"] = by_likelihood(given, tokenizer, plain, near, say)
    trial, depths = read(given.data, given.fit, given.held, given.nobody, trial=True), {}
    for depth in sorted(given.depths):
        router = Combined(store.reader(depth)).fit(trial.fit, trial.nobody)
        depths[StateReader(model, tokenizer, depth).layers] = measure(router, trial, near)
    mixed = mixture(given, plain)
    live: dict[str, Router] = {"keyword": Keyword().fit(plain.fit, plain.nobody)}
    for name, kind in (("prototype", Prototype), ("gate", Gate), ("combined", Combined)):
        live[name] = kind(store.reader(DEPTH)).fit(plain.fit, plain.nobody)
        live[name].reader = StateReader(model, tokenizer, DEPTH)  # type: ignore[attr-defined]
    if likelihood is not None:
        live["likelihood"] = likelihood
    with Company() as company:
        seconds = timed(live, model, tokenizer, mixed)
    return {
        "about": about(Settings(model=given.model)),
        "sizes": {
            "fit": given.fit,
            "held": given.held,
            "nobody": len(plain.nobody),
            "layers": StateReader(model, tokenizer, DEPTH).layers,
            "near": list(NEAR),
            "timed": given.timed,
            "tokens": TOKENS,
        }
        | trained_how(given),
        "routers": found,
        "depths": depths,
        "seconds": seconds | {"others": company.share},
    }


def by_likelihood(
    given: argparse.Namespace, tokenizer: Any, asked: Questions, near: set[str], say: Callable[[str], None]
) -> tuple[Likelihood, dict[str, Any]]:
    """The router with its experts, which are trained if they are not there, and what it got right."""
    from retain.models.load import load_model

    folder = given.states / f"experts-{Path(given.model).name}-{given.experts}"
    library = trained(given.data, given.model, given.experts, folder, say)
    own, _ = load_model(given.model, tokenizer=False)  # the other stays as it is: its answers are timed
    scorer = pool_scorer(AdapterPool(own.eval().requires_grad_(False), library), tokenizer)
    router = Likelihood(Scores(scorer, folder / "scores.json", say)).fit(asked.fit, asked.nobody)
    found = {"given": measure(router, asked, near)}
    say(f"likelihood: {found['given']['all']}")
    router.scorer = scorer  # from here on nothing is looked up
    return router, found


def beside(
    before: dict[str, Any],
    given: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    asked: Questions,
    near: set[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Numbers that are there, with those of `likelihood`; its time is taken beside answers of its own.

    Raises:
        ValueError: the others were asked other questions.
    """
    sizes = {"fit": given.fit, "held": given.held, "nobody": len(asked.nobody)}
    if sizes != {key: before["sizes"][key] for key in sizes}:
        raise ValueError(f"the numbers that are there have other sizes than {sizes}; measure all, without --add")
    router, found = by_likelihood(given, tokenizer, asked, near, say)
    with Company() as company:
        seconds = timed({"likelihood": router}, model, tokenizer, mixture(given, asked))
    own = seconds["likelihood"] | {"answer": seconds["answer"]["sum"], "others": company.share}
    return before | {
        "routers": before["routers"] | {"likelihood": found},
        "sizes": before["sizes"] | trained_how(given),
        "seconds": before["seconds"] | {"likelihood": own},
    }


def mixture(given: argparse.Namespace, asked: Questions) -> list[str]:
    """Questions of all kinds in turn, for timing."""
    return [texts[i] for i in range(given.timed) for texts in [*asked.held.values(), asked.core]][: given.timed]


def trained_how(given: argparse.Namespace) -> dict[str, int]:
    """Of the experts, for the page."""
    return {"steps": given.experts, "batch": BATCH, "rank": RANK} if given.experts else {}


if __name__ == "__main__":
    sys.exit(main())
