"""The keyword router on plain text, English and Chinese; and what all routers share."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from routing_kit import EXAMPLES, MEDICINE, NEW, SUMS

from retain.errors import DataError, RunError
from retain.experts.routing.everyday import EVERYDAY
from retain.experts.routing.keyword import Keyword, features_of

OTHERS, NEW_OTHERS = list(EVERYDAY[::2]), list(EVERYDAY[1::2])


@pytest.fixture(scope="module")
def router() -> Keyword:
    return Keyword().fit(EXAMPLES, OTHERS)


def test_new_questions_find_their_expert(router):
    for name, prompts in NEW.items():
        for choice in router.route(prompts):
            assert choice.expert == name
            assert choice.confidence > 0.5
            assert choice.why.startswith(f"{name}: “")


def test_everyday_questions_are_for_the_base(router):
    choices = router.route(NEW_OTHERS)
    wrong = [(prompt, choice) for prompt, choice in zip(NEW_OTHERS, choices) if choice.expert]
    assert len(wrong) <= 3, wrong
    assert all(choice.why.startswith("no expert is likely enough: ") for choice in choices if not choice.expert)


def test_chances_of_all_experts_leave_the_rest_to_the_base(router):
    for choice in router.route([*NEW["poems"], *NEW_OTHERS[:5]]):
        assert choice.scores.keys() == EXAMPLES.keys()
        assert 0 <= sum(choice.scores.values()) <= 1 + 1e-9
        if choice.expert:
            assert choice.confidence == choice.scores[choice.expert] == max(choice.scores.values())
        else:
            assert choice.confidence == pytest.approx(1 - sum(choice.scores.values()))


def test_the_words_that_are_named_are_those_that_count(router):
    (choice,) = router.route(["The patient takes a drug and waits for the bus."])
    assert "“drug”" in choice.why
    assert "“patient”" in choice.why
    assert "“bus”" not in choice.why
    assert "“the”" not in choice.why.lower()
    (poem,) = router.route(["请背诵唐诗《春晓》"])
    assert "“唐诗”" in poem.why


def test_features_by_hand():
    assert sorted(features_of("Add 12")) == sorted(
        ["add", "0", "add 0", "\t ad", "\tadd", "\tdd ", "\t add", "\tadd ", "\t add ", "\t 0 "]
    )
    assert features_of("唐诗好") == ["唐", "诗", "好", "唐诗", "诗好"]
    assert features_of("成语ok") == ["成", "语", "成语", "\t ok", "\tok ", "\t ok ", "ok"]
    assert features_of("") == []


def test_words_of_the_card_count():
    """Questions that share nothing with the examples but a word of the card."""
    examples = {"a": ["where is north", "which way is it"], "b": ["who was king", "when did she rule"]}
    plain = Keyword().fit(examples, OTHERS)
    told = Keyword().fit(examples, OTHERS, about={"a": ["compass", "maps"], "b": ["royalty"]})
    (before,), (after,) = plain.route(["compass maps"]), told.route(["compass maps"])
    assert after.scores["a"] > before.scores["a"]
    assert after.scores["a"] > after.scores["b"]


def test_saved_and_loaded_it_chooses_the_same(router, tmp_path):
    prompts = [*SUMS, *MEDICINE, *NEW_OTHERS]
    router.save(tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["router.json", "router.safetensors"]
    again = Keyword().load(tmp_path / "one")
    for a, b in zip(router.route(prompts), again.route(prompts)):
        assert asdict(a) | {"seconds": 0} == asdict(b) | {"seconds": 0}


@pytest.mark.parametrize("harm", ["gone", "json", "version", "tensors"])
def test_a_damaged_folder_is_refused(router, tmp_path, harm):
    router.save(tmp_path)
    file = tmp_path / "router.json"
    if harm == "gone":
        file.unlink()
    elif harm == "json":
        file.write_text(file.read_text()[:100])
    elif harm == "version":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 0}))
    else:
        (tmp_path / "router.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="Delete the folder"):
        Keyword().load(tmp_path)


@pytest.mark.parametrize("prompt", ["", "  \n", "\u3000"])
def test_an_empty_question_is_the_bases(router, prompt):
    first, choice, last = router.route([SUMS[0], prompt, MEDICINE[0]])
    assert (choice.expert, choice.confidence, choice.why) == (None, 1.0, "the question is empty")
    assert (first.expert, last.expert) == ("sums", "medicine")
    assert router.route([]) == []


@pytest.mark.parametrize("prompt", ["?", "🙂", "\x00", "a", "的", "_"])
def test_odd_questions_get_an_answer(router, prompt):
    (choice,) = router.route([prompt])
    assert np.isfinite(choice.confidence)
    assert choice.why


def test_a_long_question_is_read_at_both_ends(router):
    filler = "word " * 10_000
    for prompt in (f"{MEDICINE[0]} {filler}", f"{filler} {MEDICINE[0]}"):
        (choice,) = router.route([prompt])
        assert choice.seconds < 2
        assert choice.scores["medicine"] == max(choice.scores.values())


def test_one_expert_alone():
    router = Keyword().fit({"sums": EXAMPLES["sums"]}, OTHERS)
    assert [c.expert for c in router.route([*NEW["sums"], *NEW_OTHERS[:10]])] == ["sums"] * 3 + [None] * 10


def test_three_questions_each():
    few = {name: texts[:3] for name, texts in EXAMPLES.items()}
    router = Keyword().fit(few, OTHERS)
    right = [c.expert == name for name, prompts in NEW.items() for c in router.route(prompts)]
    assert sum(right) >= 8


def test_a_question_of_two_experts_is_shared():
    """Both have it: neither is sure, and the reason names the other."""
    examples = {"a": EXAMPLES["medicine"], "b": [*EXAMPLES["medicine"], *EXAMPLES["sums"]], "c": EXAMPLES["poems"]}
    router = Keyword().fit(examples, OTHERS)
    (choice,) = router.route([EXAMPLES["medicine"][0]])
    assert choice.scores["a"] + choice.scores["b"] > 0.8
    assert max(choice.scores.values()) < 0.8
    assert "is near" in choice.why


def test_repeated_questions_count_once():
    router = Keyword().fit({"sums": EXAMPLES["sums"] * 3 + ["", " "]}, OTHERS + EXAMPLES["sums"][:2])
    assert router.examples[:9] == EXAMPLES["sums"]
    assert len(router.examples) == 9 + len(OTHERS), "a question of an expert is not nobody's"


@pytest.mark.parametrize(
    ("examples", "others", "match"),
    [
        ({}, OTHERS, "no experts"),
        ({"sums": ["one question", "one question "]}, OTHERS, r"routing, sums: 1 different questions.*at least 2"),
        ({"sums": SUMS}, ["what?"], "questions for nobody: 1 different"),
    ],
)
def test_too_few_questions_are_refused(examples, others, match):
    with pytest.raises(DataError, match=match):
        Keyword().fit(examples, others)


def test_before_it_is_fitted_it_does_not_choose():
    with pytest.raises(DataError, match="learnt nothing"):
        Keyword().route(["x"])
