"""Questions of six domains, with and without the templates that data sets put around them, and questions for nobody."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from retain.experts.routing.everyday import EVERYDAY
from retain.experts.routing.opening import core_prompts

#: Families of reasoning_gym that are arithmetic.
ARITHMETIC = {
    *("basic_arithmetic", "chain_sum", "products", "decimal_arithmetic", "gcd", "lcm", "simple_equations"),
    *("fraction_simplification", "prime_factorization"),
}
#: Domain → data set.
SETS = {
    "arithmetic": "reasoning_gym",
    "idioms": "chinese_idioms",
    "poetry": "chinese_poetry",
    "history": "trivia_history",
    "medicine": "medmcqa",
    "encyclopaedia": "cl_benchmark/dbpedia",
}
#: Whose questions stand in a template.
TEMPLATED = ("arithmetic", "idioms", "poetry", "encyclopaedia")
#: Probes of the core suite that ask what one of the domains is about.
NEAR = ("arithmetic", "dates")


@dataclass(frozen=True)
class Questions:
    """What routers are fitted with and what they are asked; no text is in both.

    Args:
        fit: of every domain.
        held: of every domain.
        nobody: for nobody, to fit with: of the core suite and everyday ones.
        core: held-out questions of the core suite, for nobody.
        everyday: held-out everyday ones, English and Chinese, for nobody.
        elsewhere: instructions of another data set, of no kind that was fitted with.
    """

    fit: dict[str, list[str]]
    held: dict[str, list[str]]
    nobody: list[str]
    core: list[str]
    everyday: list[str]
    elsewhere: list[str]


def read(data: Path, fit: int, held: int, nobody: int, trial: bool = False) -> Questions:
    """The questions of a folder of data sets, as the sets have them.

    Args:
        data: with a folder per set, each with train.jsonl and test.jsonl.
        fit, held: per domain, the first of train.jsonl and the last of test.jsonl.
        nobody: questions of the core suite to fit with; the others are measured.
        trial: the questions that routers were chosen on instead: the first of test.jsonl, another draw of core.
    """
    kept = slice(held) if trial else slice(-held, None)
    core = core_prompts()
    random.Random(int(trial)).shuffle(core)
    own = {name: _texts(data / where / "train.jsonl")[:fit] for name, where in SETS.items()}
    new = {name: _texts(data / where / "test.jsonl")[kept] for name, where in SETS.items()}
    return Questions(
        own,
        {name: [text for text in texts if text not in own[name]] for name, texts in new.items()},
        core[:nobody] + list(EVERYDAY[::2]),
        core[nobody:],
        list(EVERYDAY[1::2]),
        _texts(data / "dolly" / "test.jsonl")[kept],
    )


def stripped(questions: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same without templates: the idiom, the verses, the formula, the paragraph alone."""
    return {name: [strip(name, text) for text in texts] for name, texts in questions.items()}


def strip(domain: str, text: str) -> str:
    """A question without its template; as it is where it has none."""
    if domain == "idioms":
        return _first(r"“(.*?)”", text)
    if domain == "poetry":
        whole = re.match(r"请背诵(.*?)，首句是“(.*)”$", text, re.S)
        return " ".join(whole.groups()) if whole else re.sub(r"^[^：？\n]*[：？]\s*", "", text)
    if domain == "encyclopaedia":
        paragraph = _first(r"Title: (.*?)\s*(?:\nAnswer:)?\s*$", text)
        return re.sub(r"\s*\nText:\s*", ". ", paragraph)
    if domain == "arithmetic":
        formulas = re.findall(r"[-\d(][-\d\s()+*/.,=a-z^]*\d[)\s=]*", text)
        return max(formulas, key=len).strip() if formulas else text
    return text


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.S)
    return found.group(1) if found else text


def near_prompts() -> set[str]:
    """Prompts of the core suite that ask what one of the domains is about."""
    from retain.probes.suite import load_probes

    return {item.fields["prompt"] for probe in load_probes("core") if probe.name in NEAR for item in probe.items}


def _texts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if not path.parent.name.startswith("reasoning") or row["task"] in ARITHMETIC]
    return [(row.get("prompt") or row["question"]).strip() for row in kept]
