"""Rows that come and go in one cache say what each says alone, on models of several families."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from retain.errors import ModelError
from retain.experts.batch import ROOM, Batch, check_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33], [40] * 12]


def scores(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("gpt2", {}), ("gpt_neox", {}), ("mistral", {"sliding_window": 4})],
    ids=["llama", "gpt2", "gpt_neox", "mistral, sliding"],
)
def test_rows_come_and_go(kind, settings):
    """Against a pass over each row alone, without a cache."""
    model = tiny_model(tiny_tokenizer(), kind=kind, **settings)
    rows, random = [list(p) for p in PROMPTS], torch.Generator().manual_seed(0)

    def check(found, places):
        for place, one in zip(places, found, strict=True):
            torch.testing.assert_close(one, scores(model, rows[place]), rtol=1e-3, atol=1e-3)

    def step(batch, places):
        tokens = torch.randint(3, 300, (len(places),), generator=random).tolist()
        for place, token in zip(places, tokens):
            rows[place].append(token)
        check(batch.step(tokens), places)

    with torch.no_grad():
        batch, other = Batch(model), Batch(model)
        check(batch.read([rows[0], rows[1]], pad=0), [0, 1])
        step(batch, [0, 1])
        check(other.read([rows[2], rows[3]], pad=0), [2, 3])
        batch.join(other)
        assert len(batch) == 4
        step(batch, [0, 1, 2, 3])
        batch.keep([1, 2])  # the longest goes, and with it the slots before the others
        assert batch.width == max(len(rows[1]), len(rows[2]))
        for _ in range(ROOM):  # beyond the room that was kept
            step(batch, [1, 2])
        late = Batch(model)
        late.read([rows[0]], pad=0)
        batch.join(late)
        step(batch, [1, 2, 0])
        batch.keep([])
        assert (len(batch), batch.width) == (0, 0)
        batch.join(Batch(model))
        again = Batch(model)
        again.read([rows[3]], pad=0)
        batch.join(again)
        step(batch, [3])


def test_a_model_with_another_kind_of_memory_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3NextConfig(
        vocab_size=100, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], **sizes,
    )  # fmt: skip
    with pytest.raises(ModelError, match="keys and values of every token"):
        check_model(AutoModelForCausalLM.from_config(config))
