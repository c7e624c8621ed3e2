"""Answers in batches against answers one by one, and what generation must leave alone."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_model
from transformers import Cache, GenerationConfig, TemperatureLogitsWarper, TopPLogitsWarper

from retain.errors import ConfigError
from retain.models import decoding
from retain.models.decoding import Draw
from retain.models.generation import generate, render, stop_tokens

PROMPTS = [
    "The capital of France is",
    [{"role": "user", "content": "Which of these animals can fly, and which can swim in the sea?"}],
    "x",
    "七只小船",
    [{"role": "system", "content": "One word."}, {"role": "user", "content": "Rome?"}],
    "The heart pumps blood through the body. " * 4,
]


def slow_greedy(model, tokenizer, prompt, limit):
    """The likeliest token again and again, without cache, padding or batch."""
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt)
    tokens = tokenizer.encode(text)
    written = []
    stops = stop_tokens(model, tokenizer)
    while len(written) < limit and (not written or written[-1] not in stops):
        with torch.no_grad():
            written.append(model(torch.tensor([tokens + written])).logits[0, -1].argmax().item())
    finished = written[-1] in stops
    return tokenizer.decode(written, skip_special_tokens=True).strip(), len(written), finished


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_batched_equals_one_by_one(kind, batch_tokens, tokenizer):
    model = tiny_model(tokenizer, seed=3, kind=kind)
    limits = [12, 3, 20, 1, 7, 12]
    seen = []
    answers = generate(model, tokenizer, PROMPTS, limits, batch_tokens=batch_tokens, progress=seen.append)
    expected = [slow_greedy(model, tokenizer, p, n) for p, n in zip(PROMPTS, limits)]
    assert [(a.text, a.tokens, a.finished) for a in answers] == expected
    assert sum(seen) == len(PROMPTS)


def same_opening(*questions):
    """Chats that all begin with the same long system message."""
    system = {"role": "system", "content": "You are a shop that sells tea, bread and small boats to anyone who asks."}
    return [[system, {"role": "user", "content": question}] for question in questions]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("share", [0.01, 0.25, 2.0])
def test_openings_read_once_and_rows_that_leave_change_nothing(kind, share, tokenizer, monkeypatch):
    monkeypatch.setattr(decoding._Ended, "SHARE", share)  # leaves at once, by and by, never
    model = tiny_model(tokenizer, seed=3, kind=kind)
    prompts = same_opening("What?", "How much is a boat, and can it carry bread?", "x", "Tea?", "七只小船")
    limits = [9, 4, 17, 1, 12]
    expected = [slow_greedy(model, tokenizer, p, n) for p, n in zip(prompts, limits)]
    shapes = []
    model.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    answers = generate(model, tokenizer, prompts, limits)
    assert shapes[0][0] == 1, "the opening is read once"
    assert shapes[1][0] == 5
    assert shapes[0][1] > 3 * shapes[1][1] / 4, "and not again with the rows"
    rows = [rows for rows, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    assert (rows[-1] < 5) == (share < 1)
    assert [(a.text, a.tokens, a.finished) for a in answers] == expected


def test_draws_of_a_row_do_not_depend_on_rows_that_leave(tokenizer, monkeypatch):
    model, found = tiny_model(tokenizer, seed=3), []
    for share in (0.01, 2.0):
        monkeypatch.setattr(decoding._Ended, "SHARE", share)
        found.append(generate(model, tokenizer, PROMPTS, [12, 3, 20, 1, 7, 12], temperature=1.0, top_p=0.9, seed=4))
    assert found[0] == found[1]


def test_a_window_that_would_count_the_gap_keeps_rows_whole(tokenizer):
    model = tiny_model(tokenizer, seed=3, kind="mistral", sliding_window=64)
    prompts = same_opening("What?", "How much is a boat, and can it carry bread?")
    assert decoding.Opening(model, [tokenizer.encode(render(tokenizer, p)) for p in prompts]).length == 0
    answers = generate(model, tokenizer, prompts, 6)
    assert [(a.text, a.tokens, a.finished) for a in answers] == [slow_greedy(model, tokenizer, p, 6) for p in prompts]


def test_a_cache_that_cannot_lose_rows_is_made_anew(model, tokenizer, monkeypatch):
    monkeypatch.setattr(decoding._Ended, "SHARE", 0.01)
    expected = generate(model, tokenizer, PROMPTS, [12, 3, 20, 1, 7, 12])
    monkeypatch.delattr(Cache, "batch_select_indices")
    assert generate(model, tokenizer, PROMPTS, [12, 3, 20, 1, 7, 12]) == expected


def favour(model, token):
    """Make a model write one token for ever."""
    model.lm_head.weight.data.zero_()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.zero_()
    model.lm_head.bias.data[token] = 10
    return model


def test_the_end_of_turn_stops_and_is_not_in_the_text(model, tokenizer):
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    steps = []
    favour(model, stop).register_forward_hook(lambda *_: steps.append(1))
    answers = generate(model, tokenizer, ["x", "Rome and"], 50)
    assert [(a.text, a.tokens, a.finished) for a in answers] == [("", 1, True)] * 2
    assert len(steps) == 1


def test_a_batch_ends_with_its_last_row(model, tokenizer):
    steps = []
    favour(model, tokenizer.encode("x")[0]).register_forward_hook(lambda *_: steps.append(1))
    answers = generate(model, tokenizer, ["x", "x"], [5, 2])
    assert [(a.text, a.tokens, a.finished) for a in answers] == [("xxxxx", 5, False), ("xx", 2, False)]
    assert len(steps) == 5


def test_end_of_turn_is_found_in_the_template(model, tokenizer):
    model.generation_config = GenerationConfig(eos_token_id=[7])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = type("Plain", (), {"eos_token_id": 9, "chat_template": None})()
    assert stop_tokens(model, other) == [7, 9]
    assert stop_tokens(model, tokenizer) == sorted([7, end])
    mistaken = __import__("copy").deepcopy(tokenizer)
    mistaken.eos_token = "<|endoftext|>"  # as many chat models have it
    assert end in stop_tokens(model, mistaken)


def test_habits_of_the_generation_config_are_not_applied(tokenizer):
    model = tiny_model(tokenizer, seed=3)
    expected = generate(model, tokenizer, PROMPTS, 12)
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=3.0, top_k=2,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    assert generate(model, tokenizer, PROMPTS, 12) == expected


def test_sampling_depends_on_the_seed_and_leaves_the_random_state(model, tokenizer):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, 12, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert generate(model, tokenizer, PROMPTS, 12, temperature=1.0, seed=1) == first
    assert generate(model, tokenizer, PROMPTS, 12, temperature=1.0, seed=2) != first


def test_cold_sampling_and_a_tiny_nucleus_are_greedy(tokenizer):
    model = tiny_model(tokenizer, seed=3)
    greedy = generate(model, tokenizer, PROMPTS, 12)
    assert generate(model, tokenizer, PROMPTS, 12, temperature=1e-4) == greedy
    assert generate(model, tokenizer, PROMPTS, 12, temperature=1.0, top_p=1e-6) == greedy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.95)])
@pytest.mark.parametrize("likely", [3, 512])
def test_draws_follow_the_hosts_distribution(temperature, top_p, likely, monkeypatch):
    """Frequencies of 40,000 draws against what transformers' own warpers would sample from, by a χ² test."""
    monkeypatch.setattr(Draw, "LIKELY", likely)
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(1)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)
    left = Draw(temperature, top_p, seed=0, size=40_000)(None, scores.repeat_interleave(20_000, dim=0))
    assert bool(((left > -torch.inf).sum(-1) == 1).all())
    for row, drawn in zip(expected, left.argmax(-1).split(20_000)):
        counts = torch.bincount(drawn, minlength=40)
        assert not counts[row == 0].any()
        kept = row > 0
        assert int(kept.sum()) > 3
        assert (
            chisquare(counts[kept].numpy(), 20_000 * row[kept].double().div(row[kept].double().sum()).numpy()).pvalue
            > 1e-3
        )


def test_training_flags_come_back_and_the_cache_is_used(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, 8)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    lengths = []
    model.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    assert generate(model, tokenizer, PROMPTS, 8) == expected
    assert lengths[1:] == [1] * (len(lengths) - 1)
    assert model.training
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing


def test_long_prompts_are_cut_from_the_left_and_counted(tokenizer):
    model = tiny_model(tokenizer, seed=3, max_position_embeddings=32)
    text = "The heart pumps blood through the body. " * 5
    answer = generate(model, tokenizer, [text], 8)[0]
    tokens = tokenizer.encode(text)
    assert answer.truncated == len(tokens) - 24
    written = slow_greedy(model, tokenizer, tokenizer.decode(tokens[-24:]), 8)
    assert (answer.text, answer.tokens, answer.finished) == written


@pytest.mark.parametrize("limit", [0, 512])
def test_impossible_limits_are_an_error(limit, model, tokenizer):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(model, tokenizer, ["x"], limit)


def test_nothing_to_do(model, tokenizer):
    assert generate(model, tokenizer, []) == []


def test_render(tokenizer):
    asked = "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, "Rome?") == asked
    assert render(tokenizer, [{"role": "user", "content": "Rome?"}]) == asked
    assert render(tokenizer, "Rome?", chat=False) == "Rome?\n"
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Rome?\n"}]
    assert render(tokenizer, messages, chat=False) == "Be short.\nRome?\n"
