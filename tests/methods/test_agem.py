"""A-GEM: the reference is the gradient of the drawn old rows, and old rows do not get worse."""

import types
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from training_kit import other_rows, rows, same_bits, stored, train, trainer

from retain.data.buffer import Buffer
from retain.errors import ConfigError
from retain.functional.projection import dot
from retain.methods import agem
from retain.methods.agem import AGEM
from retain.methods.context import Run
from retain.models import params


def slow_reference(model, batches):
    """Mean cross-entropy of the supervised tokens by whole logits, and its gradient."""
    losses, tokens = [], 0
    for inputs, labels in batches:
        mask = labels[:, 1:] != -100
        logits = model(**inputs).logits[:, :-1][mask].double()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[:, 1:][mask], reduction="sum"))
        tokens += int(mask.sum())
    loss = sum(losses) / tokens
    return loss, torch.autograd.grad(loss, list(params.trainable(model).values()))


@pytest.fixture
def trained(tmp_path):
    model = tiny_model(tiny_tokenizer(), attention_dropout=0.5).double()
    return train([AGEM(batch_size=5)], tmp_path, model, steps=1, old=other_rows())


def test_gradient_is_projected_by_the_reference_without_dropout(trained):
    method, run, model = trained.stack.methods[0], trained.run, trained.model.eval()
    run.step = 3
    loss, reference = slow_reference(model, method.batches(run))
    learning = list(params.trainable(model).values())
    generator = torch.Generator().manual_seed(1)
    for sign in (-1.0, 1.0):
        before = [
            sign * r + 0.1 * r.norm() * torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in reference
        ]
        for p, g in zip(learning, before):
            p.grad = g.clone()
        model.train()
        method.edit_gradients(model, run)
        assert model.training
        push = min(0.0, dot(before, reference)) / dot(reference, reference)
        for p, g, r in zip(learning, before, reference):
            torch.testing.assert_close(p.grad, g - push * r, rtol=1e-5, atol=1e-7)
        model.eval()
    assert trained.terms.noted["loss/agem"][-1] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert trained.terms.noted["agem/turned"][-2:] == [1, 0]


def test_where_nothing_clashes_it_is_plain_training_bit_for_bit(tmp_path):
    made = train([AGEM()], tmp_path / "agem")
    assert [e["agem/turned"] for e in made.state.log_history if "agem/turned" in e] == [0, 0, 0, 0]
    assert same_bits(stored(made.model), stored(train([], tmp_path / "plain").model))


def test_old_rows_do_not_get_worse_where_plain_descent_makes_them(tmp_path):
    """With all old rows as the reference, each step of plain gradient descent holds their loss to first order."""
    answer = [{"role": "assistant", "content": "land"}]
    old = Dataset.from_list([{"prompt": row["prompt"], "completion": answer} for row in rows(12)])
    learned = train([], tmp_path / "old", train_rows=old, steps=10, learning_rate=2e-2).model.state_dict()

    def losses(strength):
        model = tiny_model(tiny_tokenizer())
        model.load_state_dict(learned)
        settings = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        method = AGEM(strength=strength, batch_size=12)
        made = train([method], tmp_path / str(strength), model, old=old, steps=5, **settings)
        return [e["loss/agem"] for e in made.state.log_history if "loss/agem" in e]

    held, plain = losses(1.0), losses(1e-9)
    assert held[0] == plain[0]
    assert plain[-1] - plain[0] > 5e-4
    assert max(b - a for a, b in pairwise(held)) < 0.05 * min(b - a for a, b in pairwise(plain))


def test_rows_are_drawn_anew_by_seed_and_step(trained):
    method, run = trained.stack.methods[0], trained.run

    def draw(step):
        run.step = step
        return [tuple(row) for inputs, _ in method.batches(run) for row in inputs["input_ids"].tolist()]

    draws = [draw(step) for step in range(6)]
    assert all(len(set(rows_)) == 5 for rows_ in draws)
    assert len({tuple(sorted(rows_)) for rows_ in draws}) == 6
    assert draw(2) == draws[2]
    run.seed += 1
    assert draw(2) != draws[2]


def test_processes_share_the_rows_of_a_step(trained, monkeypatch):
    method, run = trained.stack.methods[0], trained.run

    def drawn(rank, ranks):
        fake = types.SimpleNamespace(process_index=rank, num_processes=ranks)
        monkeypatch.setattr(agem, "PartialState", lambda: fake)
        batches = list(method.batches(run))
        return sorted(
            tuple(i for i, m in zip(row, mask) if m)
            for inputs, _ in batches
            for row, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist())
        )

    whole = drawn(0, 1)
    assert sorted(drawn(0, 2) + drawn(1, 2)) == whole
    assert [len(drawn(rank, 8)) for rank in range(8)] == [1, 1, 1, 1, 1, 0, 0, 0]


def test_rows_of_earlier_tasks_are_a_memory_too(tmp_path):
    def task(index, new, **settings):
        run = Run(
            tmp_path / f"{index}",
            task=f"t{index}",
            task_index=index,
            shared=tmp_path,
            new_rows=new,
            say=lambda line: None,
        )
        return train([AGEM(rows=6, **settings)], tmp_path / f"{index}", old=other_rows(), steps=1, run=run)

    assert len(task(1, rows(4)).stack.methods[0]._rows) == 6
    second = task(2, rows(10, 50))
    assert len(second.stack.methods[0]._rows) == 6 + 4
    again = task(2, rows(10, 50))  # as a run that was killed at its very end
    assert again.stack.methods[0]._rows["input_ids"] == second.stack.methods[0]._rows["input_ids"]
    assert Buffer(tmp_path / "buffer" / "tasks").counts("source") == {"t1": 4, "t2": 10}
    assert len(task(3, None, buffer=0).stack.methods[0]._rows) == 6


def test_no_old_row_left_is_an_error(tmp_path):
    made = trainer([AGEM()], tmp_path)
    made.run.tokenise = lambda part: part.select([])
    with pytest.raises(ConfigError, match=r"methods\.agem: no old row is left"):
        made.stack.methods[0].on_task_start(made.model, made.run)
