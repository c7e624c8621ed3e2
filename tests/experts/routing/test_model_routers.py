"""Routers that read questions with a model: prototype, gate, likelihood, on tiny models."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from routing_kit import EXAMPLES, NEW
from scipy.spatial.distance import cosine
from scipy.special import log_softmax, softmax
from tiny import tiny_model, tiny_tokenizer

from retain.experts.routing.combined import Combined
from retain.experts.routing.everyday import EVERYDAY
from retain.experts.routing.gate import STRENGTH, Gate
from retain.experts.routing.keyword import Keyword
from retain.experts.routing.likelihood import Likelihood, pool_scorer
from retain.experts.routing.linear import fit_linear
from retain.experts.routing.prototype import Prototype
from retain.models.likelihood import text_log_likelihood
from retain.models.states import TOKENS, StateReader

OTHERS = list(EVERYDAY[::4])
TEXTS = ["The bird can fly.", "成语", "", "One, two, three, four, five and six " * 6]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def reader(tokenizer):
    return StateReader(tiny_model(tokenizer), tokenizer, 0.5)


def true_means(model, tokenizer, texts, layer):
    """Mean hidden states after a layer, one text at a time."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] or [tokenizer.bos_token_id]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        found.append(states[layer][0].double().mean(0).numpy())
    return np.array(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_states_are_the_means_after_half_of_the_layers(tokenizer, kind):
    model = tiny_model(tokenizer, kind=kind)
    reader = StateReader(model, tokenizer, 0.5)
    assert reader.layers == 1
    seen = []
    found = reader(TEXTS, seen.append)
    assert found == pytest.approx(true_means(model, tokenizer, TEXTS, 1), abs=1e-4)
    assert sum(seen) == len(TEXTS)
    with torch.no_grad():  # nothing is left in the model that would end a pass
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


def test_the_upper_layers_do_not_run(tokenizer):
    model = tiny_model(tokenizer)
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    StateReader(model, tokenizer, 0.5)(TEXTS)
    assert not calls
    whole = StateReader(model, tokenizer, 1.0)
    assert whole.layers == 2
    whole(TEXTS)
    assert calls


def test_adapters_do_not_change_what_is_read(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(tokenizer)
    before = StateReader(model, tokenizer, 1.0)(TEXTS)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    assert StateReader(adapted, tokenizer, 1.0)(TEXTS) == pytest.approx(before, abs=1e-6)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        with adapted.disable_adapter():
            bare = adapted(input_ids=ids).logits
        assert not torch.allclose(adapted(input_ids=ids).logits, bare), "the adapter acts again afterwards"


def test_a_long_question_is_read_at_both_ends_within_the_context(tokenizer):
    model = tiny_model(tokenizer, max_position_embeddings=64)
    reader = StateReader(model, tokenizer, 1.0)
    ids = tokenizer("word number " * 5000)["input_ids"]
    assert len(ids) > 10_000
    cut = reader._cut(ids)
    assert cut == ids[:32] + ids[-32:]
    assert np.isfinite(reader(["word number " * 5000])).all()
    assert StateReader(tiny_model(tokenizer), tokenizer, 1.0)._most == min(TOKENS, 512)


def test_passes_of_other_threads_are_not_ended(tokenizer):
    """Somebody else's pass over the same model, while the hook is there, runs to its end."""
    model = tiny_model(tokenizer)
    reader, shapes = StateReader(model, tokenizer, 0.5), []

    def other():
        with torch.no_grad():
            shapes.append(model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape)

    def during(*_):
        one = threading.Thread(target=other)
        handle.remove()
        one.start()
        one.join()

    handle = model.model.layers[0].register_forward_pre_hook(during)
    reader(["The bird"])
    assert shapes == [(1, 3, len(tokenizer))]


def test_the_model_is_read_under_the_lock(tokenizer):
    held = []

    @contextmanager
    def lock():
        held.append("in")
        yield
        held.append("out")

    class Again:
        def __enter__(self):
            self.one = lock()
            return self.one.__enter__()

        def __exit__(self, *error):
            return self.one.__exit__(*error)

    StateReader(tiny_model(tokenizer), tokenizer, 1.0, Again())(["a", "b"])
    assert held == ["in", "out"]


@pytest.mark.parametrize("kind", [Prototype, Gate, Combined])
def test_new_questions_find_their_expert(reader, kind, tmp_path):
    router = kind(reader, depth=0.5).fit(EXAMPLES, OTHERS)
    prompts = [prompt for texts in NEW.values() for prompt in texts]
    names = [name for name, texts in NEW.items() for _ in texts]
    choices = router.route(prompts)
    assert sum(choice.expert == name for choice, name in zip(choices, names)) >= 8
    for choice in choices:
        if choice.expert:
            quoted = choice.why.split("nearest question is “")[1].split("”")[0].rstrip("…")
            assert any(text.startswith(quoted) for text in EXAMPLES[choice.expert])
    router.save(tmp_path)
    again = kind(reader).load(tmp_path)
    assert again.settings == {"depth": 0.5}
    for a, b in zip(choices, again.route(prompts)):
        assert asdict(a) | {"seconds": 0} == asdict(b) | {"seconds": 0}


def test_prototype_scores_are_cosines_to_mean_directions(reader):
    router = Prototype(reader).fit(EXAMPLES, OTHERS)
    rows, new = reader(router.examples).astype(float), reader(NEW["poems"]).astype(float)
    middle, spread = rows.mean(0), rows.std(0)
    z = [row / np.linalg.norm(row) for row in (rows - middle) / spread]
    means = [np.mean([z[i] for i in np.flatnonzero(router.labels == k)], axis=0) for k in range(3)]
    expected = [[1 - cosine((row - middle) / spread, mean) for mean in means] for row in new]
    found = router.score(router.learned, reader(NEW["poems"]))
    assert found[:, :-1] == pytest.approx(np.array(expected), abs=1e-3)
    groups = router.learned["nobody"]
    nearest = [max(1 - cosine((row - middle) / spread, mean) for mean in groups) for row in new]
    assert found[:, -1] == pytest.approx(np.array(nearest), abs=1e-3)


def test_a_question_of_the_examples_is_nearest_to_itself(reader):
    for kind in (Prototype, Gate, Combined):
        router = kind(reader).fit(EXAMPLES, OTHERS)
        (choice,) = router.route([EXAMPLES["sums"][4]])
        assert f"“{EXAMPLES['sums'][4]}”" in choice.why


def test_the_gate_is_the_logistic_regression(reader):
    from sklearn.linear_model import LogisticRegression

    router = Gate(reader).fit(EXAMPLES, OTHERS)
    rows = reader(router.examples)
    features = (rows - rows.mean(0)) / rows.std(0)
    model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=2000).fit(features, router.labels)
    found = softmax(router.score(router.learned, rows), axis=1)
    assert found == pytest.approx(model.predict_proba(features), abs=1e-3)


def test_combined_adds_the_log_probabilities_of_both(reader):
    combined = Combined(reader).fit(EXAMPLES, OTHERS, about={"poems": ["verses"]})
    words = Keyword().fit(EXAMPLES, OTHERS, about={"poems": ["verses"]})
    gate = Gate(reader).fit(EXAMPLES, OTHERS)
    prompts = [*NEW["sums"], "verses of the bus"]
    expected = log_softmax(words.score(words.learned, words.read(prompts)), axis=1)
    expected = expected + log_softmax(gate.score(gate.learned, gate.read(prompts)), axis=1)
    assert combined.score(combined.learned, combined.read(prompts)) == pytest.approx(expected, abs=1e-4)


def test_two_labels_give_two_columns():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 3)), np.repeat([0, 1], 20)
    weights, offsets = fit_linear(features, labels, 1.0)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(class_weight="balanced").fit(features, labels)
    assert softmax(features @ weights.T + offsets, axis=1) == pytest.approx(model.predict_proba(features), abs=1e-4)


def test_the_gate_says_what_the_runner_up_is(reader):
    router = Gate(reader).fit({"a": EXAMPLES["sums"], "b": EXAMPLES["medicine"]}, OTHERS)
    for choice in router.route([*NEW["sums"], *NEW["poems"]]):
        odds = re.search(r"([\d.,]+) times as likely as (a|b|nobody)", choice.why)
        chances = sorted([*choice.scores.values(), 1 - sum(choice.scores.values())])
        if choice.expert and "more than" not in choice.why:
            assert float(odds[1]) == pytest.approx(chances[-1] / chances[-2], rel=0.06)
        assert odds[2] != choice.expert


@pytest.mark.parametrize("kind", [Prototype, Gate, Combined])
def test_edges(reader, kind):
    few = kind(reader).fit({name: texts[:3] for name, texts in EXAMPLES.items()}, OTHERS)
    alone = kind(reader).fit({"sums": EXAMPLES["sums"]}, OTHERS)
    for router in (few, alone):
        choices = router.route(["", "?", "word " * 10_000, *NEW["sums"]])
        assert choices[0].expert is None
        assert all(np.isfinite(list(c.scores.values())).all() and 0 <= c.confidence <= 1 for c in choices)
    assert alone.route(NEW["sums"])[0].scores.keys() == {"sums"}


class FakePool:
    """A pool of three models: what `activate` sets is what answers."""

    def __init__(self, models):
        self.models, self.active, self.lock, self.asked = models, "sums", threading.RLock(), []

    def activate(self, name):
        self.active = name
        self.asked.append(name)

    @property
    def model(self):
        return self.models[self.active]


def test_likelihood_is_the_gain_per_token(tokenizer):
    models = {name: tiny_model(tokenizer, seed=i) for i, name in enumerate([None, "sums", "poems"])}
    pool = FakePool(models)
    router = Likelihood(pool_scorer(pool, tokenizer))
    router.fit({name: EXAMPLES[name][:4] for name in ("sums", "poems")}, OTHERS[:6])
    assert pool.active == "sums", "who was active before is so again"
    pool.asked.clear()
    choices = router.route(NEW["poems"])
    assert pool.asked == [None, "sums", "sums", "sums", "poems", "sums"], "each once, and back to who was active"
    scored = {name: text_log_likelihood(model, tokenizer, NEW["poems"]) for name, model in models.items()}
    rows = router.read(NEW["poems"])
    for place, choice in enumerate(choices):
        for column, name in enumerate(["sums", "poems"]):
            one, base = scored[name][place], scored[None][place]
            gain = (one.log_likelihood - base.log_likelihood) / base.tokens
            assert rows[place, column] == pytest.approx(gain, abs=1e-5)
        assert "nats per token" in choice.why
    assert router.route([""])[0].expert is None
    assert len(router.route(["word " * 10_000])) == 1
