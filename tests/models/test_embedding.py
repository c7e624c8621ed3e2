"""Similarity by a sentence-transformers model that is built here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from retain.errors import ConfigError, ModelError
from retain.models.embedding import similarities, vectors

here = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="the extra `similarity` is not installed"
)


@here
def test_similarity_is_the_cosine_of_mean_pooled_states(tiny_embedding: Path):
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = (kind.from_pretrained(tiny_embedding) for kind in (AutoModel, AutoTokenizer))

    def vector(text):
        with torch.no_grad():
            return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().mean(0)

    texts = ["the bird can fly", "北京", ""]
    references = [["a bird flies", "the sea"], ["北京市", "上海"], ["x"]]
    found = similarities(str(tiny_embedding), texts, references)
    expected = [max(float(torch.cosine_similarity(vector(t), vector(r), dim=0)) for r in rs)
                for t, rs in zip(texts[:2], references)]  # fmt: skip
    assert found == pytest.approx([*expected, 0.0], abs=1e-5)
    assert similarities(str(tiny_embedding), ["the sea"], [["the sea"]]) == pytest.approx([1.0], abs=1e-6)


@here
def test_the_precision_of_the_model_under_test_does_not_matter(tiny_embedding: Path):
    given = (str(tiny_embedding), ["the bird"], [["a bird"]])
    plain = similarities(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert similarities(*given) == plain


@here
def test_a_model_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"nowhere.*cannot be loaded"):
        similarities(str(tmp_path / "nowhere"), ["a"], [["b"]])


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'retain-llm\[similarity\]'"):
        similarities("any", ["a"], [["b"]])


@here
def test_vectors_have_length_one_and_the_cosines_of_similarities(tiny_embedding: Path):
    found = vectors(str(tiny_embedding), ["the bird", "a bird flies"], "test")
    assert (found**2).sum(1) == pytest.approx([1, 1], abs=1e-5)
    (cosine,) = similarities(str(tiny_embedding), ["the bird"], [["a bird flies"]])
    assert float(found[0] @ found[1]) == pytest.approx(cosine, abs=1e-5)
