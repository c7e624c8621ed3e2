"""The engine: whoever shares the batch, every ask gets its own expert's answer, and everyone hears of the end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from expert_kit import adapter
from expert_kit import library as make_library
from serving_kit import QUESTIONS, ask, open_engine, until, user

from retain.errors import ConfigError, ModelError
from retain.experts.asks import AUTO, Ask, Busy, Done, Failed, Piece, Stopping
from retain.experts.choice import Choice

NAMES = [None, "medicine", "poems", "history.v2"]


@pytest.fixture(scope="module")
def engine(tiny_folder, shelf):
    engine = open_engine(tiny_folder, shelf, rows=6).start()
    yield engine
    engine.stop()


def held(engine):
    """Keeps the engine from its next step, so that what comes meanwhile stands in the queue."""
    engine.pool.lock.acquire()
    return engine.pool.lock.release


class Ears:
    """Hears the events of one ask."""

    def __init__(self):
        self.events, self.over = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self.over.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def last(self):
        assert self.over.wait(20)
        return self.events[-1]


def test_the_experts_differ(alone):
    """Else a wrong one would not be noticed."""
    for question in QUESTIONS:
        assert len({alone(name, user(question), 12)[0] for name in NAMES}) == len(NAMES)


def test_every_row_of_a_mixed_batch_says_what_its_expert_says_alone(engine, alone):
    jobs = [(name, question, limit) for name in NAMES for question in QUESTIONS for limit in (3, 12)]

    def answer(job):
        name, question, limit = job
        return engine.answer(ask(alone, question, name, limit=limit))

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(answer, jobs))
    for (name, question, limit), found in zip(jobs, answers):
        assert (found.text, found.tokens) == alone(name, user(question), limit)
        assert found.choice.expert == name
        assert found.reason == ("length" if found.tokens == limit else "stop")
    until(lambda: engine.running == engine.waiting == 0)


def test_the_router_chooses_once_for_all_that_wait(engine, alone):
    asked = engine.router.asked
    release = held(engine)
    ears = [Ears() for _ in range(3)]
    questions = ["of poems", "of medicine", "of nothing"]
    for ear, question in zip(ears, questions):
        engine.submit(ask(alone, question, AUTO), ear)
    until(lambda: engine.waiting >= 2)
    release()
    for ear, question, name in zip(ears, questions, ["poems", "medicine", None]):
        assert ear.last.tokens
        assert ear.events[0] == Choice(name, 0.9, {name: 0.9} if name else {}, f"it says {name}", 0.001)
        assert ear.text == alone(name, user(question), 12)[0]
    assert engine.router.asked <= asked + 2


def test_text_comes_while_it_is_written(engine, alone):
    events = list(engine.stream(ask(alone, QUESTIONS[1], "poems")))
    pieces = [event.text for event in events if isinstance(event, Piece)]
    assert len(pieces) > 3
    assert "".join(pieces) == alone("poems", user(QUESTIONS[1]), 12)[0]


def test_a_sampled_answer_depends_on_its_seed_and_not_on_who_shares_the_batch(engine, alone):
    warm = {"temperature": 1.0, "top_p": 0.8, "limit": 16}
    asks = [ask(alone, QUESTIONS[i % 4], NAMES[i % 4], seed=i, **warm) for i in range(8)]
    single = [engine.answer(one).text for one in asks]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda one: engine.answer(one).text, asks)) == single
    assert engine.answer(replace(asks[0], seed=99)).text != single[0]
    assert engine.answer(replace(asks[0], temperature=1e-4)).text == alone(None, user(QUESTIONS[0]), 16)[0]


def test_sampled_tokens_follow_the_models_distribution(engine, alone):
    """First tokens of many seeds against the softmax of the logits, and top_p cuts what it should."""
    one = ask(alone, QUESTIONS[0], "medicine", temperature=0.5, limit=1)
    alone.pool.activate("medicine")
    with torch.no_grad():
        p = torch.softmax(alone.pool.model(torch.tensor([one.ids])).logits[0, -1] / 0.5, dim=-1)
    best, token = p.max(dim=-1)
    text = alone.tokenizer.decode([int(token)], skip_special_tokens=True)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda seed: engine.answer(replace(one, seed=seed)).text, range(300)))
    share, spread = found.count(text) / 300, (float(best) * (1 - float(best)) / 300) ** 0.5
    assert abs(share - float(best)) < 4 * spread + 0.01
    assert {engine.answer(replace(one, seed=s, top_p=float(best) / 2)).text for s in range(8)} == {text}


def test_stop_strings_end_an_answer_before_them(engine, alone):
    whole = alone("medicine", user(QUESTIONS[2]), 12)[0]
    stop = whole[4:6]
    found = engine.answer(ask(alone, QUESTIONS[2], "medicine", stop=(stop, "never there")))
    assert found.text == whole[: whole.index(stop)]
    assert found.reason == "stop"
    assert found.tokens < 12


def test_a_cancelled_row_leaves_and_the_others_go_on(engine, alone):
    ears, release = [Ears(), Ears()], held(engine)
    first = engine.submit(ask(alone, QUESTIONS[0], "poems", limit=400), ears[0])
    engine.submit(ask(alone, QUESTIONS[1], "medicine", limit=40), ears[1])
    release()
    until(lambda: ears[0].events)
    first.cancel()
    assert ears[1].last.tokens
    until(lambda: engine.running == 0)
    assert ears[1].text == alone("medicine", user(QUESTIONS[1]), 40)[0]
    assert not ears[0].over.is_set()
    stream = engine.stream(ask(alone, QUESTIONS[0], limit=400))
    next(stream)
    stream.close()
    until(lambda: engine.running == 0)


def test_a_listener_that_fails_is_one_that_has_left(engine, alone):
    def broken(event):
        raise RuntimeError("nobody here")

    ticket = engine.submit(ask(alone, QUESTIONS[0], limit=400), broken)
    until(lambda: ticket.cancelled and engine.running == 0)


def test_what_can_never_be_answered_is_refused_at_once(engine, alone, tiny_folder, shelf):
    with pytest.raises(ConfigError, match=r"unknown 'medicin'.* Did you mean 'medicine'"):
        engine.submit(ask(alone, "?", "medicin"), print)
    with pytest.raises(ConfigError, match="context is 512"):
        engine.submit(Ask((5,) * 500, limit=13), print)
    with pytest.raises(ConfigError, match="no tokens"):
        engine.submit(Ask(()), print)
    with pytest.raises(ConfigError, match="no router"):
        open_engine(tiny_folder, shelf, router=None).check(ask(alone, "?", AUTO))


def test_the_queue_is_bounded(tiny_folder, shelf, alone):
    engine = open_engine(tiny_folder, shelf, rows=1, waiting=2).start()
    ears = [Ears() for _ in range(3)]
    release = held(engine)
    engine.submit(ask(alone, QUESTIONS[0]), ears[0])
    until(lambda: engine.waiting <= 1)
    while engine.waiting < 2:
        engine.submit(ask(alone, QUESTIONS[0]), ears[1])
    with pytest.raises(Busy, match="requests are waiting") as full:
        engine.submit(ask(alone, QUESTIONS[0]), ears[2])
    assert full.value.wait >= 1
    release()
    until(lambda: engine.waiting == engine.running == 0)
    engine.stop()


def test_stopping_finishes_what_is_there_and_refuses_what_comes(tiny_folder, shelf, alone):
    engine = open_engine(tiny_folder, shelf, rows=1).start()
    ears = [Ears(), Ears()]
    for ear in ears:
        engine.submit(ask(alone, QUESTIONS[0], "poems"), ear)
    engine.stop(20)
    assert [ear.text for ear in ears] == [alone("poems", user(QUESTIONS[0]), 12)[0]] * 2
    with pytest.raises(Stopping):
        engine.submit(ask(alone, "?"), print)


def test_what_is_not_finished_in_time_is_told_so(tiny_folder, shelf, alone):
    engine = open_engine(tiny_folder, shelf, rows=1).start()
    ears = [Ears(), Ears()]
    for ear in ears:
        engine.submit(ask(alone, QUESTIONS[0], limit=400), ear)
    until(lambda: ears[0].events)
    engine.stop(0)
    assert all(isinstance(ear.last.error, Stopping) for ear in ears)
    assert not engine.alive


def test_experts_that_do_not_fit_together_take_turns(tiny_folder, shelf, alone):
    sizes = {name: shelf.card(name).bytes for name in shelf.names()}
    engine = open_engine(tiny_folder, shelf, limit=max(sizes.values())).start()
    jobs = [(name, question) for question in QUESTIONS for name in shelf.names()]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda job: engine.answer(ask(alone, job[1], job[0])), jobs))
    for (name, question), found in zip(jobs, answers):
        assert found.text == alone(name, user(question), 12)[0]
    assert engine.pool.bytes <= max(sizes.values())
    engine.pool.limit = min(sizes.values())
    large = max(sizes, key=sizes.__getitem__)
    with pytest.raises(ModelError, match="are allowed"):
        engine.answer(ask(alone, "?", large))
    assert engine.answer(ask(alone, QUESTIONS[0])).text == alone(None, user(QUESTIONS[0]), 12)[0]
    engine.stop()


def test_an_expert_that_is_removed_while_it_answers_ends_alone(tiny_folder, tmp_path, alone):
    library = make_library(tiny_folder, tmp_path / "experts")
    engine = open_engine(tiny_folder, library).start()
    ears, release = [Ears(), Ears()], held(engine)
    engine.submit(ask(alone, QUESTIONS[0], "poems", limit=300), ears[0])
    engine.submit(ask(alone, QUESTIONS[1], "medicine", limit=60), ears[1])
    release()
    until(lambda: ears[0].events and ears[1].events)
    library.remove("poems")
    assert "poems" in str(ears[0].last.error)
    assert ears[1].last.tokens
    assert ears[1].text == alone("medicine", user(QUESTIONS[1]), 60)[0]
    engine.stop()


def test_answers_are_remembered_when_asked_for(tiny_folder, tmp_path, alone):
    library = make_library(tiny_folder, tmp_path / "experts")
    engine = open_engine(tiny_folder, library, remember=2).start()
    one = ask(alone, QUESTIONS[0], "poems")
    first = engine.answer(one)
    assert engine.answer(one) == first
    assert engine.remembered == 1
    assert first.text == alone("poems", user(QUESTIONS[0]), 12)[0]
    for other in (replace(one, expert=None), replace(one, limit=11), replace(one, temperature=0.5)):
        engine.answer(other)
    assert engine.remembered == 1
    engine.answer(one)  # two others came since
    assert engine.remembered == 1
    library.remove("poems")
    library.add("poems", adapter(tiny_folder, tmp_path / "other", 8, ["q_proj", "down_proj"], seed=7))
    assert engine.answer(one).text != first.text, "other weights under the same name"
    engine.stop()


def test_a_model_that_fails_is_told_and_the_engine_goes_on(tiny_folder, shelf, alone, monkeypatch):
    engine = open_engine(tiny_folder, shelf).start()
    with monkeypatch.context() as patched:
        patched.setattr(engine.router, "route", lambda prompts: 1 / 0)
        with pytest.raises(ModelError, match=r"failed \(ZeroDivisionError\)"):
            engine.answer(ask(alone, "?", AUTO))
        patched.setattr(type(engine._loop._batch), "step", lambda batch, tokens: 1 / 0)
        with pytest.raises(ModelError, match=r"failed \(ZeroDivisionError\)"):
            engine.answer(ask(alone, QUESTIONS[0], "poems"))
    assert engine.answer(ask(alone, QUESTIONS[0], "poems")).text == alone("poems", user(QUESTIONS[0]), 12)[0]
    engine.stop()


def test_an_engine_that_dies_leaves_nobody_waiting(tiny_folder, shelf, alone, monkeypatch):
    engine = open_engine(tiny_folder, shelf)
    monkeypatch.setattr(engine._loop, "_admit", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine.start()
    with pytest.raises(Stopping):
        engine.answer(ask(alone, QUESTIONS[0]))
    until(lambda: not engine.alive)
    with pytest.raises(Stopping):
        engine.answer(ask(alone, QUESTIONS[0]))
