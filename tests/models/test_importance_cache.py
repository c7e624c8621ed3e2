"""An importance is found again where model, rows and settings are the same, and nowhere else."""

import pytest
import torch
from families import family_model

from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import importance, importance_cache, params
from retain.models.importance import Importance
from retain.models.importance_cache import find, fingerprint, given, key, remember


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))


def adapted(seed=0):
    torch.manual_seed(seed)
    return LoRA(r=2).prepare_model(family_model("llama"), Run(directory=None, say=lambda line: None))


def batches(shift=0):
    ids = torch.arange(12).reshape(2, 6) + shift
    return [({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)]


def test_the_fingerprint_is_of_what_the_model_computes_with():
    model = family_model("llama")
    before = fingerprint(model)
    assert before == fingerprint(family_model("llama")) == fingerprint(adapted(0)) == fingerprint(adapted(1))
    for p in model.parameters():
        p.requires_grad_(False)
    assert fingerprint(model) == before
    with torch.no_grad():
        next(model.parameters())[3, 0] += 1e-3
    assert fingerprint(model) != before
    assert fingerprint(family_model("llama").to(torch.bfloat16)) != before
    moved = adapted()
    with torch.no_grad():
        next(iter(params.lora_pairs(moved).values())).B[0, 0] = 1e-3
    assert fingerprint(moved) != before


def test_every_part_enters_the_key():
    model = family_model("llama")
    weights = fingerprint(model)
    usual = key(model, weights, batches(), ["ewc", 1])
    assert usual == key(family_model("llama"), weights, batches(), ["ewc", 1])
    others = {key(model, "other", batches(), ["ewc", 1]), key(model, weights, batches(1), ["ewc", 1])}
    others |= {key(model, weights, batches(), ["ewc", 2]), key(adapted(), weights, batches(), ["ewc", 1])}
    with torch.autocast("cpu", torch.bfloat16):
        others.add(key(model, weights, batches(), ["ewc", 1]))
    inputs, labels = batches()[0]
    others.add(key(model, weights, [(inputs, labels.clone().fill_(-100))], ["ewc", 1]))
    next(model.parameters()).requires_grad_(False)
    others.add(key(model, weights, batches(), ["ewc", 1]))
    assert len(others - {usual}) == 7
    assert key(model, "", batches(), ["ewc", 1]) == ""


def test_only_a_file_that_still_holds_it_is_found(tmp_path):
    path = tmp_path / "run" / "ewc" / "01.safetensors"
    assert find("abc") is None
    assert find("") is None
    importance.save(Importance({"a": torch.ones(1)}, {"key": "abc"}), path)
    remember("abc", path)
    assert find("abc") == path
    importance.save(Importance({"a": torch.ones(1)}, {"key": "other"}), path)
    assert find("abc") is None
    path.unlink()
    assert find("abc") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "file"))
    remember("abc", tmp_path)
    assert find("abc") is None


def test_of_a_directory_the_file_made_on_these_weights(tmp_path):
    model = family_model("llama")
    for place, weights in (("mas/01", fingerprint(model)), ("ewc/01", "other"), ("ewc/02", fingerprint(model))):
        importance.save(Importance({"a": torch.ones(1)}, {"weights": weights}), tmp_path / f"{place}.safetensors")
    assert given(str(tmp_path), model, "ewc", "here") == tmp_path / "ewc" / "02.safetensors"
    assert given(str(tmp_path), model, "mas", "here") == tmp_path / "mas" / "01.safetensors"
    assert given(str(tmp_path), model, "si", "here") == tmp_path / "ewc" / "02.safetensors"
    assert given(str(tmp_path / "ewc" / "01.safetensors"), model, "si", "here") == tmp_path / "ewc" / "01.safetensors"
    with torch.no_grad():
        next(model.parameters()).add_(1)
    (tmp_path / "empty").mkdir()
    for place, text in (
        (tmp_path, "holds ewc/01.safetensors, ewc/02.safetensors, mas/01.safetensors, of other weights"),
        (tmp_path / "empty", "holds none"),
        (tmp_path / "gone", "is not there"),
    ):
        with pytest.raises(ConfigError, match=f"^here: .*{text}") as caught:
            given(str(place), model, "ewc", "here")
        assert "\n" not in str(caught.value)


def test_of_files_that_do_not_say_of_which_weights_one_must_be_named(tmp_path):
    model = family_model("llama")
    for place in ("ewc/02", "ewc/03", "si/02"):
        importance.save(Importance({"a": torch.ones(1)}, {"method": place[:3]}), tmp_path / f"{place}.safetensors")
    with pytest.raises(ConfigError, match=r"^here: .*Name the file .*importance: .*ewc/03\.safetensors") as caught:
        given(str(tmp_path), model, "ewc", "here")
    assert "\n" not in str(caught.value)


def test_keys_hash_bytes_not_values_that_look_alike():
    model = family_model("llama")
    labels = torch.tensor([[1, 2]])
    wide = [({"input_ids": labels}, labels)]
    flat = [({"input_ids": labels.reshape(2, 1)}, labels)]
    short = [({"input_ids": labels.int()}, labels)]
    assert len({key(model, "w", b, []) for b in (wide, flat, short)}) == 3
    assert importance_cache.FORM >= 1
