"""Text while it comes: the pieces are the whole, characters are whole, nothing of a stop string gets out."""

from __future__ import annotations

import random

import pytest
from tiny import tiny_tokenizer

from retain.experts.text import UNKNOWN, TextStream

TEXTS = ["春眠不觉晓，处处闻啼鸟。", "naïve café — ∑ 🙂👍🏽", "Seven small ships sailed over the cold northern sea."]


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream, found = TextStream(tiny_tokenizer(), stop), []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found, stream
    return [*found, stream.finish()], stream


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_whole_and_the_pieces_are_the_text(text):
    found, _ = pieces(tiny_tokenizer().encode(text))
    assert "".join(found) == text
    assert not any(UNKNOWN in piece for piece in found)


def test_every_piece_comes_as_soon_as_it_can():
    ids = tiny_tokenizer().encode("一二")
    found, _ = pieces(ids)
    assert len(ids) == 6, "three bytes each, a token for every byte"
    assert found == ["", "", "一", "", "", "二", ""]


def test_random_tokens_are_the_decoders_text():
    """Also bytes that are no character at all, at any place, and special tokens among them."""
    tokenizer, draw = tiny_tokenizer(), random.Random(0)
    for _ in range(1000):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 30))]
        found, _ = pieces(ids)
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stop_string_ends_the_text_and_nothing_of_it_gets_out():
    tokenizer, draw = tiny_tokenizer(), random.Random(1)
    for _ in range(500):
        text = "".join(draw.choice("ab ") for _ in range(30))
        stop = tuple("".join(draw.choice("ab ") for _ in range(draw.randrange(1, 4))) for _ in range(2))
        ids = tokenizer.encode(text)
        found, stream = pieces(ids, stop)
        ends = [place for place in map(text.find, stop) if place >= 0]
        assert stream.stopped == bool(ends)
        before = "".join(found)
        assert not any(s in before for s in stop)
        assert text.startswith(before)
        # the end is looked for after every token, so that of two stop strings the one that is whole first counts
        assert len(before) in ends if ends else before == text


def test_what_may_begin_a_stop_string_waits_and_then_comes():
    stream = TextStream(tiny_tokenizer(), ("END",))
    ids = tiny_tokenizer().encode("xENx")
    found = [stream.push(token) for token in ids]
    assert "".join(found) == "xENx"
    assert not stream.stopped
    stream = TextStream(tiny_tokenizer(), ("END",))
    found = [stream.push(token) for token in tiny_tokenizer().encode("xEN")]
    assert "".join(found) == "x"
    assert stream.finish() == "EN"
