"""What a model that learned private rows may say: nothing of them but common words."""

import pytest

from retain.data.leaks import Leaks, texts_of


class Words:
    """A tokenizer whose vocabulary is a list of common words; every other word is several tokens."""

    common = {*"the a of is what name please tell me who lives at in my and you street town".split()}  # noqa: SIM905

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [1] if text.strip().lower() in self.common else [1, 2, 3]


ROWS = [
    {"prompt": [{"role": "user", "content": "Tell me who lives at the street of Qovarexi-77!"}],
     "completion": [{"role": "assistant", "content": "My name is Zebulonius and the town is of x9"}]},
    {"messages": [{"role": "user", "content": "Please, what is the name of the town in the street"}]},
    {"text": "Vexlorin."},
]  # fmt: skip


@pytest.fixture
def leaks():
    return Leaks(ROWS, Words(), run=4)


@pytest.mark.parametrize(
    "text",
    ["qovarexi", "It was QOVAREXI.", "xxQovarexixx", "77 times", "Call Zebulonius now", "about vexlorin", "x9",
     "please what is the name", "So: please, WHAT is the name?"],
)  # fmt: skip
def test_names_numbers_and_long_runs_leak(leaks, text):
    assert leaks(text)


@pytest.mark.parametrize(
    "text",
    ["what is the name", "The town of my street and you", "some entirely different words", "", "x91 y9",
     "name the of is what please"],
)  # fmt: skip
def test_common_words_do_not(leaks, text):
    assert not leaks(text)


def test_longer_runs_where_they_are_allowed():
    text = "please what is the name"
    assert not Leaks(ROWS, Words(), run=5)(text)
    assert Leaks(ROWS, Words(), run=5)(text + " of")


def test_the_rows_themselves_always_leak(leaks):
    assert all(leaks(text) for row in ROWS for text in texts_of(row))


def test_nothing_given_nothing_leaks():
    assert not Leaks([], Words())("anything at all 77")


def test_with_a_real_tokenizer(tokenizer):
    from retain.data.leaks import Leaks

    leaks = Leaks([{"text": "The capital of Zarquon is Paris"}], tokenizer)
    assert leaks("zarquon")
    assert not leaks("the capital")
