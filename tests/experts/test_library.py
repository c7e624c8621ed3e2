"""Experts on disk: whole or not there, of one base, under names of their own."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from expert_kit import adapter, alone, edit, library
from run_kit import environment
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from retain.errors import ConfigError, ModelError
from retain.experts import library as module
from retain.experts.base import identity
from retain.experts.library import ExpertLibrary


@pytest.fixture(scope="module")
def shelf(tiny_folder, tmp_path_factory):
    """A folder with an adapter, `one`, which tests copy before they spoil it."""
    folder = tmp_path_factory.mktemp("shelf")
    adapter(tiny_folder, folder / "one", 4, ["q_proj", "v_proj"])
    return folder


@pytest.fixture
def books(shelf, tmp_path):
    """A library with one expert, `first`."""
    found = ExpertLibrary(tmp_path / "experts")
    found.add("first", shelf / "one", description="Ships.", keywords=["ship"], language="en", examples=["What floats?"])
    return found


def test_an_expert_is_a_folder_that_peft_opens(books, shelf, tiny_folder):
    card = books.card("first")
    tensors = load_file(shelf / "one" / "adapter_model.safetensors")
    assert (card.name, card.kind, card.rank) == ("first", "LORA", 4)
    assert card.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert card.examples == ["What floats?"]
    assert sorted(p.name for p in books.path("first").iterdir()) == sorted(
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "card.json"]
    )
    assert "Ships." in (books.path("first") / "README.md").read_text()
    ids = torch.arange(8)[None]
    assert torch.equal(
        alone(tiny_folder, books.path("first"))(ids).logits, alone(tiny_folder, shelf / "one")(ids).logits
    )


def test_names_are_listed_in_order_and_unknown_ones_are_told(tiny_folder, tmp_path):
    books = library(tiny_folder, tmp_path / "experts")
    assert books.names() == ["history.v2", "medicine", "poems"]
    assert list(books.cards()) == books.names()
    with pytest.raises(ConfigError, match="Did you mean 'poems'"):
        books.path("poem")
    with pytest.raises(ConfigError, match="no expert 'x', and no other"):
        ExpertLibrary(tmp_path / "nothing").card("x")
    assert ExpertLibrary(tmp_path / "nothing").names() == []


def test_a_name_outside_the_library_leads_nowhere(books):
    for name in ("../first", "/etc", ".lock"):
        assert name not in books
        with pytest.raises(ConfigError, match="expert name"):
            books.path(name)
        with pytest.raises(ConfigError, match="expert name"):
            books.rename("first", name)


def test_a_name_is_taken_once_whatever_its_case(books, shelf):
    for name in ("first", "FIRST"):
        with pytest.raises(ConfigError, match="'first' is there already, an expert"):
            books.add(name, shelf / "one")
    (books.folder / "notes").mkdir()
    with pytest.raises(ConfigError, match="something else"):
        books.add("notes", shelf / "one")
    assert books.names() == ["first"]


@pytest.mark.parametrize("step", ["_write", "check", "rename"])
def test_what_fails_on_the_way_leaves_nothing(books, shelf, monkeypatch, step):
    def fails(*given):
        raise KeyboardInterrupt

    if step == "_write":
        monkeypatch.setattr(ExpertLibrary, "_write", fails)
    elif step == "check":
        monkeypatch.setattr("retain.experts.adapter.check", fails)
    else:
        monkeypatch.setattr(module.os, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        books.add("second", shelf / "one")
    assert books.names() == ["first"]
    assert {p.name for p in books.folder.iterdir()} <= {"first", ".lock"}


def test_what_a_killed_process_left_is_never_seen(books, shelf, monkeypatch):
    def killed(*given):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(ExpertLibrary, "_write", killed)
        patch.setattr(module.shutil, "rmtree", lambda *given, **more: None)  # a killed process clears nothing
        with pytest.raises(SystemExit):
            books.add("second", shelf / "one")
    (left,) = (p for p in books.folder.iterdir() if p.name.startswith(".adding-"))
    assert (left / "adapter_model.safetensors").is_file()
    assert books.names() == ["first"]
    assert left.name not in books
    books.add("second", shelf / "one")  # the name is free
    assert left.is_dir()  # perhaps another process is writing it
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (long_ago, long_ago))
    books.remove("second")
    assert not left.exists()


def test_a_removal_that_was_cut_short_is_finished_later(books, shelf, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *given, **more: None)
        books.remove("first")
    assert books.names() == []
    assert list(books.folder.glob(".leaving-*"))
    books.add("first", shelf / "one")
    assert not list(books.folder.glob(".leaving-*"))


def test_one_of_many_that_add_the_same_name_wins(books, shelf):
    outcomes, together = [], threading.Barrier(4)

    def add():
        together.wait()
        try:
            outcomes.append(books.add("same", shelf / "one").name)
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[-1] == "same"
    assert sum("there already" in outcome for outcome in outcomes) == 3
    assert books.names() == ["first", "same"]
    assert not list(books.folder.glob(".adding-*"))


def test_remove_and_rename(books):
    card = books.rename("first", "Second")
    assert card.name == "Second"
    assert json.loads((books.path("Second") / "card.json").read_text())["name"] == "Second"
    assert "# Second" in (books.path("Second") / "README.md").read_text()
    assert books.rename("Second", "second").name == "second"  # another case of the same name
    assert books.names() == ["second"]
    books.remove("second")
    assert books.names() == []
    assert {p.name for p in books.folder.iterdir()} <= {".lock"}
    with pytest.raises(ConfigError, match="no expert 'second'"):
        books.remove("second")


def test_a_rename_that_was_cut_short_heals_itself(books):
    os.rename(books.folder / "first", books.folder / "later")
    assert books.card("later").name == "later"


def test_a_new_name_that_is_taken(books, shelf):
    books.add("second", shelf / "one")
    with pytest.raises(ConfigError, match="'second' is there already"):
        books.rename("first", "second")
    assert books.names() == ["first", "second"]


def test_another_base_is_refused(books, tmp_path):
    other = tmp_path / "other"
    tiny_model(tiny_tokenizer(), seed=1).save_pretrained(other)  # the same shapes
    adapter(other, tmp_path / "foreign")
    with pytest.raises(ModelError, match="one library per base") as error:
        books.add("foreign", tmp_path / "foreign")
    assert str(other) in str(error.value)
    assert books.names() == ["first"]


def test_the_same_base_in_another_place_is_the_same(books, shelf, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "moved")
    assert identity(str(tmp_path / "moved")) == books.card("first").base_digest
    assert books.add("second", shelf / "one", base=str(tmp_path / "moved")).name == "second"


def test_shards_make_no_other_base(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert identity(str(tmp_path)) == identity(str(tiny_folder)) != ""


def test_every_tensor_of_the_base_counts(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1}, path, {"format": "pt"})
        assert identity(str(path.parent)) != identity(str(tiny_folder))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cut short"):
        identity(str(path.parent))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "damaged"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "damaged|peft_type"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "only adapter_model.bin"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), "damaged"),
        (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "peft_type IA3"),
        (lambda f: edit(f / "adapter_config.json", use_dora=True), "DoRA"),
        (lambda f: edit(f / "adapter_config.json", modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda f: edit(f / "adapter_config.json", bias="all"), "biases of the base"),
        (lambda f: edit(f / "adapter_config.json", init_lora_weights="pissa_niter_4"), "changes the base itself"),
        (lambda f: edit(f / "adapter_config.json", r=8), "is 4×32 here and 8×32 by adapter_config.json"),
        (lambda f: edit(f / "adapter_config.json", target_modules=["q_proj"]), "and missing by"),
        (lambda f: edit(f / "adapter_config.json", target_modules=["x_proj"]), "does not fit"),
        (lambda f: edit(f / "adapter_config.json", base_model_name_or_path=None), "No"),
        (lambda f: edit(f / "adapter_config.json", base_model_name_or_path="no/such"), "no/such"),
    ],
)
def test_broken_adapters_are_refused(books, shelf, tmp_path, spoil, message):
    shutil.copytree(shelf / "one", tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(ModelError, match=message) as error:
        books.add("bad", tmp_path / "bad")
    assert "\n" not in str(error.value)
    assert books.names() == ["first"]
    assert not list(books.folder.glob(".adding-*"))


def test_numbers_that_are_not_finite_are_refused(books, shelf, tmp_path):
    shutil.copytree(shelf / "one", tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    tensors[last][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ModelError, match="not finite"):
        books.add("bad", tmp_path / "bad")


def test_weights_of_the_base_are_refused(books, shelf, tmp_path):
    shutil.copytree(shelf / "one", tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.embed_tokens.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ModelError, match="a weight of the base"):
        books.add("bad", tmp_path / "bad")


def test_a_folder_that_is_no_adapter(books, tmp_path):
    with pytest.raises(ModelError, match="no adapter_config"):
        books.add("x", tmp_path / "nowhere")


def test_a_library_that_cannot_be_written(shelf, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        ExpertLibrary(tmp_path / "file" / "experts").add("x", shelf / "one")


def test_a_damaged_card_is_told(books):
    path = books.path("first") / "card.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ModelError, match="not a card of version 1"):
        books.card("first")
    edit_later = json.dumps({"version": 2})
    path.write_text(edit_later)
    with pytest.raises(ModelError, match="version"):
        books.cards()


def test_describe_changes_what_a_card_says(books):
    books.describe("first", examples=["a", "b"], language="zh")
    card = books.card("first")
    assert (card.examples, card.language, card.keywords) == (["a", "b"], "zh", ["ship"])


def test_export_writes_a_plain_adapter(books, shelf, tiny_folder, tmp_path):
    to = books.export("first", tmp_path / "out" / "ships")
    assert sorted(p.name for p in to.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    ids = torch.arange(8)[None]
    assert torch.equal(alone(tiny_folder, to)(ids).logits, alone(tiny_folder, shelf / "one")(ids).logits)
    with pytest.raises(ConfigError, match="exists already"):
        books.export("first", to)


def test_cards_load_no_torch():
    code = (
        "import sys, retain.experts.card, retain.experts.names, retain.experts.library; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "False"
