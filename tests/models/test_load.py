"""Opening models: an adapter is its base with the change in it; what cannot be opened is one line."""

import json
import shutil
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from tiny import tiny_model, tiny_tokenizer

from retain.config import ModelConfig
from retain.errors import ModelError, RunError
from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.load import load_model, load_stage, load_tokenizer
from retain.models.weightless import Weightless


def adapter_of(folder, place):
    """A LoRA adapter on the model in a folder, with its tokenizer."""
    model = LoRA(r=2).prepare_model(load_model(str(folder))[0], Run(directory=None))
    for pair in params.lora_pairs(model).values():
        torch.nn.init.normal_(pair.B)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return model


def cut(file):
    """Leave out the end of a file."""
    file.write_bytes(file.read_bytes()[:-500])


def test_an_adapter_is_merged_and_what_comes_out_can_learn(tiny_folder, tmp_path):
    model = adapter_of(tiny_folder, tmp_path)
    ids = torch.arange(9)[None]
    found, _ = load_model(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model.eval()(ids).logits, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(found(ids).logits, tiny_model(tiny_tokenizer())(ids).logits, atol=0.1)
    assert not hasattr(found, "peft_config")
    assert all(p.requires_grad for p in found.parameters())


def said(kind, call, *given, **named):
    """The one line of an error."""
    with pytest.raises(kind) as caught:
        call(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of the model's folder, to be spoiled."""
    return shutil.copytree(tiny_folder, tmp_path / "broken")


def test_weights_that_are_cut_short(broken):
    cut(broken / "model.safetensors")
    line = said(ModelError, load_model, str(broken))
    assert line.startswith(f"model.name: cannot open '{broken}' (model.safetensors is damaged: ")


def test_weights_that_are_no_archive(broken):
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"PK\x03\x04nothing")
    assert f"cannot open '{broken}' (" in said(ModelError, load_model, str(broken))


def test_weights_of_another_shape(broken):
    about = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(about | {"hidden_size": 64}))
    assert "its weights have other shapes than config.json says" in said(ModelError, load_model, str(broken))


def test_an_adapter_that_is_damaged(tiny_folder, tmp_path):
    adapter_of(tiny_folder, tmp_path)
    cut(tmp_path / "adapter_model.safetensors")
    assert "(adapter_model.safetensors is damaged: " in said(ModelError, load_model, str(tmp_path))


@pytest.mark.parametrize(("text", "words"), [("{", "Expecting"), ("{}", "'base_model_name_or_path' is missing")])
def test_an_adapter_that_does_not_say_its_base(broken, text, words):
    (broken / "adapter_config.json").write_text(text)
    for call, given in ((load_model, str(broken)), (Weightless, ModelConfig(name=str(broken)))):
        line = said(ModelError, call, given)
        assert line.startswith(f"{broken / 'adapter_config.json'}: does not say what the adapter is for (")
        assert words in line


def test_an_adapter_whose_base_is_gone(broken):
    (broken / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./gone"}))
    for call, given in ((load_model, str(broken)), (Weightless, ModelConfig(name=str(broken)))):
        assert "'./gone' is no folder that is there" in said(ModelError, call, given)


@pytest.mark.parametrize("part", ["model", "adapter"])
def test_what_a_task_left_is_damaged(part, tiny_folder, tmp_path):
    folder = tmp_path / "tasks" / "01-count"
    if part == "model":
        shutil.copytree(tiny_folder, folder / "model")
    else:
        adapter_of(tiny_folder, folder / "adapter")
    file = "model.safetensors" if part == "model" else "adapter_model.safetensors"
    cut(folder / part / file)
    line = said(RunError, load_stage, ModelConfig(name=str(tiny_folder)), [folder])
    assert line.startswith(f"{folder / part}: cannot be opened ({file} is damaged: ")
    assert line.endswith(f"Delete {folder} and run the same command again: that task is then learned anew.")


def test_a_folder_without_a_tokenizer(broken):
    for file in broken.glob("token*"):
        file.unlink()
    for call in (load_tokenizer, load_model):
        line = said(ModelError, call, str(broken))
        assert line.startswith(f"model.name: no tokenizer for '{broken}' (its folder has none). ")
        assert "tokenizer.json" in line


# -- names that lead nowhere -------------------------------------------------------------------------------
def test_a_file_and_what_cannot_be_a_hub_id(tiny_folder):
    for name, words in (
        (str(tiny_folder / "config.json"), "is a file. Give 'starter', a folder"),
        ("./nowhere", "is no folder that is there, and cannot be a hub id. Give 'starter'"),
        ("runs/one/model", "is no folder that is there, and cannot be a hub id. Give 'starter'"),
    ):
        assert f"model.name: '{name}' {words}" in said(ModelError, load_tokenizer, name)
        assert words in said(ModelError, load_model, name, tokenizer=False)


def refused(kind):
    return kind("no", response=MagicMock(headers={}))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ConnectionError("[Errno -2] Name or service not known"), "the hub cannot be reached ([Errno -2] Name or"),
        (TimeoutError(), "the hub cannot be reached (TimeoutError)"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE keeps it from being fetched"),
        (refused(errors.RepositoryNotFoundError), "is no folder that is there, and not found on the hub"),
        (refused(errors.GatedRepoError), "not open to you. Ask for access"),
        (refused(errors.RevisionNotFoundError), "model.revision: 'nowhere' has no 'v2' on the hub"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_hub_is_asked_once_and_not_for_long(answer, words, monkeypatch):
    asked = []

    def hub(url, timeout):
        asked.append((url, timeout))
        raise answer

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub)
    line = said(ModelError, load_tokenizer, "nowhere", revision="v2")
    assert words in line
    assert "tokenizer" not in line
    assert line.endswith(("organisation/name.", "`hf auth login`.", "tag or commit of it."))
    ((url, seconds),) = asked
    assert "nowhere" in url
    assert "v2" in url
    assert seconds <= 10


def test_a_model_that_is_there_goes_on(monkeypatch, tiny_folder):
    """In the cache, where the hub is not asked, or on the hub, with or without a config.json."""
    from retain.models import hub

    answers = {"found": None, "no config": refused(errors.RemoteEntryNotFoundError)}
    for answer in answers.values():
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", MagicMock(side_effect=answer))
        hub.require("some/model")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", MagicMock(side_effect=AssertionError))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *given, **named: str(tiny_folder))
    hub.require("some/model")
    hub.require(str(tiny_folder))
