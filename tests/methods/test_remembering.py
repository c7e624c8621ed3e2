"""What ewc, mas and si share: one importance over all tasks, its file, and where else it may come from."""

import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_kit import Killed, StopAt, distance, rows, same_bits, stored, train, trainer

from retain.errors import ConfigError
from retain.methods import load
from retain.methods.base import Stack
from retain.methods.blocks import Blocks
from retain.methods.bottleneck import Bottleneck
from retain.methods.context import Run
from retain.methods.ewc import EWC
from retain.methods.lora import LoRA
from retain.methods.mas import MAS
from retain.methods.si import SI
from retain.models import importance, importance_cache, params
from retain.models.importance import Importance

FEW = {"ewc": {"samples": 4}, "mas": {"samples": 4}, "si": {}}
ESTIMATING = ["ewc", "mas"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=list(FEW))
def name(request):
    return request.param


def make(name, **settings):
    return load(name)(**(FEW[name] | settings))


def in_run(folder, index=1, offset=None, say=lambda line: None):
    """A task of a run that has its own directory."""
    new = rows(6, index if offset is None else offset)
    return Run(folder / "tasks" / str(index), task=f"t{index}", task_index=index, shared=folder, new_rows=new, say=say)


def once(method, folder, model=None, index=1, offset=None, before=(), say=lambda line: None, **settings):
    run = in_run(folder, index, offset, say)
    settings = {"train_rows": run.new_rows, "steps": 2} | settings
    made = train([*before, method], folder / "tasks" / str(index), model, run=run, **settings)
    made.release()
    return made


def drawn(number, name, shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{number} {name}".encode())))


def fixed(monkeypatch, name, number):
    """Makes the importance of rows (of a task where there are none) a random one that depends on `number` only."""

    def instead(self, model, run, data=None):
        which = number(run, run.new_rows if data is None else data)
        return {n: drawn(which, n, p.shape) for n, p in params.trainable(model).items()}

    monkeypatch.setattr(load(name), "importance", instead)


# -- one importance over all tasks -------------------------------------------------------------------------
def final_file(name, folder, order, decay, **settings):
    model = None
    for index, task in enumerate(order, 1):
        model = once(make(name, decay=decay, **settings), folder, model, index, offset=task, steps=1).model
    return load_file(folder / name / f"{len(order) + 1:02d}.safetensors")


def test_without_decay_the_order_of_tasks_does_not_matter(name, tmp_path, monkeypatch):
    orders = {"a": [3, 4], "b": [4, 3]}
    fixed(monkeypatch, name, lambda run, data: data[0]["completion"][0]["content"])
    ends = {}
    for decay in (1.0, 0.5):
        found = [final_file(name, tmp_path / f"{key}{decay}", order, decay) for key, order in orders.items()]
        ends[decay] = distance(*found)
    assert ends[1.0] < 1e-6
    assert ends[0.5] > 1e-2


def test_a_decay_of_zero_keeps_the_last_task_only(name, tmp_path, monkeypatch):
    fixed(monkeypatch, name, lambda run, data: run.task_index)
    found = final_file(name, tmp_path, [3, 4, 5], 0.0)
    assert found
    for n, tensor in found.items():
        torch.testing.assert_close(tensor, drawn(3, n, tensor.shape))


def test_what_is_kept_does_not_grow_with_the_tasks(name, tmp_path):
    model, sizes = None, []
    for index in (1, 2, 3):
        made = once(make(name, decay=0.9), tmp_path, model, index)
        model = made.model
        method = made.stack.methods[0]
        held = [method._importance, dict(enumerate(method.pull._anchors)), method.state_dict()]
        file = load_file(tmp_path / name / f"{index + 1:02d}.safetensors")
        sizes.append([sum(t.numel() for t in part.values()) for part in [*held, file]])
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0][0] > 0


def test_decay_weighs_what_was_before(name, tmp_path):
    first = once(make(name, decay=0.5), tmp_path)
    old, total = first.stack.methods[0]._importance, load_file(tmp_path / name / "02.safetensors")
    method = first.stack.methods[0]
    again = [rows(6, 1)] if name != "si" else []
    with params.evaluating(first.model):
        new = method.importance(first.model, first.run, *again)
    assert distance(total, {n: 0.5 * old[n] + new[n] for n in old}) < 1e-3
    assert distance(total, {n: old[n] + new[n] for n in old}) > 1e-2


def test_one_task_is_the_plain_method_whatever_the_decay(name, tmp_path):
    one, other = (stored(once(make(name, decay=d), tmp_path / str(d)).model) for d in (0.3, 1.0))
    assert same_bits(one, other)


# -- its file ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [False, True])
def test_the_header_says_what_it_is(name, lora, tmp_path):
    made = once(make(name), tmp_path, before=[LoRA(r=2)] if lora else [])
    for index in (1, 2):
        path = tmp_path / name / f"{index:02d}.safetensors"
        if name == "si" and index == 1:
            assert not path.exists(), "an even prior needs no file"
            continue
        about = importance.header(path)
        assert about["method"] == name
        assert about["units"] == "normalised"
        assert about["estimator"] == {"ewc": "rank1" if lora else "sampled", "mas": "sensitivity", "si": "path"}[name]
        assert about["tasks"] == index - 1
        if name != "si":
            assert about["rows"] == 4
            assert about["means"].keys() == {"adapted" if lora else "dense"}
            assert min(about["means"].values()) > 0
        with safe_open(path, "pt") as file:
            assert set(file.keys()) >= set(made.stack.methods[-1]._importance)


@pytest.mark.parametrize("name", ESTIMATING, indirect=False)
def test_raw_units_are_the_mean_times_normalised_ones(name, tmp_path):
    raw, scaled = (once(make(name, units=u), tmp_path / u).stack.methods[0] for u in ("raw", "normalised"))
    mean = importance.header(tmp_path / "normalised" / name / "01.safetensors")["means"]["dense"]
    for n, f in scaled._importance.items():
        torch.testing.assert_close(raw._importance[n], f * mean, rtol=1e-4, atol=1e-12)
    assert importance.header(tmp_path / "raw" / name / "01.safetensors")["means"]["dense"] == pytest.approx(mean)
    # so a strength of papers divided by nothing is the strength in normalised units divided by the mean
    held, same = (
        stored(once(make(name, units=u, strength=s), tmp_path / f"{u}{s}", **EXACT).model)
        for u, s in (("raw", 2.0 / mean), ("normalised", 2.0))
    )
    assert distance(held, same) < 1e-4
    assert distance(held, stored(once(make(name, strength=1e-9), tmp_path / "free", **EXACT).model)) > 1e-3


@pytest.mark.parametrize("name", ESTIMATING, indirect=False)
def test_ordinary_and_adapted_weights_are_on_one_scale(name, tmp_path, model):
    """Norms that learn beside an adapter matter as much more or less than its layers as they do in the whole model."""
    made, few = trainer([LoRA(r=2)], tmp_path, model.double()), rows(4)
    for kind, parameter in params.causal(made.model).named_parameters():
        parameter.requires_grad_(kind.endswith("norm.weight") or parameter.requires_grad)
    raw, scaled = (make(name, units=u).importance(made.model, made.run, few) for u in ("raw", "normalised"))
    dense, pairs = params.outside_lora(made.model), params.lora_pairs(made.model)
    assert dense
    assert pairs
    ratios = {n: float(scaled[n].sum() / raw[n].sum()) for n in raw}
    assert max(ratios.values()) == pytest.approx(min(ratios.values()), rel=1e-4)
    total = sum(float(scaled[n].sum()) for n in [*dense, *(f"{pair}.rows" for pair in pairs)])
    assert total == pytest.approx(
        sum(p.numel() for p in [*dense.values(), *(q.base for q in pairs.values())]), rel=1e-4
    )
    # the same where every weight learns by itself
    for pair in pairs.values():
        pair.A.requires_grad_(False)
        pair.B.requires_grad_(False)
        pair.base.requires_grad_(True)
    plain = make(name, units="raw").importance(made.model, made.run, few)
    for n in dense:
        torch.testing.assert_close(plain[n], raw[n])
    for pair in pairs:
        torch.testing.assert_close(plain[f"{pair}.base_layer.weight"].sum(1), raw[f"{pair}.rows"])


EXACT = {"steps": 6, "adam_epsilon": 1e-3}


@pytest.mark.parametrize("name", ESTIMATING, indirect=False)
def test_after_two_tasks_raw_units_have_the_mean_of_a_raw_run(name, tmp_path):
    files = {}
    for units in ("raw", "normalised"):
        model = None
        for index in (1, 2):  # the pull does nothing, so that both runs end at the same weights
            made = once(make(name, units=units, strength=1e-12), tmp_path / units, model, index)
            model = made.model
        files[units] = importance.read(tmp_path / units / name / "03.safetensors")
    own = {units: mean(file.tensors) for units, file in files.items()}
    assert own["normalised"] == pytest.approx(3.0, rel=1e-4)
    found = importance.in_units(importance.fitting(files["normalised"], model, "here"), model, "raw", "here")
    assert mean(found.tensors) == pytest.approx(own["raw"], rel=1e-3)
    assert found.about["means"]["dense"] == pytest.approx(own["raw"], rel=1e-3)
    assert files["normalised"].about["held"]["dense"] == pytest.approx(own["normalised"])


def mean(tensors):
    return sum(float(t.double().sum()) for t in tensors.values()) / sum(t.numel() for t in tensors.values())


# -- later tasks that train other weights ------------------------------------------------------------------
def test_weights_that_are_new_in_a_task_are_held_too(name, tmp_path):
    before = [Bottleneck(reduction=4)]
    first, said = once(make(name), tmp_path, before=before), []
    second = once(make(name), tmp_path, first.model, 2, before=[Bottleneck(reduction=4)], say=said.append)
    method = second.stack.methods[-1]
    wanted = importance.shapes(second.model)
    assert method.pull.protected == sum(p.numel() for p in params.trainable(second.model).values())
    assert wanted.keys() <= load_file(tmp_path / name / "02.safetensors").keys(), "a resumed run finds it"
    assert wanted.keys() <= load_file(tmp_path / name / "03.safetensors").keys()
    (line,) = [line for line in said if "were not trained before" in line]
    assert line.startswith(f"{name}: {len(wanted)} of {len(wanted)} tensors")


def test_what_was_known_is_kept_beside_what_is_new(name, tmp_path):
    first = once(make(name), tmp_path, before=[LoRA(r=2, targets=["q_proj"])])
    old = load_file(tmp_path / name / "02.safetensors")
    model = first.model.merge_and_unload() if hasattr(first.model, "merge_and_unload") else first.model
    second = once(make(name), tmp_path, model, 2, before=[LoRA(r=2, targets=["q_proj", "v_proj"])])
    method = second.stack.methods[-1]
    held = method._importance
    assert held.keys() == importance.shapes(second.model).keys()
    assert old.keys() < held.keys()
    assert same_bits({n: held[n] for n in old}, old)
    new = {n: t for n, t in held.items() if n not in old}
    assert all("v_proj" in n and bool(t.any()) for n, t in new.items())
    if name == "si":
        even = importance.even(second.model, 1.0)
        assert same_bits(new, {n: even[n] for n in new})
    assert len(method.pull.pairs) == len(params.lora_pairs(second.model))


def test_where_layers_were_added_all_is_taken_anew(name, tmp_path):
    first, said = once(make(name), tmp_path, before=[Blocks(count=1)]), []
    old = load_file(tmp_path / name / "02.safetensors")
    second = once(make(name), tmp_path, first.model, 2, before=[Blocks(count=1)], say=said.append)
    held = second.stack.methods[-1]._importance
    assert held.keys() == importance.shapes(second.model).keys()
    assert not same_bits(held, old)
    now = len(params.decoder_layers(second.model))
    assert any(f"has {now} decoder layers, before {now - 1};" in line for line in said)
    again = importance.read(tmp_path / name / "02.safetensors")
    assert again.about["layers"] == now
    assert same_bits(again.tensors, held)


# -- from elsewhere ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("other", ["ewc", "mas"])
@pytest.mark.parametrize("whole", [False, True])
def test_another_run_lends_its_importance(name, other, whole, tmp_path):
    lender = once(make(other), tmp_path / "lender")
    wanted = lender.stack.methods[0]._importance
    place = tmp_path / "lender" if whole else tmp_path / "lender" / other / "01.safetensors"
    said = []
    taken = once(make(name, importance=str(place)), tmp_path / "taker", say=said.append, old=None)
    assert same_bits(taken.stack.methods[0]._importance, wanted)
    assert any(f"{name}: importance of weights from" in line and other in line for line in said)
    held = load_file(tmp_path / "taker" / name / "01.safetensors")
    assert same_bits(held, wanted), "the run can go on without the lender"


def test_a_resumed_run_needs_the_lender_no_more(tmp_path):
    once(make("mas"), tmp_path / "lender")
    settings = {"steps": 6, "save_strategy": "steps", "save_steps": 2}
    made = []
    for place, callbacks in (("a", []), ("b", [StopAt(5)])):
        run = in_run(tmp_path / place)
        made.append(
            trainer([SI(importance=str(tmp_path / "lender"))], run.directory, run=run, callbacks=callbacks, **settings)
        )
    made[0].train()
    with pytest.raises(Killed):
        made[1].train()
    (tmp_path / "lender" / "mas" / "01.safetensors").unlink()
    run = in_run(tmp_path / "b")
    again = trainer([SI(importance=str(tmp_path / "lender"))], run.directory, run=run, **settings)
    again.train(resume_from_checkpoint=True)
    assert same_bits(stored(again.model), stored(made[0].model))


def test_an_importance_of_whole_weights_serves_adapters(tmp_path):
    lender = once(EWC(samples=4), tmp_path / "lender")
    whole = lender.stack.methods[0]._importance
    taken = once(EWC(importance=str(tmp_path / "lender")), tmp_path / "taker", before=[LoRA(r=2)], old=None)
    for n in params.lora_pairs(taken.model):
        torch.testing.assert_close(taken.stack.methods[1]._importance[f"{n}.rows"], whole[f"{n}.weight"].sum(1))


def test_what_does_not_fit_is_one_line(name, tmp_path, model):
    once(EWC(samples=4), tmp_path / "lender", train_rows=rows(4))
    file = tmp_path / "lender" / "ewc" / "01.safetensors"
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(ConfigError, match=rf"^methods\.{name}\.importance: .*of other weights") as caught:
        once(make(name, importance=str(file.parents[1])), tmp_path / "b", model)
    assert "\n" not in str(caught.value)
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    importance.save(importance.Importance(tensors), tmp_path / "less.safetensors")
    with pytest.raises(ConfigError, match=rf"^methods\.{name}\.importance: nothing about 'model\.norm\.weight'"):
        once(make(name, importance=str(tmp_path / "less.safetensors")), tmp_path / "c", model)
    with pytest.raises(ConfigError, match=rf"^methods\.{name}\.importance: 'nowhere' is not there"):
        Stack([make(name, importance="nowhere")]).check_needs(frozenset())


def test_settings_without_effect_are_errors(tmp_path):
    (tmp_path / "x").mkdir()
    place = str(tmp_path / "x")
    for method, text in (
        (SI(importance=place, prior=2.0), r"^methods\.si\.prior: has no effect with `importance`"),
        (EWC(fallback="sampled"), r"^methods\.ewc\.fallback: has no effect"),
        (EWC(estimator="adam", fallback="sampled", importance=place), r"^methods\.ewc\.fallback: has no effect"),
        (EWC(top_k=3), r"^methods\.ewc\.top_k: has no effect"),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            Stack([method]).check_needs(frozenset())
        assert "\n" not in str(caught.value)


# -- found again -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ESTIMATING, indirect=False)
def test_the_same_model_rows_and_settings_are_not_estimated_twice(name, tmp_path, monkeypatch):
    calls = []
    method = load(name)
    original = method.importance
    monkeypatch.setattr(method, "importance", lambda self, *rest: calls.append(1) or original(self, *rest))

    def again(place, **settings):
        before, said = len(calls), []
        pull = {"strength": 3.0, "form": "proximal", "by_layer": True} if place == "b" else {}
        made = once(make(name, **pull, **settings), tmp_path / place, say=said.append, steps=1)
        reused = any("taken from" in line for line in said)
        assert len(calls) - before == (1 if reused else 2), "one estimate is that of the task's own rows"
        return reused, made.stack.methods[0]._importance

    first, second = again("a"), again("b")
    assert (first[0], second[0]) == (False, True)
    assert same_bits(first[1], second[1])
    assert not again("c", samples=3)[0]
    assert not again("d", units="raw")[0]
    (tmp_path / "a" / name / "01.safetensors").unlink()
    assert again("e")[0], "the second run holds it too"
    for place in "be":
        (tmp_path / place / name / "01.safetensors").unlink()
    assert not again("f")[0]


@pytest.mark.parametrize("name", ESTIMATING, indirect=False)
@pytest.mark.parametrize("changed", ["units", "names"])
def test_an_importance_that_was_altered_is_not_found_again(name, changed, tmp_path):
    wanted = once(make(name), tmp_path / "a").stack.methods[0]._importance
    file = tmp_path / "a" / name / "01.safetensors"
    other, before = ({"units": "raw"}, []) if changed == "units" else ({}, [LoRA(r=2)])
    once(make(name, importance=str(file), **other), tmp_path / "b", before=before, old=None)
    assert "key" not in importance.header(tmp_path / "b" / name / "01.safetensors")
    assert same_bits(once(make(name), tmp_path / "c").stack.methods[0]._importance, wanted)


@pytest.mark.parametrize("name", ESTIMATING, indirect=False)
def test_a_cached_file_of_other_names_or_units_is_not_taken(name, tmp_path):
    wanted = once(make(name), tmp_path / "a").stack.methods[0]._importance
    file = tmp_path / "a" / name / "01.safetensors"
    whole = importance.read(file)
    less = dict(list(whole.tensors.items())[1:])
    for number, bad in enumerate((Importance(less, whole.about), Importance(less | whole.tensors, whole.about))):
        if number:
            bad = Importance({n: 2 * t for n, t in bad.tensors.items()}, whole.about | {"units": "raw"})
        importance.save(bad, file)
        importance_cache.remember(whole.about["key"], file)
        assert same_bits(once(make(name), tmp_path / f"b{number}").stack.methods[0]._importance, wanted)


# -- of which weights --------------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [False, True])
def test_weights_are_hashed_only_where_a_later_run_can_begin_with_them(name, lora, tmp_path, monkeypatch):
    calls = []
    original = importance_cache.fingerprint
    monkeypatch.setattr(importance_cache, "fingerprint", lambda model: calls.append(1) or original(model))
    once(make(name), tmp_path, before=[LoRA(r=2)] if lora else [])
    about = importance.header(tmp_path / name / "02.safetensors")
    assert bool(about.get("weights")) == (name != "si" and not lora)
    assert len(calls) == (name != "si") + bool(about.get("weights"))


def test_runs_with_it_and_without_it_are_the_same_bits(tmp_path):
    one, other = (stored(once(EWC(samples=4), tmp_path / place).model) for place in "ab")
    assert same_bits(one, other)
    assert len(list((importance_cache.cache_directory() / "importance").iterdir())) == 1


# -- from Adam ---------------------------------------------------------------------------------------------
def adam(**settings):
    return EWC(estimator="adam", samples=4, **settings)


def test_adam_before_the_first_task_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^methods\.ewc\.estimator: 'adam'.*fallback: sampled.*importance:"
    ) as caught:
        train([adam()], tmp_path)
    assert "\n" not in str(caught.value)


def test_adam_takes_the_second_moment_when_a_task_ended(tmp_path):
    made = once(adam(fallback="sampled", decay=0.0), tmp_path)
    wanted = {n: made._moments(p)["exp_avg_sq"].clone() for n, p in params.trainable(made.model).items()}
    whole = sum(float(t.double().sum()) for t in wanted.values()) / sum(t.numel() for t in wanted.values())
    found = load_file(tmp_path / "ewc" / "02.safetensors")
    for n in wanted:
        torch.testing.assert_close(found[n], wanted[n] / whole, rtol=1e-4, atol=1e-7)
    about = importance.header(tmp_path / "ewc" / "02.safetensors")
    assert (about["estimator"], about["rows"]) == ("adam", 0)
    sampled = once(EWC(samples=4), tmp_path / "plain")
    assert same_bits(made.stack.methods[0]._importance, sampled.stack.methods[0]._importance)


def test_adam_from_the_optimizer_of_a_checkpoint(tmp_path):
    before = train([], tmp_path / "before", save_strategy="steps", save_steps=4)
    wanted = {n: before._moments(p)["exp_avg_sq"] for n, p in params.trainable(before.model).items()}
    whole = sum(float(t.double().sum()) for t in wanted.values()) / sum(t.numel() for t in wanted.values())
    before.release()
    file = str(tmp_path / "before" / "checkpoint-4" / "optimizer.pt")
    made = once(adam(importance=file), tmp_path / "run", before.model, old=None)
    for n, f in made.stack.methods[0]._importance.items():
        torch.testing.assert_close(f, wanted[n] / whole, rtol=1e-4, atol=1e-7)


def test_adam_where_there_is_no_second_moment_of_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"methods\.ewc\.estimator: 'adam' has no effect with LoRA"):
        train([LoRA(r=2), adam(fallback="sampled")], tmp_path / "a")
    with pytest.raises(ConfigError, match=r"methods\.ewc\.estimator: 'adam' with `optim: .*adamw_torch") as caught:
        train([adam(fallback="sampled")], tmp_path / "b", optim="sgd")
    assert "\n" not in str(caught.value)


def test_adam_knows_nothing_of_weights_that_are_new_in_a_task(tmp_path):
    once(EWC(samples=4), tmp_path / "lender")
    file = str(tmp_path / "lender" / "ewc" / "01.safetensors")
    first = once(adam(importance=file), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^methods\.ewc\.estimator: 'adam' knows nothing .*sampled") as caught:
        once(adam(importance=file), tmp_path / "run", first.model, 2, before=[Bottleneck()])
    assert "\n" not in str(caught.value)


def test_methods_side_by_side_keep_their_own_files(tmp_path):
    run = in_run(tmp_path)
    train([EWC(samples=4), MAS(samples=4), SI()], run.directory, run=run, steps=1)
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.glob("*/*.safetensors")} >= {
        "ewc/01.safetensors", "ewc/02.safetensors", "mas/01.safetensors", "mas/02.safetensors", "si/02.safetensors"
    }  # fmt: skip
