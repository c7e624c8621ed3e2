"""Merging adapters: what the written one does in PEFT, against sums of what the given ones do, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_kit import changes, weights, with_adapter, write_adapter, write_model
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from retain.errors import ConfigError, ModelError
from retain.models.merge import merge


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of several ranks, scalings and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    base = write_model(folder / "base", 0)
    write_adapter(folder / "one", base, 1, 4)
    write_adapter(folder / "two", base, 2, 8, use_rslora=True)
    write_adapter(folder / "other", base, 3, 2, target_modules=["v_proj", "down_proj"])
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}}
    write_adapter(folder / "uneven", base, 4, 4, **patterns)
    write_adapter(folder / "words", base, 5, 4, target_modules=["embed_tokens", "q_proj"])
    return folder


def merged(place: Path, names: str, to: Path, method: str = "linear", **settings):
    return merge([str(place / name) for name in names.split()], to, method, **settings)


def close(place: Path, adapter: Path, expected: dict[str, torch.Tensor]) -> None:
    found = changes(place / "base", adapter)
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=2e-6)


CASES = [
    ("one two", "linear", None, [0.5, 0.5]),
    ("one two", "task", [0.7, -0.3], [0.7, -0.3]),
    ("one other", "task", [1, 1], [1, 1]),
    ("one uneven two", "linear", [1, 2, 1], [0.25, 0.5, 0.25]),
    ("words two", "task", [0.5, 0.5], [0.5, 0.5]),
    ("two", "interpolate", [0.3], [0.3]),
]


@pytest.mark.parametrize(("names", "method", "given", "shares"), CASES)
def test_sums_are_exact_and_ranks_add_up(place, tmp_path, names, method, given, shares):
    done = merged(place, names, tmp_path / "out", method, weights=given)
    parts = [changes(place / "base", place / name) for name in names.split()]
    close(place, tmp_path / "out", {n: sum(s * p[n] for s, p in zip(shares, parts)) for n in parts[0]})
    assert (done.form, done.base, done.kept.share) == ("adapter", str(place / "base"), 1)
    assert done.kept.rank == sum({"one": 4, "two": 8, "other": 2, "uneven": 4, "words": 4}[n] for n in names.split())


def test_averaging_the_factors_would_have_been_something_else(place, tmp_path):
    """The trap that this is kept out of: the mean of A and of B is not the mean of BA."""
    one, other = write_adapter(tmp_path / "1", place / "base", 1), write_adapter(tmp_path / "2", place / "base", 2)
    merge([str(one), str(other)], tmp_path / "out")
    tensors = [load_file(path / "adapter_model.safetensors") for path in (one, other)]
    key = next(key for key in tensors[0] if "lora_A" in key)
    a, b = (sum(t[k] for t in tensors) / 2 for k in (key, key.replace("lora_A", "lora_B")))
    name = key.removeprefix("base_model.model.").replace(".lora_A", "")
    right = changes(place / "base", tmp_path / "out")[name]
    assert float((2 * b @ a - right).norm() / right.norm()) > 0.3


@pytest.mark.parametrize("method", ["linear", "slerp", "task"])
@pytest.mark.parametrize("first", ["one", "two", "uneven"])
def test_weight_one_on_one_adapter_is_that_adapter_bit_for_bit(place, tmp_path, method, first):
    merged(place, f"{first} other", tmp_path / "out", method, weights=[1, 0])
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", place / first))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    given, back = with_adapter(place / "base", place / first), with_adapter(place / "base", tmp_path / "out")
    for name in given:
        torch.testing.assert_close(back[name], given[name], rtol=1e-6, atol=1e-7)


def test_slerp_and_model_stock_take_their_angles_from_the_products(place, tmp_path):
    one, two = changes(place / "base", place / "one"), changes(place / "base", place / "two")
    merged(place, "one two", tmp_path / "slerp", "slerp", weights=[0.25, 0.75])
    merged(place, "one two", tmp_path / "stock", "stock")
    turned, stock = {}, {}
    for name in [name for name in one if bool(one[name].any())]:
        x, y = one[name].flatten(), two[name].flatten()
        cos = x @ y / x.norm() / y.norm()
        angle = torch.acos(cos)
        turned[name] = (torch.sin(0.25 * angle) * one[name] + torch.sin(0.75 * angle) * two[name]) / torch.sin(angle)
        stock[name] = max(0.0, float(2 * cos / (1 + cos))) * (one[name] + two[name]) / 2
    assert len(turned) == 4
    close(place, tmp_path / "slerp", turned)
    close(place, tmp_path / "stock", stock)


def test_a_smaller_rank_is_the_best_one_and_says_what_it_kept(place, tmp_path):
    done = merged(place, "one two", tmp_path / "out", rank=5)
    whole = {
        n: (c + changes(place / "base", place / "two")[n]) / 2
        for n, c in changes(place / "base", place / "one").items()
    }
    found, kept, total = changes(place / "base", tmp_path / "out"), 0.0, 0.0
    for name in [name for name in whole if bool(whole[name].any())]:
        sizes = torch.linalg.svdvals(whole[name])
        assert torch.linalg.matrix_rank(found[name], atol=1e-5) == 5
        torch.testing.assert_close((found[name] - whole[name]).norm(), sizes[5:].norm(), rtol=1e-4, atol=1e-5)
        kept, total = kept + float(sizes[:5].square().sum()), total + float(sizes.square().sum())
    assert done.kept.rank == 5
    assert done.kept.share == pytest.approx(kept / total, rel=1e-4)
    assert 0 < done.kept.least <= done.kept.share < 1


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_dropping_entries_is_done_on_the_matrices(place, tmp_path, method):
    """As a whole model, and as an adapter of full rank, the same; at the ranks' sum what was kept is said."""
    whole = merged(place, "one other", tmp_path / "model", method, density=0.5, seed=3, form="model")
    merged(place, "one other", tmp_path / "full", method, density=0.5, seed=3, rank=64)
    done = merged(place, "one other", tmp_path / "out", method, density=0.5, seed=3)
    before, model = weights(place / "base"), weights(whole.folder)
    expected = {name: model[name].double() - before[name].double() for name in before}
    close(place, tmp_path / "full", expected)
    found = changes(place / "base", tmp_path / "out")
    lost = sum(float((found[n] - expected[n]).square().sum()) for n in found)
    total = sum(float(change.square().sum()) for change in expected.values())
    assert done.kept.share == pytest.approx(1 - lost / total, abs=1e-3)
    assert done.kept.share < 0.99


def test_written_into_the_base_is_the_adapter_put_on(place, tmp_path):
    for method in ("linear", "slerp", "stock"):
        merged(place, "one two", tmp_path / method, method)
        merged(place, "one two", tmp_path / f"{method}-model", method, form="model")
        expected = with_adapter(place / "base", tmp_path / method)
        for name, found in weights(tmp_path / f"{method}-model").items():
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=2e-6)


def test_adapters_that_stand_on_adapters_are_summed(place, tmp_path):
    """One that was trained on a base into which another one was merged: its change comes on top of that one's."""
    upper = write_adapter(tmp_path / "upper", place / "base", 9, 3)
    config = json.loads((upper / "adapter_config.json").read_text())
    (upper / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(place / "one")}))
    done = merge([str(upper), str(place / "two")], tmp_path / "out", "task", [1, 0.5])
    assert (done.base, done.kept.rank) == (str(place / "base"), 4 + 3 + 8)
    one, two = changes(place / "base", place / "one"), changes(place / "base", place / "two")
    own = changes(place / "base", place / "one") | {}
    tensors = load_file(upper / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        own[name] = one[name] + 2 * (tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double())
    close(place, tmp_path / "out", {name: own[name] + 0.5 * two[name] for name in own})


def test_layers_that_keep_their_matrices_the_other_way_round(tmp_path):
    base = write_model(tmp_path / "base", 0, kind="gpt2")
    for seed in (1, 2):
        write_adapter(tmp_path / str(seed), base, seed, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    for form in ("adapter", "model"):
        merge([str(tmp_path / "1"), str(tmp_path / "2")], tmp_path / form, form=form)
    one, two = changes(base, tmp_path / "1"), changes(base, tmp_path / "2")
    expected = {name: (one[name] + two[name]) / 2 for name in one}
    close(tmp_path, tmp_path / "adapter", expected)
    before, after = weights(base), weights(tmp_path / "model")
    for name, change in expected.items():
        torch.testing.assert_close(after[name].double() - before[name].double(), change, rtol=1e-4, atol=2e-6)


def test_the_merged_adapter_generates_in_peft(place, tmp_path):
    merged(place, "one two", tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), tmp_path / "out")
    ids = tiny_tokenizer()("Seven small ships", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "down_proj"}
    assert (config["r"], config["lora_dropout"], config["use_rslora"]) == (12, 0.0, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora makes it more than a product"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa makes it more than a product"),
        ({"peft_type": "IA3"}, "merged are LoRA adapters"),
    ],
)
def test_adapters_that_are_no_plain_product_are_refused(place, tmp_path, change, words):
    odd = write_adapter(tmp_path / "odd", place / "base", 1)
    config = json.loads((odd / "adapter_config.json").read_text())
    if "peft_type" in change:
        config = {"base_model_name_or_path": config["base_model_name_or_path"], "target_modules": ["k_proj"]}
    (odd / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=words):
        merge([str(place / "one"), str(odd)], tmp_path / "out")


def test_other_mistakes_with_adapters(place, tmp_path):
    saved = write_adapter(tmp_path / "saved", place / "base", 1, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"lm_head.* is no part of a product of two matrices"):
        merge([str(place / "one"), str(saved)], tmp_path / "out")
    wide = write_model(tmp_path / "wide", 0, intermediate_size=48)
    strange = write_adapter(tmp_path / "strange", wide, 1)
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(place / "base")}))
    with pytest.raises(ModelError, match=r"down_proj.weight' as \(32, 48\), which is \(32, 64\)"):
        merge([str(place / "one"), str(strange)], tmp_path / "out")
    elsewhere = write_adapter(tmp_path / "elsewhere", write_model(tmp_path / "base2", 7), 1)
    with pytest.raises(ConfigError, match="not all adapters of one base"):
        merge([str(place / "one"), str(elsewhere)], tmp_path / "out", form="adapter")
    with pytest.raises(ConfigError, match="--rank: 0 given"):
        merge([str(place / "one"), str(place / "two")], tmp_path / "out", rank=0)
    with pytest.raises(ConfigError, match="--rank: does nothing for a whole model"):
        merge([str(place / "one"), str(place / "two")], tmp_path / "out", rank=3, form="model")
    with pytest.raises(ModelError, match="no adapter is left"):
        merge([str(place / "one"), str(place / "two")], tmp_path / "out", "task", [0, 0])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter_config.json").write_text((place / "one" / "adapter_config.json").read_text())
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"0" * 30)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: cannot be read"):
        merge([str(place / "one"), str(tmp_path / "cut")], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
