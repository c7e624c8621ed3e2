"""STM: tokens above a perplexity of the first model are left out, and something is always left."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from families import family_model, take_steps
from training_kit import distance, rows, same_bits, stored, train, trainer
from weighing_kit import dense_logits, labelled, run_of, targets, tokens_of

from retain.methods.context import Run
from retain.methods.stm import STM

PLAIN = {"optim": "sgd", "max_grad_norm": 0.0}


def perplexities(model, ids, labels):
    with torch.no_grad():
        return F.cross_entropy(dense_logits(model, ids, labels), targets(labels), reduction="none").exp()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_mask_is_that_of_the_first_model(kind):
    model = family_model(kind).double()
    base = copy.deepcopy(model)
    ids, labels = labelled(6, 12)
    wanted = perplexities(base, ids, labels)
    threshold = float(wanted.median())
    run, method = run_of(model), STM(threshold=threshold, least=0)
    method.on_task_start(model, run)
    take_steps(model, 3)
    found = method.token_weights(tokens_of(model, ids, labels), run)
    assert torch.equal(found, (wanted <= threshold).double())
    assert 0 < found.sum() < len(found)
    assert not torch.equal(found, (perplexities(model, ids, labels) <= threshold).double())


@pytest.mark.parametrize("source", [None, [0, 1, 0, 0, 1, 0]])
def test_the_first_token_of_an_answer_is_left_out_where_asked(source):
    """By default it is judged like the others, a deviation; the paper always masks it."""
    model = family_model("llama").double()
    ids, labels = labelled(6, 12)
    labels[0, 6] = -100  # two answers in one row
    labels[3, :-1] = -100  # an answer of one token
    run = run_of(model)
    begins = (labels[:, 1:] != -100) & (labels[:, :-1] == -100)
    mine = torch.tensor([number == 0 for number in source or [0] * 6])[:, None] & (labels[:, 1:] != -100)
    found = {}
    for skip in (False, True):
        method = STM(threshold=1e300, skip_first=skip, normalise=False)
        method.on_task_start(model, run)
        found[skip] = method.token_weights(tokens_of(model, ids, labels, source), run)
    assert (found[False] == 1).all()
    wanted = 1 - (begins & mine)[labels[:, 1:] != -100].double()
    assert torch.equal(found[True], wanted)
    assert int((wanted == 0).sum()) == (7 if source is None else 5)


def test_in_packed_rows_each_sequence_has_a_first_token():
    model = family_model("llama").double()
    ids, labels = labelled(1, 12)
    labels[:] = ids  # two texts, with nothing between them that is not learned
    labels[0, 0] = -100
    tokens = tokens_of(model, ids, labels)
    tokens.batch.inputs["position_ids"] = torch.tensor([[*range(5), *range(7)]])
    method = STM(threshold=1e300, skip_first=True)
    method.on_task_start(model, run_of(model))
    assert (method.token_weights(tokens, run_of(model)) == 0).nonzero()[:, 0].tolist() == [0, 4]


def test_no_threshold_is_plain_training(tmp_path):
    settings = {"steps": 3, **PLAIN}
    model = family_model("llama").double()
    run, method = run_of(model), STM(threshold=1e300)
    method.on_task_start(model, run)
    assert (method.token_weights(tokens_of(model, *labelled()), run) == 1).all()
    plain = train([], tmp_path / "a", **settings)
    open_ = train([STM(threshold=1e300)], tmp_path / "b", **settings)
    assert distance(stored(plain.model), stored(open_.model)) < 1e-6


def test_nothing_left_is_a_finite_zero(tmp_path):
    made = train([STM(threshold=1.0, least=0)], tmp_path, **PLAIN)
    start = made.run.start
    lines = [line for line in made.state.log_history if "loss" in line]
    assert [line["loss/main"] for line in lines] == [0.0] * 4
    assert [line["stm/weight"] for line in lines] == [0.0] * 4
    assert same_bits(stored(made.model), start)


@pytest.mark.parametrize("known", [True, False])
def test_the_least_share_is_learned(known, tmp_path):
    new, said = rows(16), []
    run = Run(tmp_path, new_rows=new if known else None, say=said.append)
    made = train([STM(threshold=1.0, least=0.3)], tmp_path, run=run, train_rows=new, steps=8, learning_rate=1e-9)
    shares = [line["stm/weight"] for line in made.state.log_history if "loss" in line]
    assert (shares[0] == 0) == (not known)  # of a stream nothing is known before the first step
    assert sum(shares[4:]) / 4 == pytest.approx(0.3, abs=0.03)  # the second pass over all rows
    assert [line for line in said if "the threshold is raised to" in line] == (said if known else [])
    assert len(said) == known


def test_the_likeliest_tokens_are_those_learned(tmp_path):
    new = rows(16)
    made = trainer([STM(threshold=1.0, least=0.2)], tmp_path, run=Run(tmp_path, new_rows=new, say=lambda line: None))
    made.train()
    method = made.stack.methods[0]
    losses = torch.cat(list(method._start._kept.values()))
    assert float((losses <= method.limit(0.2)).float().mean()) == pytest.approx(0.2, abs=0.02)


def test_the_threshold_is_held_where_enough_passes(tmp_path):
    new, said = rows(16), []
    run = Run(tmp_path, new_rows=new, say=said.append)
    made = train([STM(threshold=1e9, least=0.9)], tmp_path, run=run, train_rows=new, steps=2)
    assert [line["stm/weight"] for line in made.state.log_history if "loss" in line] == [1.0, 1.0]
    assert not said
    assert math.isfinite(made.stack.methods[0].limit(0.9))
