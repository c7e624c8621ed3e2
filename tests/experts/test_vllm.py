"""What is written for vLLM: its own rules, a command that a shell reads, and no file when one expert breaks a rule."""

import json
import os
import stat
import subprocess

import pytest
import torch
from expert_kit import adapter, alone, edit, library

from retain.errors import ConfigError, ModelError
from retain.experts.library import ExpertLibrary
from retain.experts.vllm import AT_ONCE, RANKS, check, command, export


@pytest.fixture(scope="module")
def books(tiny_folder, tmp_path_factory):
    return library(tiny_folder, tmp_path_factory.mktemp("vllm") / "experts")


def options(words):
    """Option → its words, as argparse with nargs="+" splits them."""
    found, last = {}, None
    for word in words:
        if word.startswith("--"):
            last = found.setdefault(word, [])
        elif last is not None:
            last.append(word)
    return found


def test_the_command_names_every_expert_and_room_for_the_largest(books, tiny_folder, tmp_path):
    script = export(books, tmp_path / "out")
    assert script == tmp_path / "out" / "serve.sh"
    assert stat.S_IMODE(script.stat().st_mode) & 0o111
    shown = tmp_path / "bin"
    shown.mkdir()
    (shown / "vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    (shown / "vllm").chmod(0o755)
    done = subprocess.run(
        [str(script), "--port", "8001"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=os.environ | {"PATH": f"{shown}:{os.environ['PATH']}"},
    )
    place, *words = done.stdout.splitlines()
    assert os.path.samefile(place, tmp_path / "out")  # wherever it is called from
    assert words[:2] == ["serve", str(tiny_folder)]
    found = options(words)
    assert found["--enable-lora"] == []
    assert found["--max-lora-rank"] == ["8"]
    assert found["--max-loras"] == found["--max-cpu-loras"] == ["3"]
    assert found["--port"] == ["8001"]
    for module in found["--lora-modules"]:
        name, _, path = module.partition("=")
        ids = torch.arange(8)[None]
        said = alone(tiny_folder, tmp_path / "out" / path)(ids).logits
        assert torch.equal(said, alone(tiny_folder, books.path(name))(ids).logits)
    assert len(found["--lora-modules"]) == 3
    assert list(json.loads((tmp_path / "out" / "experts.json").read_text())) == books.names()


def test_some_of_them_and_never_over_what_is_there(books, tmp_path):
    text = export(books, tmp_path / "out", ["poems", "poems"]).read_text()
    assert "poems=adapters/poems" in text
    assert "medicine" not in text
    with pytest.raises(ConfigError, match="exists already"):
        export(books, tmp_path / "out")
    with pytest.raises(ConfigError, match="Did you mean"):
        export(books, tmp_path / "other", ["poem"])
    with pytest.raises(ConfigError, match="no experts here"):
        export(ExpertLibrary(tmp_path / "none"), tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (64, 64), (257, 320), (512, 512)])
def test_the_rank_is_one_that_vllm_knows(rank, allowed):
    words = command("a base", ["a"], rank)
    assert words[words.index("--max-lora-rank") + 1] == str(allowed)
    assert allowed in RANKS


def test_many_experts_share_batches_of_a_few():
    found = options(command("base", [f"e{i}" for i in range(20)], 8))
    assert found["--max-loras"] == [str(AT_ONCE)]
    assert found["--max-cpu-loras"] == ["20"]  # never fewer than --max-loras


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "one rank and one scale"),
        ({"alpha_pattern": {"q_proj": 8}}, "one rank and one scale"),
        ({"fan_in_fan_out": True}, "GPT-2"),
        ({"lora_bias": True}, "factors alone"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": 1024}, "up to 512"),
    ],
)
def test_what_vllm_does_not_take(tiny_folder, tmp_path, changes, message):
    folder = adapter(tiny_folder, tmp_path / "a")
    assert check(folder) == 4
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        check(folder)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_heads_and_embeddings_are_refused_and_nothing_is_written(tiny_folder, tmp_path, target):
    books = ExpertLibrary(tmp_path / "experts")
    books.add("fine", adapter(tiny_folder, tmp_path / "fine"))
    books.add("wide", adapter(tiny_folder, tmp_path / "wide", targets=["q_proj", target]))
    with pytest.raises(ModelError, match=r"factor of a linear layer|an embedding or a head"):
        export(books, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_words_of_a_shell_are_quoted(tiny_folder, tmp_path):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "a base; $(x)")
    books = ExpertLibrary(tmp_path / "experts")
    books.add("one", adapter(tiny_folder, tmp_path / "one"), base=str(tmp_path / "a base; $(x)"))
    script = export(books, tmp_path / "out")
    said = subprocess.run(["sh", "-n", str(script)], check=True, capture_output=True)
    assert said.stderr == b""
    assert f"'{tmp_path}/a base; $(x)'" in script.read_text()
