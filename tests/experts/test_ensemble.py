"""Ensembles on tiny models in float64: distributions computed by hand from each member alone, in one batch or apart."""

from __future__ import annotations

import math

import pytest
import torch
from expert_kit import EXPERTS, alone, base, library
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import retain
from retain.errors import ConfigError, ModelError
from retain.experts.choice import Choice
from retain.experts.ensemble import Ensemble, by_router
from retain.experts.pool import AdapterPool
from retain.models.generation import generate, render

PROMPT, ANSWER = "The capital of France is", " Paris and Rome."
WEIGHTS = {"medicine": 0.5, "poems": 0.2, None: 0.3}


@pytest.fixture(scope="module")
def books(tiny_folder, tmp_path_factory):
    return library(tiny_folder, tmp_path_factory.mktemp("ensemble") / "experts")


@pytest.fixture(scope="module")
def single(books, tiny_folder):
    """Each expert in a model of its own, and the base under None, in float64."""
    found = {name: alone(tiny_folder, books.path(name)).double() for name in EXPERTS}
    return found | {None: base(tiny_folder).double()}


def pooled(books, tiny_folder, weights, **settings) -> Ensemble:
    pool = AdapterPool(base(tiny_folder).double(), books)
    pool.ensure(EXPERTS)
    for layer in pool.model.modules():
        for part in layer.children():
            part.double()
    return Ensemble.of_pool(pool, tiny_tokenizer(), weights, **settings)


def adapted(books, tiny_folder, weights, **settings) -> Ensemble:
    model = PeftModel.from_pretrained(base(tiny_folder), str(books.path("medicine")), "medicine")
    model.load_adapter(str(books.path("poems")), "poems")
    return Ensemble.of_adapters(model.double(), tiny_tokenizer(), weights, **settings)


def separate(single, weights, **settings) -> Ensemble:
    models = {str(name): (model, tiny_tokenizer()) for name, model in single.items()}
    return Ensemble.of_models(models, {str(name): weight for name, weight in weights.items()}, **settings)


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


@torch.no_grad()
def by_hand(single, weights, average, tokens) -> torch.Tensor:
    """Log-probabilities [T, V] after every token: each model run alone without a cache, and the average written out."""
    logits = {name: single[name](torch.tensor([tokens])).logits[0] for name in weights}
    if average == "probabilities":
        return sum(w * torch.softmax(logits[name], -1) for name, w in weights.items()).log()
    return torch.log_softmax(sum(w * logits[name] for name, w in weights.items()), -1)


@pytest.fixture(params=["pool", "adapters", "models"])
def made(request, books, tiny_folder, single):
    def make(weights, **settings):
        if request.param == "models":
            return separate(single, weights, **settings)
        return (pooled if request.param == "pool" else adapted)(books, tiny_folder, weights, **settings)

    return make


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_distributions_are_those_computed_by_hand(made, single, average):
    ensemble = made(WEIGHTS, average=average)
    truth = by_hand(single, WEIGHTS, average, ids(PROMPT + ANSWER))
    start, own = len(ids(PROMPT)), ids(ANSWER)
    assert ids(PROMPT) + own == ids(PROMPT + ANSWER)
    torch.testing.assert_close(ensemble.next_log_probs(PROMPT), truth[start - 1], rtol=1e-9, atol=1e-9)
    found = ensemble.log_probs(PROMPT, ANSWER)
    expected = torch.stack([truth[start - 1 + i][token] for i, token in enumerate(own)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_greedy_answers_follow_the_average_token_by_token(made, single, average):
    answer = made(WEIGHTS, average=average).generate(PROMPT, 8)
    tokens = ids(PROMPT)
    for token in answer.ids:
        assert token == int(by_hand(single, WEIGHTS, average, tokens)[-1].argmax())
        tokens.append(token)
    assert len(answer.ids) == 8 or answer.finished


@pytest.mark.parametrize("first", ["medicine", None])
def test_weight_one_is_that_model_and_the_others_are_not_run(made, single, first):
    ensemble = made({"poems": 0.0, "medicine": 0.0, first: 1.0})
    said = single[first](torch.tensor([ids(PROMPT)])).logits[0, -1]
    torch.testing.assert_close(ensemble.next_log_probs(PROMPT), torch.log_softmax(said, -1), rtol=1e-12, atol=1e-12)
    (expected,) = generate(single[first], tiny_tokenizer(), [PROMPT], 8)
    assert ensemble.generate(PROMPT, 8) == expected
    assert [*ensemble.weights(PROMPT).values()] == [1.0]


def test_weight_one_on_whole_models_is_bit_for_bit():
    tokenizer = tiny_tokenizer()
    models = {name: (tiny_model(tokenizer, seed), tokenizer) for seed, name in enumerate("ab")}
    ensemble = Ensemble.of_models(models, {"a": 1, "b": 0})
    with torch.no_grad():
        said = models["a"][0](torch.tensor([ids(PROMPT)])).logits[0, -1]
    assert torch.equal(ensemble.next_log_probs(PROMPT), torch.log_softmax(said, -1))


def test_sampling_draws_from_the_average(books, tiny_folder, single):
    truth = by_hand(single, WEIGHTS, "probabilities", ids(PROMPT))[-1].exp()
    ensemble = adapted(books, tiny_folder, WEIGHTS)
    draws = [ensemble.generate(PROMPT, 1, temperature=1.0, seed=seed).ids[0] for seed in range(150)]
    likeliest = int(truth.argmax())
    share, expected = draws.count(likeliest) / 150, float(truth[likeliest])
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 150)
    assert ensemble.generate(PROMPT, 6, temperature=1.0, seed=3) == ensemble.generate(
        PROMPT, 6, temperature=1.0, seed=3
    )
    assert ensemble.generate(PROMPT, 6, temperature=1.0, top_p=1e-6, seed=3) == ensemble.generate(PROMPT, 6)


def test_the_largest_weights_take_part_and_sum_to_one(books, tiny_folder, single):
    top = pooled(books, tiny_folder, WEIGHTS, top=2)
    assert top.weights(PROMPT) == {"medicine": 0.625, None: pytest.approx(0.375)}
    truth = by_hand(single, {"medicine": 0.625, None: 0.375}, "probabilities", ids(PROMPT))[-1]
    torch.testing.assert_close(top.next_log_probs(PROMPT), truth, rtol=1e-9, atol=1e-9)


class Gate:
    """Stands for a router: sure about questions with one word."""

    def route(self, prompts):
        return [
            Choice("medicine", 0.8, {"medicine": 0.8, "poems": 0.1} if "heart" in p else {"poems": 0.3}, "", 0.0)
            for p in prompts
        ]


def test_a_gate_weighs_for_each_prompt_and_leaves_the_rest_to_the_base(books, tiny_folder, single):
    ensemble = pooled(books, tiny_folder, by_router(Gate()))
    assert ensemble.weights("The heart") == {"medicine": 0.8, "poems": 0.1, None: pytest.approx(0.1)}
    assert ensemble.weights([{"role": "user", "content": "ships"}]) == {None: 0.7, "poems": 0.3}
    for prompt in ("The heart pumps", "Seven ships"):
        truth = by_hand(single, ensemble.weights(prompt), "probabilities", ids(prompt))[-1]
        torch.testing.assert_close(ensemble.next_log_probs(prompt), truth, rtol=1e-9, atol=1e-9)


def test_chats_are_rendered_and_long_prompts_cut_from_the_left(made):
    ensemble = made(WEIGHTS)
    chat = [{"role": "user", "content": "What is one?"}]
    expected = ensemble.next_log_probs(render(tiny_tokenizer(), chat))
    torch.testing.assert_close(ensemble.next_log_probs(chat), expected)
    long = ensemble.generate("Seven small ships sailed. " * 200, 4)
    assert long.truncated > 0
    assert len(long.ids) <= 4


def test_training_flags_are_left_as_they_were(books, tiny_folder):
    ensemble = adapted(books, tiny_folder, WEIGHTS)
    model = ensemble.members.models[0]
    model.train()
    before = ensemble.next_log_probs(PROMPT)
    assert model.training
    torch.testing.assert_close(before, adapted(books, tiny_folder, WEIGHTS).next_log_probs(PROMPT))


def test_heads_of_unequal_width_are_averaged_over_what_both_have():
    tokenizer = tiny_tokenizer()
    narrow, wide = tiny_model(tokenizer, 0), tiny_model(tokenizer, 1, vocab_size=len(tokenizer) + 24)
    ensemble = Ensemble.of_models({"a": (narrow, tokenizer), "b": (wide, tokenizer)}, {"a": 1, "b": 1})
    assert ensemble.next_log_probs(PROMPT).shape == (len(tokenizer),)


def test_other_tokenizers_are_refused(tiny_folder):
    """By an id that means another token, and by another special token."""
    from transformers import AutoTokenizer

    tokenizer, model = tiny_tokenizer(), base(tiny_folder)
    more = AutoTokenizer.from_pretrained(tiny_folder)
    more.add_tokens(["ships ahoy"])
    ends = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    for other, words in ((more, "'ships ahoy' is token none in one and 400 in the other"), (ends, "_token is ")):
        with pytest.raises(ModelError, match=words):
            Ensemble.of_models({"a": (model, tokenizer), "b": (model, other)}, {"a": 1})


def test_mistakes(books, tiny_folder, made):
    with pytest.raises(ConfigError, match="allowed: probabilities, logits"):
        made(WEIGHTS, average="votes")
    with pytest.raises(ConfigError, match="no weight is above zero"):
        made({"medicine": 0.0})
    with pytest.raises(ConfigError, match="nobody"):
        made({"nobody": 1.0})
    with pytest.raises(ConfigError, match="nobody"):
        pooled(books, tiny_folder, lambda prompt: {"nobody": 1.0}).next_log_probs(PROMPT)
    with pytest.raises(ConfigError, match="max_new_tokens: 512 given"):
        made(WEIGHTS).generate(PROMPT, 512)
    with pytest.raises(ConfigError, match="0 of answer"):
        made(WEIGHTS).log_probs(PROMPT, "")
    with pytest.raises(ConfigError, match="no models"):
        Ensemble.of_models({}, {})


def test_it_is_a_public_name():
    assert retain.Ensemble is Ensemble


def test_an_expert_that_was_evicted_comes_back(books, tiny_folder):
    weights = {"medicine": 0.5, "poems": 0.5}
    pool = AdapterPool(base(tiny_folder), books)
    ensemble = Ensemble.of_pool(pool, tiny_tokenizer(), weights)
    before = ensemble.next_log_probs(PROMPT)
    pool.limit = pool.bytes
    pool.ensure(["history.v2"])
    assert "history.v2" in pool.loaded
    torch.testing.assert_close(ensemble.next_log_probs(PROMPT), before)
