"""The shape of the package: who may import whom, what stays light, how long files are."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import retain

PACKAGE = Path(retain.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: Layers, lowest first. A part may import its own and lower layers, apart from what `ONLY` says.
LAYERS = [
    {"errors"},
    {"functional", "presets"},
    {"settings"},
    {"config", "results"},
    {"items"},
    {"against", "verdicts"},
    {"analysis", "drift", "rundir", "totals"},
    {"data"},
    {"models"},
    {"methods", "probes"},
    {"training"},
    {"report"},
    {"inputs", "outcome", "workload"},
    {"planning"},
    {"pipeline"},
    {"timing"},
    {"estimate"},
    {"experts", "advice"},
    {"comparison", "measuring"},
    {"demo"},
    {"cli"},
]
#: Parts that see less than their layer would allow.
ONLY = {
    "errors": set(),
    "functional": {"errors"},
    "presets": {"errors"},
    "settings": set(),
    "config": {"errors", "presets", "settings"},
    "results": {"errors"},
    "items": {"functional", "results", "errors"},
    "against": {"items", "functional", "results", "errors"},
    "verdicts": {"items", "functional", "results"},
    "analysis": {"against", "verdicts", "items", "functional", "results", "errors"},
    "drift": {"items", "functional", "results", "errors"},
    "report": {"results", "analysis", "functional", "errors", "rundir"},
    "inputs": {"errors", "functional", "config", "results", "items", "data", "models", "probes"},
    "totals": {"items", "functional", "results", "errors"},
    "outcome": {"errors", "config", "results", "items", "analysis", "drift", "rundir", "totals"},
    "workload": {"errors", "functional", "data", "models", "probes", "training"},
    "timing": {"inputs", "probes", "training", "workload"},
    "estimate": {"errors", "functional", "data", "methods", "models", "probes", "timing", "training", "workload"},
    "methods": {"errors", "functional", "data", "models"},
    "probes": {"errors", "functional", "results", "data", "models"},
}
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
#: Modules that help and settings need; importing them must cost nothing.
LIGHT = ("retain", "retain.cli", "retain.config", "retain.presets", "retain.errors", "retain.results")
PUBLIC = "ContinualTrainer EWC Replay Distill L2SP LoRA Freeze Interpolate run load_run"
SOFT_LINES, MOST_LINES = 300, 500
#: Files that were longer when the limit came; they may shrink, never grow.
STILL_LONG: dict[str, int] = {}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the package that a module belongs to; "" for `retain` itself and `retain.__main__`."""
    names = module.split(".")
    return "" if len(names) < 2 or names[1] == "__main__" else names[1]


def imports(tree: ast.AST) -> list[str]:
    """Modules of retain that a file imports, also inside functions; not those that only type checkers see."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    known = {module_of(path) for path in FILES}
    whole = [next((m for m in (name, name.rpartition(".")[0]) if m in known), None) for name in found]
    return [name for name in whole if name]


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_the_reading_of_imports():
    code = """
from typing import TYPE_CHECKING
import retain.errors, os
from retain import config
if TYPE_CHECKING:
    from retain.pipeline import run
def late():
    from retain.models.params import causal, trainable
    from retain.methods import ewc
"""
    found = imports(ast.parse(code))
    assert set(found) == {"retain.errors", "retain.config", "retain.models.params", "retain.methods.ewc"}


def test_every_part_has_a_place():
    parts = {part_of(module_of(path)) for path in FILES} - {""}
    assert parts <= set(LEVEL), f"give {sorted(parts - set(LEVEL))} a layer in {Path(__file__).name}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_go_one_way(path):
    mine = part_of(module_of(path))
    if not mine:
        return  # the public names are looked up by text, the rest of `retain/__init__.py` imports nothing heavy
    for other in map(part_of, imports(TREES[path])):
        if other in (mine, ""):
            continue
        allowed = ONLY.get(mine, {part for part in LEVEL if LEVEL[part] <= LEVEL[mine]})
        assert other in allowed, f"{ids(path)} imports retain.{other}; {mine} may import {', '.join(sorted(allowed))}"


def test_the_rules_themselves_go_one_way():
    for part, allowed in ONLY.items():
        assert all(LEVEL[other] < LEVEL[part] for other in allowed)


def test_no_cycles_between_files():
    """Not even through imports inside functions."""
    edges = {module_of(path): set(imports(TREES[path])) - {"retain", module_of(path)} for path in FILES}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(edges.get(module, ())):
                walk(other, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        walk(module, ())


def test_parts_do_not_import_each_other_in_circles():
    edges: dict[str, set[str]] = {}
    for path in FILES:
        mine = part_of(module_of(path))
        edges.setdefault(mine, set()).update({part_of(m) for m in imports(TREES[path])} - {mine, ""})
    for first, others in edges.items():
        for second in others:
            assert first not in edges.get(second, set()), f"{first} and {second} import each other"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, json, {module}; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_listing_the_methods_does_not_load_torch():
    code = "import sys; from retain import methods; print(len(methods.summaries()), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, loaded = done.stdout.split()
    assert int(count) >= 8
    assert loaded == "False"


@pytest.mark.parametrize("name", PUBLIC.split())
def test_public_names_resolve(name):
    assert getattr(retain, name).__name__ == name
    assert name in dir(retain)


def test_every_public_name_resolves():
    for name in dir(retain):
        getattr(retain, name)
    with pytest.raises(AttributeError, match="Public names"):
        retain.Nothing  # noqa: B018


def test_files_are_not_too_long():
    lengths = {ids(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = [f"{name} ({lines})" for name, lines in lengths.items() if lines > SOFT_LINES]
    if long:
        warnings.warn(f"files of more than {SOFT_LINES} lines: {', '.join(long)}", stacklevel=1)
    for name, lines in lengths.items():
        assert lines <= STILL_LONG.get(name, MOST_LINES), f"{name} has {lines} lines; split it"
    assert all(lengths[name] > MOST_LINES for name in STILL_LONG), "it has become short: take it off the list"


def test_no_module_is_called_utils():
    bad = {"util", "utils", "helper", "helpers", "misc", "common_utils"}
    assert not [ids(path) for path in FILES if bad & {part.removesuffix(".py") for part in path.parts}]


def test_every_file_says_what_it_is():
    assert not [ids(path) for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
