"""Files of importances: what is written is read, what does not fit is one line, units and sums are right."""

import pytest
import torch
from families import family_model
from safetensors.torch import save_file

from retain.errors import ConfigError, RunError
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import importance, params
from retain.models.importance import Importance
from retain.models.pull import product_keys


def drawn(model, seed=0):
    torch.manual_seed(seed)
    return {name: torch.rand_like(p) for name, p in params.trainable(model).items()}


def adapted(kind="llama"):
    return LoRA(r=2).prepare_model(family_model(kind), Run(directory=None, say=lambda line: None))


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "deep" / "01.safetensors"
    about = {"method": "ewc", "rows": 3, "means": {"dense": 1e-9}}
    made = Importance({"a": torch.rand(3, 2), "b": torch.rand(4).double()}, about)
    importance.save(made, path)
    found = importance.read(path)
    held = pytest.approx(sum(float(t.sum()) for t in made.tensors.values()) / 10)
    assert found.about == importance.header(path) == about | {"held": {"dense": held}}
    assert all(torch.equal(found.tensors[n], t) for n, t in made.tensors.items())
    assert not list(tmp_path.rglob("*.part"))
    assert importance.load(path, wanted=False) is None
    assert importance.load(tmp_path / "other", wanted=True) is None


def test_a_file_of_another_program_has_no_header(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert importance.header(tmp_path / "a.safetensors") == importance.read(tmp_path / "a.safetensors").about == {}
    (tmp_path / "b.safetensors").write_text("no tensors")
    assert importance.header(tmp_path / "b.safetensors") == {}
    with pytest.raises(RunError, match="no importance can be read") as caught:
        importance.read(tmp_path / "b.safetensors")
    assert "\n" not in str(caught.value)


def test_sums_do_not_depend_on_the_order_of_tasks_and_zero_keeps_the_last():
    torch.manual_seed(0)
    tasks = [{"w": torch.rand(4, 3).double()} for _ in range(3)]

    def folded(order, decay):
        total = {"w": torch.zeros(4, 3).double()}
        for i in order:
            total = importance.added(total, tasks[i], decay)
        return total["w"]

    torch.testing.assert_close(folded([0, 1, 2], 1.0), folded([2, 0, 1], 1.0), rtol=1e-14, atol=0)
    assert not torch.allclose(folded([0, 1, 2], 0.9), folded([2, 0, 1], 0.9))
    assert torch.equal(folded([0, 1, 2], 0.0), tasks[2]["w"])
    wanted = 0.81 * tasks[0]["w"] + 0.9 * tasks[1]["w"] + tasks[2]["w"]
    torch.testing.assert_close(folded([0, 1, 2], 0.9), wanted, rtol=1e-14, atol=0)


def test_what_only_one_side_knows_is_kept():
    one, other = {"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.ones(1), "c": torch.ones(1)}
    assert importance.added(one, other, 0.5) == {"a": 0.5, "b": 1.5, "c": 1.0}


def test_what_is_not_trained_is_left_out_and_what_is_missing_is_one_line():
    model = family_model("llama")
    whole = Importance(drawn(model))
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    assert importance.fitting(whole, model, "here").tensors.keys() == params.trainable(model).keys()
    name = next(iter(params.trainable(model)))
    without = Importance({n: t for n, t in whole.tensors.items() if n != name})
    other = Importance(whole.tensors | {name: torch.ones(2, 2)})
    for bad, text in ((without, rf"nothing about '{name}'.*such as '"), (other, rf"'{name}' has the shape \(2, 2\)")):
        with pytest.raises(ConfigError, match=f"^methods.ewc.importance: {text}") as caught:
            importance.fitting(bad, model, "methods.ewc.importance")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_whole_weight_under_an_adapter_the_sums_are_taken(kind):
    plain, model = family_model(kind), adapted(kind)
    whole = drawn(plain)
    found = importance.fitting(Importance(whole), model, "here").tensors
    for name, pair in params.lora_pairs(model).items():
        f = whole[f"{name}.weight"].T if pair.transposed else whole[f"{name}.weight"]
        rows, columns = (found[key] for key in product_keys(name))
        torch.testing.assert_close(rows, f.sum(1))
        torch.testing.assert_close(columns, f.sum(0))
        assert (rows.shape, columns.shape) == ((pair.B.shape[0],), (pair.A.shape[1],))


@pytest.mark.parametrize("trained", ["dense", "adapted", "both"])
def test_units_there_and_back(trained):
    model = family_model("llama") if trained == "dense" else adapted()
    if trained == "both":
        params.causal(model).model.norm.weight.requires_grad_(True)
    even = importance.even(model, 1.0)
    torch.manual_seed(0)
    raw = Importance({n: 1e-6 * t * torch.rand_like(t) for n, t in even.items()}, {"units": "raw"})
    for name in params.lora_pairs(model):  # sums of one matrix have one total
        rows, columns = product_keys(name)
        raw.tensors[columns] *= raw.tensors[rows].sum() / raw.tensors[columns].sum()
    scaled = importance.in_units(raw, model, "normalised", "here")
    count = sum(p.numel() for p in params.outside_lora(model).values())
    count += sum(pair.B.shape[0] * pair.A.shape[1] for pair in params.lora_pairs(model).values())
    kept = [n for n in scaled.tensors if not n.endswith(".columns")]
    assert sum(float(scaled.tensors[n].double().sum()) for n in kept) == pytest.approx(count, rel=1e-5)
    factors = [float(raw.tensors[n].sum() / scaled.tensors[n].sum()) for n in kept]
    assert max(factors) == pytest.approx(min(factors), rel=1e-4)
    scaled.about["means"] = importance.own_means(raw.tensors)
    again = importance.in_units(scaled, model, "raw", "here")
    for n in raw.tensors:
        torch.testing.assert_close(again.tensors[n], raw.tensors[n], rtol=1e-4, atol=1e-12)
    scaled.about.pop("means")
    with pytest.raises(ConfigError, match=r"here: .*no mean in raw units.*units: normalised"):
        importance.in_units(scaled, model, "raw", "here")


def test_a_part_keeps_its_own_mean_in_raw_units():
    model = family_model("llama")
    raw = drawn(model)
    stored = Importance({n: 3 * t for n, t in raw.items()}, {"key": "k", "means": importance.own_means(raw)})
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    part = importance.fitting(stored, model, "here")
    again = importance.in_units(part, model, "raw", "here")
    assert "key" not in part.about
    for n, t in again.tensors.items():
        torch.testing.assert_close(t, raw[n])
    assert again.about["means"] == pytest.approx(again.about["held"])


def test_of_another_number_of_layers_names_are_of_other_weights():
    model = family_model("llama")
    with pytest.raises(ConfigError, match=r"^here: it is of a model with 99 decoder layers") as caught:
        importance.fitting(Importance(drawn(model), {"layers": 99}), model, "here")
    assert "\n" not in str(caught.value)
