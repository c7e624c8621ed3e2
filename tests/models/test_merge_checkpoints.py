"""Merging whole models on disk: what is written, what is refused, the memory it takes, and a merge that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from merge_kit import changes, weights, with_adapter, write_adapter, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from warm import Script

from retain.errors import ModelError, RetainError
from retain.models.merge import merge

DETERMINED = ("linear", "slerp", "task", "ties", "stock")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two models in other shards, a model in bfloat16, an adapter."""
    folder = tmp_path_factory.mktemp("merging")
    write_model(folder / "base", 0)
    write_model(folder / "one", 1)
    write_model(folder / "two", 2, shard="30KB")
    write_model(folder / "half", 3, dtype=torch.bfloat16)
    write_adapter(folder / "adapter", folder / "base", 1)
    return folder


@pytest.mark.parametrize("method", ["linear", "slerp", "task", "ties", "dare"])
def test_the_first_with_weight_one_is_written_bit_for_bit(place: Path, tmp_path: Path, method: str) -> None:
    more = {"density": 1.0} if method in ("ties", "dare") else {}
    merge([str(place / "one"), str(place / "two")], tmp_path / "out", method, [1, 0], str(place / "base"), **more)
    found, expected = weights(tmp_path / "out"), weights(place / "one")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_average_in_shards_with_all_that_a_model_needs(place: Path, tmp_path: Path) -> None:
    done = merge([str(place / "one"), str(place / "two")], tmp_path / "out", weights=[1, 3], shard_size="30KB")
    assert (done.form, done.base, done.kept) == ("model", "", None)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(
        file.stat().st_size < 33_000 or len(load_file(file)) == 1 for file in files
    )  # or a tensor that is larger
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.size == sum(t.nbytes for f in files for t in load_file(f).values())
    one, two, found = weights(place / "one"), weights(place / "two"), weights(tmp_path / "out")
    for name in one:
        torch.testing.assert_close(found[name].double(), 0.25 * one[name].double() + 0.75 * two[name].double())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(done.folder), AutoTokenizer.from_pretrained(done.folder)
    assert model.generate(**tokenizer("Seven", return_tensors="pt"), max_new_tokens=2).shape[1] > 2
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert json.loads((done.folder / "merge.json").read_text())["weights"] == [1, 3]
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_layouts_of_shards_do_not_matter(place: Path, tmp_path: Path) -> None:
    for method in DETERMINED:
        base = str(place / "base")
        for size in ("5GB", "40KB"):
            merge(
                [str(place / "one"), str(place / "two")], tmp_path / method / size, method, base=base, shard_size=size
            )
        whole, parts = weights(tmp_path / method / "5GB"), weights(tmp_path / method / "40KB")
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_dtype_is_the_bases_and_sums_are_rounded_once(place: Path, tmp_path: Path) -> None:
    merge([str(place / "one")], tmp_path / "out", "interpolate", [0.25], str(place / "half"))
    found, start, final = weights(tmp_path / "out"), weights(place / "half"), weights(place / "one")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in found.items():
        exact = start[name].double() + 0.25 * (final[name].double() - start[name].double())
        assert tensor.dtype == torch.bfloat16
        assert bool(((tensor.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all())  # half of a last place


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_two_in_half_precision_are_rounded_as_sums_in_float32_are(tmp_path: Path, kind: torch.dtype) -> None:
    """Every number that the dtype has, against others: the same bits as widened, summed and rounded once."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind).reshape(256, 256)
    every = torch.where(every.isfinite(), every, torch.zeros((), dtype=kind))
    config = {"model_type": "its own", "tie_word_embeddings": False}
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        order = torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))
        tensors = {"near": every * (1 + seed * 2**-6), "mixed": every.flatten()[order].reshape(256, 256)}
        tensors["odd"] = tensors["mixed"].flatten()[:37].clone()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for weights_ in ([1, 1], [0.3, 0.7], [2, 1]):
        to = tmp_path / str(weights_)
        merge([str(tmp_path / "one"), str(tmp_path / "two")], to, weights=weights_)
        one, two, found = (load_file(f / "model.safetensors") for f in (tmp_path / "one", tmp_path / "two", to))
        for name in found:
            wide = torch.lerp(one[name].float(), two[name].float(), weights_[1] / sum(weights_)).to(kind)
            assert torch.equal(found[name].view(torch.int16), wide.view(torch.int16)), name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """One file holds the head beside the embedding that it shares; the merge has one tensor for both."""
    write_model(tmp_path / "one", 1, tie_word_embeddings=True)
    write_model(tmp_path / "two", 2, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              tmp_path / "two" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    for order in (["one", "two"], ["two", "one"]):
        out = tmp_path / "-".join(order)
        merge([str(tmp_path / name) for name in order], out)
        assert "lm_head.weight" not in load_file(out / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(
            model.lm_head.weight.data,
            (tensors["model.embed_tokens.weight"] + weights(tmp_path / "one")["lm_head.weight"]) / 2,
        )


def test_scalars_integers_and_empty_tensors(place: Path, tmp_path: Path) -> None:
    for name, number in (("one", 2.0), ("two", 4.0)):
        (tmp_path / name).mkdir()
        config = json.loads((place / "one" / "config.json").read_text()) | {"model_type": "its own"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        odd = {"scale": torch.tensor(number), "steps": torch.tensor([int(number)]), "none": torch.zeros(0, 3)}
        save_file(
            odd | {"wide": torch.full((3, 2), number, dtype=torch.float64)}, tmp_path / name / "model.safetensors"
        )
    for method in ("linear", "slerp"):
        merge([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / method, method)
        found = load_file(tmp_path / method / "model.safetensors")
        assert (found["scale"].item(), found["steps"].item(), found["none"].shape) == (3.0, 2, (0, 3))
        assert torch.equal(found["wide"], torch.full((3, 2), 3.0, dtype=torch.float64))


def test_adapters_and_models_together(place: Path, tmp_path: Path) -> None:
    base = str(place / "base")
    done = merge([str(place / "adapter"), str(place / "one")], tmp_path / "out", "task", [0.5, 0.25], base)
    assert (done.form, done.base) == ("model", base)
    delta, start, one = changes(place / "base", place / "adapter"), weights(place / "base"), weights(place / "one")
    for name, found in weights(tmp_path / "out").items():
        exact = start[name].double() + 0.5 * delta[name] + 0.25 * (one[name].double() - start[name].double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_an_adapter_written_into_its_base_is_what_peft_makes_of_it(place: Path, tmp_path: Path) -> None:
    merge([str(place / "adapter")], tmp_path / "out", "interpolate", [1], form="model")
    expected = with_adapter(place / "base", place / "adapter")
    for name, found in weights(tmp_path / "out").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-6)


def test_other_names_shapes_settings_and_vocabularies_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "wide", 1, intermediate_size=48)
    write_model(tmp_path / "heads", 1, num_attention_heads=8, num_key_value_heads=4)
    write_model(tmp_path / "deep", 1, num_hidden_layers=3)
    write_model(tmp_path / "words", 1, tokenizer=other_words())
    write_model(tmp_path / "qwen", 1, kind="qwen2")
    said = {
        "wide": ["model.layers.0.mlp.down_proj.weight", "(32, 64) in", "(32, 48) in", "wide"],
        "heads": ["num_attention_heads is 4 and 8"],
        "deep": ["model.layers.2.", "not there in", "deep"],
        "words": ["different vocabularies", "is token"],
        "qwen": ["model_type is llama and qwen2"],
    }
    for name, words in said.items():
        with pytest.raises(ModelError) as refused:
            merge([str(place / "one"), str(tmp_path / name)], tmp_path / "out")
        assert all(word in str(refused.value) for word in words), str(refused.value)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*out*"))


def other_words() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with two tokens exchanged."""
    given = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = given["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[20:22]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    from tokenizers import Tokenizer

    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(given)))
    found.pad_token, found.bos_token, found.eos_token = "<|endoftext|>", "<|endoftext|>", "<|im_end|>"
    return found


def test_folders_that_cannot_be_read_are_refused(place: Path, tmp_path: Path) -> None:
    one = place / "one"
    for name in ("damaged", "torch", "quantised", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((one / "config.json").read_text())
    (tmp_path / "damaged" / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes()[:9000])
    config = json.loads((one / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    index = {"weight_map": dict.fromkeys(load_file(one / "model.safetensors"), "model-1.safetensors")}
    (tmp_path / "gone" / "model.safetensors.index.json").write_text(json.dumps(index))
    said = {
        "damaged": "model.safetensors: cannot be read",
        "torch": "write it with save_pretrained",
        "quantised": "its weights are quantised",
        "gone": "model-1.safetensors: cannot be read",
        "nowhere": "is no folder that is there",
    }
    for name, words in said.items():
        with pytest.raises(RetainError) as refused:
            merge([str(one), str(tmp_path / name)], tmp_path / "out")
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="exists already"):
        merge([str(one), str(place / "two")], place / "base")


MANY = """
import sys
from pathlib import Path
from retain.models import merge_checkpoints
from retain.models.merge import merge
merge_checkpoints.PIECE = 1 << 16

def status(key):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

def work(place, method, to):
    merge([f"{place}/one", f"{place}/two"], f"{to}/{method}", method, base=f"{place}/base", shard_size=8_000_000)

small, many, to = sys.argv[1:]
for method in ("linear", "slerp", "ties", "dare"):
    work(small, method, to + "/small")  # code that is loaded on the way counts for nothing
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    work(many, method, to + "/many")
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc")
def test_memory_is_less_than_two_shards(place: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):  # 39 MB, in shards of 8 MB
        write_model(tmp_path / name, seed, "8MB", hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    size = sum(file.stat().st_size for file in (tmp_path / "one").glob("*.safetensors"))
    words = [sys.executable, "-c", MANY, str(place), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 4
    assert max(peaks) < 2 * 8_000_000 < size / 2, peaks


def test_a_merge_that_is_killed_leaves_nothing_to_be_seen(place: Path, tmp_path: Path) -> None:
    """Stopped in the middle of a shard; the same command then does it all."""
    code = """
import sys, time
from retain.models import merge_checkpoints
from retain.models.merge import merge
write = merge_checkpoints._write_shard
def slow(*args):
    write(*args)
    print("shard", flush=True)
    time.sleep(60)
merge_checkpoints._write_shard = slow
merge(sys.argv[2:], sys.argv[1], shard_size="30KB")
"""
    beside, tmp_path = tmp_path / "process", tmp_path / "merging"
    for folder in (beside, tmp_path):
        folder.mkdir()
    (beside / "slow.py").write_text(code)
    words = [str(tmp_path / "out"), str(place / "one"), str(place / "two")]
    process = Script(beside / "slow.py", words, beside)
    while process.poll() is None and not process.said().startswith("shard\n"):
        time.sleep(0.01)
    assert process.poll() is None, process.said()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    merge(words[1:], words[0], shard_size="30KB")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_merge_that_fails_takes_its_files_away(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retain.models.merge_checkpoints._write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        merge([str(place / "one"), str(place / "two")], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ModelError, match=r"0\.0 GB are free"):
        merge([str(place / "one"), str(place / "two")], tmp_path / "out")
