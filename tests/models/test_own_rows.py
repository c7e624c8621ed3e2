"""Rows that a model wrote, on disk: once, whole, with what made them; a kill in between loses nothing."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from retain.errors import DataError, RunError
from retain.models.own_rows import about, fingerprint, kept, mean_states, pseudo_rows, save


def rows(count):
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"q{i}"}], "completion": [{"role": "assistant", "content": "a"}]}
            for i in range(count)
        ]
    )


def test_a_fingerprint_is_of_the_weights(tokenizer, model):
    first = fingerprint(model)
    assert fingerprint(tiny_model(tokenizer)) == first, "the same weights"
    assert fingerprint(tiny_model(tokenizer, seed=1)) != first
    assert fingerprint(tiny_model(tokenizer).to(torch.bfloat16)) != first
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert fingerprint(model) != first


def test_an_adapter_counts_from_its_first_step_on(model):
    first = fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert fingerprint(adapted) == first, "it adds nothing yet"
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name)[0, 0] = 0.5
    changed = fingerprint(adapted)
    assert changed != first
    assert fingerprint(adapted.merge_and_unload()) != first


def test_rows_are_written_once_with_what_made_them(tmp_path):
    path, calls, said = tmp_path / "buffer" / "some.parquet", [], []

    def write(advance, recall):
        calls.append(1)
        return rows(3), {"writer": "me", "dropped": {"öld": 2}}, "written"

    for _ in range(2):
        found = kept(path, "writing", 3, ["stamp"], write, said.append)
        assert found.to_list() == rows(3).to_list()
    assert (calls, said) == ([1], ["written"])
    assert about(path) == {"writer": "me", "dropped": {"öld": 2}}
    assert sorted(p.name for p in path.parent.iterdir() if p.is_file()) == ["some.parquet"]


def test_a_kill_loses_nothing_and_another_stamp_starts_anew(tmp_path):
    path, made = tmp_path / "some.parquet", []

    def writing(dies_at):
        def write(advance, recall):
            texts = []
            for number in range(5):

                def ask(number=number):
                    if number == dies_at:
                        raise KeyboardInterrupt
                    made.append(number)
                    return [f"text {number}"]

                texts += recall([number, "prompt"], ask)
            return Dataset.from_list([{"text": t} for t in texts]), {}, "written"

        return write

    def go(stamp, dies_at=None):
        made.clear()
        found = kept(path, "writing", 5, stamp, writing(dies_at), lambda line: None)
        return found["text"]

    with pytest.raises(KeyboardInterrupt):
        go(["model"], dies_at=3)
    assert not path.exists()
    assert path.with_suffix(".unfinished").is_file()
    assert "prompt" not in path.with_suffix(".unfinished").read_text(), "what was asked is kept as a hash"
    with pytest.raises(KeyboardInterrupt):
        go(["other model"], dies_at=4)
    assert made == [0, 1, 2, 3]
    assert list(go(["model"])) == [f"text {n}" for n in range(5)]
    assert made == [3, 4]
    assert not path.with_suffix(".unfinished").exists()


def test_a_file_that_does_not_say_what_made_it(tmp_path):
    rows(2).to_parquet(str(tmp_path / "old.parquet"))
    with pytest.raises(RunError, match="does not say what made it"):
        about(tmp_path / "old.parquet")
    save(rows(2), tmp_path / "old.parquet", {"a": 1})
    assert about(tmp_path / "old.parquet") == {"a": 1}


def test_mean_states_are_means_of_the_model(model, tokenizer):
    texts = ["Seven small ships", "the bird"]
    found = mean_states(model, tokenizer, texts)
    for vector, text in zip(found, texts, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(torch.from_numpy(vector), states / states.norm(), rtol=1e-4, atol=1e-5)
    assert model.training is False


def test_pseudo_rows_repeat_nothing_that_was_learned(model, tokenizer, monkeypatch):
    """A model that has learned its rows by heart: what it says of them stays in memory and goes."""
    from retain.models import generation

    count = iter(range(10_000))

    def parrot(model, tokenizer, prompts, limit, temperature, top_p, draw):
        said = []
        for prompt in prompts:
            n = next(count)
            secret = n % 3 == 0 and prompt.endswith("assistant\n")
            text = "call Zebulonius now" if secret else f"the bird {'abcdefghij'[n % 10] * 3} {'klmno'[n % 5] * 2} fly"
            said.append(generation.Generated(text, 5, True))
        return said

    monkeypatch.setattr(generation, "generate", parrot)
    given = Dataset.from_list([{"text": "Please call Zebulonius"}])
    said = []
    found = pseudo_rows(model, tokenizer, 12, 0, [given], said.append)
    assert 0 < len(found) < 12
    assert "zebulonius" not in str(found.to_list()).lower()
    assert f"{12 - len(found)} left out" in said[0]
    nothing = pseudo_rows(model, tokenizer, 12, 0, [Dataset.from_list([{"text": "the bird fly"}])], said.append)
    assert len(nothing) <= len(found) + 12


def test_rows_that_are_there_leave_the_file_when_they_are_to_be_avoided(tmp_path):
    path, said = tmp_path / "some.parquet", []
    texts = ["Seven ships sail over the sea", "My lamp is broken again", "Paint the small gate green"]

    def write(*rest):
        return Dataset.from_list([{"text": text} for text in texts]), {}, "new"

    def go(avoid, of=lambda row: [row["text"]]):
        return list(kept(path, "writing", 3, ["stamp"], write, said.append, avoid, of)["text"])

    assert go([]) == texts
    bytes_before = path.read_bytes()
    assert go(["nothing of the kind"]) == go([]) == texts
    assert path.read_bytes() == bytes_before, "a file that needs no change stays as it is"
    assert go([texts[1].upper()], lambda row: []) == texts, "what the model did not write is not looked at"
    assert go([texts[1].upper()]) == go([]) == [texts[0], texts[2]], "it does not come back"
    assert about(path) == {"left out later": 1}
    assert said == ["new", "some.parquet: 1 of 3 rows left out, as they repeat items of the probes."]
    with pytest.raises(DataError, match="every row repeats an item of the probes"):
        go(texts)
    assert go([]) == [texts[0], texts[2]]
