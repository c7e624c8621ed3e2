"""What every method must do, asked of each file in `retain/methods` without naming any of them."""

from __future__ import annotations

import ast
import contextlib
import itertools
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from training_kit import (
    ON_GPU,
    Killed,
    StopAt,
    distance,
    finite,
    merged,
    other_rows,
    rows,
    same_bits,
    stored,
    train,
    trainer,
)

import retain
from retain import methods
from retain.config import read
from retain.errors import ConfigError
from retain.methods.base import Method, Stack

NAMES = methods.names()
ROOT = Path(__file__).parents[1]
SOURCES = Path(retain.__file__).parent / "methods"


def clash(first: type[Method], second: type[Method]) -> bool:
    return bool(first.clash(second) or second.clash(first))


def together(names: Iterable[str]) -> list[Method]:
    """All methods at once, leaving out any that clashes with one before it."""
    chosen: list[type[Method]] = []
    for name in names:
        method = methods.load(name)
        if not any(clash(method, other) for other in chosen):
            chosen.append(method)
    return [method() for method in chosen]


#: Each method alone, and all of them at once: whoever comes first, and whoever comes last, keeps its place.
TEAMS = {name: (lambda name=name: [methods.load(name)()]) for name in NAMES} | {
    "all": lambda: together(NAMES),
    "all from the last": lambda: together(reversed(NAMES)),
}
PAIRS = [pair for pair in itertools.combinations(NAMES, 2) if not clash(methods.load(pair[0]), methods.load(pair[1]))]


def groups(pairs: list[tuple[str, str]], size: int) -> list[tuple[str, ...]]:
    """Groups of at most `size` methods that do not clash, until every pair stands in one; greedy."""
    composable, left, found = set(pairs), dict.fromkeys(pairs), []
    while left:
        group = list(next(iter(left)))
        while len(group) < size:
            gain = {
                name: sum(pair(name, other) in left for other in group)
                for name in NAMES
                if name not in group and all(pair(name, other) in composable for other in group)
            }
            best = max(gain, key=gain.__getitem__, default=None)
            if best is None or not gain[best]:
                break
            group.append(best)
        for done in itertools.combinations(sorted(group), 2):
            left.pop(done, None)
        found.append(tuple(sorted(group)))
    return found


def pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


GROUPS = groups(PAIRS, 6)


@pytest.fixture(params=NAMES)
def method(request) -> type[Method]:
    return methods.load(request.param)


@pytest.fixture(params=TEAMS)
def team(request):
    return TEAMS[request.param]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return merged(train([], tmp_path_factory.mktemp("baseline")).model)


# -- training ----------------------------------------------------------------------------------------------
def test_off_is_plain_training_bit_for_bit(method, baseline, tmp_path):
    off = method(**method.off)
    assert not off.active
    assert same_bits(stored(train([off], tmp_path).model), baseline)


def test_default_settings_change_the_weights(method, baseline, tmp_path):
    # old rows that the new ones work against: where nothing clashes, some methods rightly do nothing
    after = merged(train([method()], tmp_path, old=other_rows()).model)
    grown = after.keys() != baseline.keys()  # what a method adds for good was found to learn, or it has no gradient
    assert (grown or distance(after, baseline) > 1e-6) == method().active


def test_result_does_not_depend_on_accumulation(team, tmp_path):
    def run(folder, batch, accumulate):
        model = tiny_model(tiny_tokenizer()).double()
        # the host's head works in float32 inside; a usual epsilon would let Adam blow its rounding up
        settings = {"batch": batch, "gradient_accumulation_steps": accumulate, "adam_epsilon": 1e-4}
        made = train(team(), tmp_path / folder, model, **settings)
        return made, merged(made.model)

    whole, together_ = run("whole", 8, 1)
    split, apart = run("split", 2, 4)
    tokens = [sum(micro["tokens"]) for micro in split.seen[:4]]
    assert len(set(tokens)) > 1, "the micro-batches must differ in supervised tokens, or nothing is tested"
    # a GPU's head adds its float32 products in an order that depends on the number of rows
    assert distance(together_, apart) < (1e-6 if ON_GPU else 2e-7)
    assert [t for micro in whole.seen for t in micro["tokens"]] == [t for micro in split.seen for t in micro["tokens"]]
    assert len(split.seen) > 3 * len(whole.seen)


def test_killed_and_resumed_equals_uninterrupted(team, tmp_path):
    saving = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    straight = train(team(), tmp_path / "straight", **saving)
    with pytest.raises(Killed):
        train(team(), tmp_path / "killed", callbacks=[StopAt(5)], **saving)
    again = trainer(team(), tmp_path / "killed", **saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert again.seen == straight.seen[-2:], "not the same rows in the same order"
    assert same_bits(stored(again.model), stored(straight.model))


@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_every_two_methods_compose(names, tmp_path):
    """In groups, which take a seventh of the time of pairs; `--every-pair` runs those, one by one."""
    composes(names, tmp_path)


def test_the_groups_hold_every_pair():
    held = {pair for names in GROUPS for pair in itertools.combinations(names, 2)}
    assert held == set(PAIRS)


@pytest.mark.every_pair
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_every_pair_composes(names, tmp_path):
    composes(names, tmp_path)


@pytest.mark.every_pair
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_the_order_of_a_pair_does_not_matter(names, tmp_path):
    """Over three steps of Adam, up to what the head rounds in float32."""

    def end(listed: Sequence[str], folder: str) -> dict[str, torch.Tensor]:
        model = tiny_model(tiny_tokenizer()).double()
        made = train([methods.load(name)() for name in listed], tmp_path / folder, model, steps=3, adam_epsilon=1e-4)
        return merged(made.model)

    assert distance(end(names, "one"), end(names[::-1], "other")) < 1e-6


def composes(names: Sequence[str], folder: Path) -> None:
    made = train([methods.load(name)() for name in names], folder, steps=2)
    assert finite(made.model)
    assert made.state.global_step == 2


def test_what_learns_from_its_own_answers_takes_no_method_that_reads_given_ones(method):
    """And the other way round: those that it takes are those which act on weights alone."""
    reads = method.reads_answers() or methods.load(method.name)().repeats_batches
    for name in NAMES:
        writer = methods.load(name)
        if writer.on_policy and writer is not method:
            assert clash(writer, method) == bool(reads or method.on_policy)
            assert len(writer.on_policy) > 20, "say why"


def test_methods_that_clash_say_so(tmp_path):
    clashing = [pair for pair in itertools.combinations(NAMES, 2) if pair not in PAIRS]
    for first, second in clashing:
        with pytest.raises(ConfigError, match="cannot be combined") as caught:
            Stack([methods.load(first)(), methods.load(second)()])
        assert "\n" not in str(caught.value)
        reason = str(caught.value).partition("(")[2].partition(")")[0]
        assert len(reason.split()) > 5, f"say why {first} and {second} cannot be combined"


@pytest.mark.parametrize("weights", ["autocast", "bfloat16"])
def test_stays_finite_in_bfloat16(team, weights, tmp_path):
    model = tiny_model(tiny_tokenizer())
    if weights == "bfloat16":
        model = model.to(torch.bfloat16)
    before = stored(model)
    made = train(team(), tmp_path, model, bf16=weights == "autocast")
    assert finite(made.model)
    assert not same_bits(merged(made.model), before)


def hooks(module: torch.nn.Module) -> set:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return {hook for kind in kinds for hook in kind.values()}


def test_leaves_nothing_behind(team, tmp_path):
    made = trainer(team(), tmp_path)
    before = {name: (p.requires_grad, p.dtype, p.device) for name, p in made.model.named_parameters()}
    hooks_before = {name: hooks(module) for name, module in made.model.named_modules()}
    made.train()
    made.release()
    assert {name: (p.requires_grad, p.dtype, p.device) for name, p in made.model.named_parameters()} == before
    for name, module in made.model.named_modules():
        assert hooks(module) <= hooks_before[name], f"{name} keeps a hook"
        assert "forward" not in vars(module), f"{name} keeps a patched forward"
        assert not getattr(module, "_disable_adapters", False), f"{name} keeps its adapter off"
    for name, p in made.model.named_parameters():
        assert not p._backward_hooks, f"{name} keeps a hook"
        assert not p._post_accumulate_grad_hooks, f"{name} keeps a hook"


def test_logs_each_of_its_terms(team, tmp_path):
    """A term that acts but is not in the log cannot be found when a run goes wrong."""
    made = train(team(), tmp_path)
    for active in made.stack.methods:
        speaks = type(active).batch_loss is not Method.batch_loss or type(active).edits_gradients
        assert any(f"loss/{active.name}" in line for line in made.state.log_history) == speaks


# -- settings ----------------------------------------------------------------------------------------------
def needy(method: type[Method]) -> list[Method]:
    """The method with default settings and with every choice of every setting, where something is needed."""
    found = [method()]
    for name, field in method.Config.model_fields.items():
        if typing.get_origin(field.annotation) is typing.Literal:
            for choice in typing.get_args(field.annotation):
                with contextlib.suppress(ConfigError):  # a choice that goes only with another setting
                    found.append(method(**{name: choice}))
    return [m for m in found if m.needs]


def test_unmet_needs_are_one_line(tmp_path):
    found = [m for name in NAMES for m in needy(methods.load(name))]
    assert found, "no method needs anything: this test and `needs` can go"
    for m in found:
        with pytest.raises(ConfigError, match=rf"^methods\.{m.name}: needs '") as caught:
            trainer([m], tmp_path, old=None)
        assert "\n" not in str(caught.value)
        Stack([m]).check_needs(m.needs)


def test_unknown_setting_gets_a_suggestion(method):
    setting = max(method.Config.model_fields, key=len, default="strength")
    hint = rf" Did you mean '{setting}'\?" if method.Config.model_fields else ""
    with pytest.raises(ConfigError, match=rf"methods\.{method.name}: unknown '{setting}x'\.{hint}") as caught:
        method(**{setting + "x": 1})
    assert "\n" not in str(caught.value)


def test_nothing_that_turns_it_off_may_be_negative(method):
    """A bound is easily lost when a setting is declared anew for another default."""
    for name, value in method.off.items():
        if type(value) is not float:
            continue
        with pytest.raises(ConfigError, match=rf"^methods\.{method.name}\.{name}\b") as caught:
            method(**{name: -1.0})
        assert "\n" not in str(caught.value)


def test_every_setting_is_documented_and_frozen(method):
    for name, field in method.Config.model_fields.items():
        assert field.description, f"{method.name}.{name} has no text under it"
        with pytest.raises(ValueError, match="frozen"):
            setattr(method().config, name, 1)


# -- the file ----------------------------------------------------------------------------------------------
def test_file_is_short_and_holds_one_method(method):
    path = SOURCES / f"{method.name}.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    classes = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)]
    assert sum(any(getattr(b, "id", "") == "Method" for b in c.bases) for c in classes) == 1
    assert method.name == path.stem
    assert method.family
    assert getattr(retain, method.__name__) is method


def test_docstring_says_everything(method):
    about = methods.summaries()[method.name]
    doc = about["doc"]
    title, _, rest = doc.partition("\n\n")
    assert re.match(r"^[\w -]+ — .+\.$", title, re.S), "begin with: Name — one sentence."
    formula = rest.split("\n\n")[0]
    assert formula.startswith("    "), "the formula is an indented line after the sentence"
    for part in ("Deviations from the paper:", "Needs:", "Cost:", "Combine with:", "Conflicts:", "Tune:"):
        assert doc.count(part) == 1, f"'{part}' is missing"
        assert re.search(re.escape(part) + r"\s*[`\w]", doc), f"'{part}' is empty"
    if method.paper != "none":
        number = re.match(r"arXiv:(\d{4}\.\d{5})", method.paper)
        assert number, "`paper` is 'arXiv:…'"
        assert number[0] in doc
        symbols = doc[doc.index(formula) + len(formula) : doc.index("Deviations")]
        shown = set(re.findall(r"[^\W\d_]+[⁰*]?", formula))
        assert any(s in shown for s in re.findall(r"[^\W\d_]+[⁰*]?", symbols)), "say what the symbols stand for"


def test_docstring_names_the_conflicts(method):
    doc = methods.summaries()[method.name]["doc"]
    said = re.split(r"\n(?=\S)", doc.split("Conflicts:")[1])[0]
    clashing = {name for name in NAMES if clash(method, methods.load(name))}
    # what clashes with every method that reads given answers says that, and each of those need not name it
    named = {name for name in clashing if not method.on_policy and not methods.load(name).on_policy}
    assert {word for word in re.findall(r"\w+", said) if word in NAMES} - {"none"} == named
    assert ("every method that works on the supervised tokens" in said) == bool(method.on_policy)
    advised = re.split(r"Conflicts:|\n(?=\S)", doc.split("Combine with:")[1])[0]
    assert not clashing & set(re.findall(r"\w+", advised)), "advises a combination that is refused"


def test_has_an_example(method):
    path = ROOT / "examples" / f"{method.name}.yaml"
    config = read(path)
    assert method.name in [m.name for m in methods.build(config.methods)]


def test_has_a_page(method):
    assert (ROOT / "docs" / "methods" / f"{method.name}.md").is_file()


def test_old_rows_are_not_needed_by_default(method):
    assert not method().needs, "defaults must work with nothing but a model and its rows"


def test_training_rows_of_the_kit_differ():
    assert len({len(row["completion"][0]["content"]) for row in rows(16)}) > 3
