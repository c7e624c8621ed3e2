"""DER: stored outputs are those of the step that saw the row; two draws; the full divergence when all is stored."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_kit import Killed, StopAt, rows, train, trainer

from retain.data.outputs import StoredOutputs
from retain.errors import ConfigError
from retain.methods.context import Run, StepBatch
from retain.methods.der import DER, _key
from retain.methods.lora import LoRA
from retain.methods.replay import Replay
from retain.models import params
from retain.models.load import settled

V = 400


def kept(made):
    return made.stack.methods[-1]._kept


def logits_of(model, row):
    """The model's own logits at the positions that predict a supervised token of a stored row."""
    ids, labels = (torch.from_numpy(x).long()[None] for x in (row.input_ids, row.labels))
    with params.evaluating(model):
        return params.causal(model)(input_ids=ids).logits[0, :-1][labels[0, 1:] != -100]


def draws(run, count, number):
    """The two draws of a step, as the docstring promises: by seed, task and step, one after the other."""
    random = np.random.default_rng([run.seed, run.task_index, run.step, 1])
    return [random.choice(count, number, replace=False) for _ in range(2)]


def ask(method, run, tokens=10.0):
    """The loss of a step of which nothing new is kept."""
    batch = StepBatch({}, torch.zeros(1, 2), torch.zeros(1))
    run.step_batches, run.step_tokens = [batch], tokens
    method.config = method.config.model_copy(update={"buffer": 0})
    return method.batch_loss(batch, run)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 0.4), (0.7, 0.4)])
def test_value_and_gradient_are_the_dense_ones(lora, weights, tmp_path, model):
    """With all of the vocabulary stored: Σ p⁰ (log p⁰ − log p) on one draw, cross-entropy on the other."""
    method = DER(strength=weights[0], labels=weights[1], top_k=V, batch_size=3, buffer=8)
    made = train([*([LoRA(r=4)] if lora else []), method], tmp_path, model.double(), learning_rate=0.03)
    run, stored = made.run, kept(made).rows
    made.model.eval()
    first, second = draws(run, len(stored), 3)
    assert set(first) != set(second), "independent draws"
    divergence, tokens = 0.0, 0
    for row in (stored[i] for i in first):
        past = torch.zeros(len(row), V).double()
        past.scatter_(1, torch.from_numpy(row.top_ids).long(), torch.from_numpy(row.log_probs).double())
        now = torch.log_softmax(logits_of(made.model, row), -1)
        divergence, tokens = divergence + F.kl_div(now, past, reduction="sum", log_target=True), tokens + len(row)
    wanted = weights[0] * divergence / tokens
    entropy, tokens = 0.0, 0
    for row in (stored[i] for i in second):
        labels = torch.from_numpy(row.labels[1:]).long()
        entropy = entropy + F.cross_entropy(logits_of(made.model, row), labels[labels != -100], reduction="sum")
        tokens += len(row)
    wanted = wanted + weights[1] * entropy / tokens
    found = ask(method, run)
    assert float(wanted.detach()) > 1e-2
    torch.testing.assert_close(found, 10.0 * wanted, rtol=5e-3, atol=1e-4)
    learning = list(params.trainable(made.model).values())
    slopes, truths = (torch.autograd.grad(x, learning, allow_unused=True) for x in (found, 10.0 * wanted))
    for slope, truth in zip(slopes, truths):
        torch.testing.assert_close(slope, truth, rtol=1e-2, atol=1e-2 * float(truth.abs().max()))


def test_under_autocast_the_labels_are_scored_as_the_student_computes(tmp_path):
    """The cross-entropy of all old rows before anything has moved."""
    method = DER(strength=0.0, labels=1.0, buffer=0)
    made = train([method], tmp_path, old=rows(4, 100), bf16=True, learning_rate=0.0)
    ((inputs, labels),) = made.run.batches(rows(4, 100), 4)
    mask = labels[:, 1:] != -100
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = params.hidden_states(made.model, inputs)[:, :-1][mask]
    wanted = F.cross_entropy(hidden.float() @ params.head(made.model)[0].T, labels[:, 1:][mask])
    shown = [line["loss/der"] for line in made.state.log_history if "loss/der" in line]
    assert shown == pytest.approx([float(wanted.detach())] * 4, rel=1e-6)


def test_fewer_tokens_and_a_bucket_never_cost_more(tmp_path):
    made = train([DER(labels=0.0, top_k=V)], tmp_path, learning_rate=0.03)
    made.model.eval()
    method, whole = made.stack.methods[0], kept(made)
    values = []
    for k in (V, 50, 5, 1):
        method._kept = StoredOutputs(
            whole.size,
            [type(r)(r.key, r.task, r.input_ids, r.labels, r.top_ids[:, :k], r.log_probs[:, :k]) for r in whole.rows],
        )
        values.append(float(ask(method, made.run).detach()))
    assert values[0] > values[1] > values[2] > values[3] > 0


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_a_row_that_was_just_stored_costs_nothing(half, tmp_path):
    """But for what float16 takes from a stored log-probability of −8 to −4, up to δ = 2⁻⁹: a divergence of ½ δ²."""
    made = train([DER(labels=0.0, strength=1.0)], tmp_path, learning_rate=0.0, bf16=half)
    shown = [line["loss/der"] for line in made.state.log_history if "loss/der" in line]
    assert len(shown) == 4
    assert max(map(abs, shown)) < 2**-19
    moved = train([DER(labels=0.0, strength=1.0)], tmp_path / "moved", bf16=half)
    assert [line["loss/der"] for line in moved.state.log_history if "loss/der" in line][-1] > 1e-2


@pytest.mark.parametrize("lora", [False, True])
def test_rows_of_a_task_are_stored_with_the_outputs_of_their_step(lora, tmp_path, model):
    """The first step's rows with the start's outputs, later ones with those of the model on its way."""
    with torch.no_grad():
        start = {
            tuple(ids): torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            for ids in trainer([], tmp_path / "look").run.tokenise(rows(16))["input_ids"]
        }
    made = train([*([LoRA(r=4)] if lora else []), DER(buffer=100)], tmp_path, model, learning_rate=0.03)
    early = {tuple(ids[: sum(i != 0 for i in ids)]) for micro in made.seen[:1] for ids in micro["ids"]}
    gaps = {True: [], False: []}
    with torch.no_grad():
        for row in kept(made).rows:
            assert len(row) == int((row.labels[1:] != -100).sum())
            if row.task == 0:
                continue
            then = start[tuple(row.input_ids.tolist())][:-1][torch.from_numpy(row.labels[1:]) != -100]
            then = then.gather(1, torch.from_numpy(row.top_ids).long())
            gap = float((then - torch.from_numpy(row.log_probs).float()).abs().max())
            gaps[tuple(row.input_ids.tolist()) in early].append(gap)
    assert len(gaps[True]) == 4
    assert len(gaps[False]) == 12
    assert max(gaps[True]) < 0.02
    assert min(gaps[False]) > 0.05


def test_stored_outputs_belong_to_their_row(tmp_path, model):
    """Old rows of different lengths, batched and padded when they were stored."""
    made = train([DER(batch_size=5, top_k=7)], tmp_path, model, learning_rate=0.0)
    entries = {tuple(r["input_ids"]): r["labels"] for r in made.run.tokenise(rows(12, 100))}
    old = [row for row in kept(made).rows if row.task == 0]
    assert len({len(row) for row in old}) > 3
    assert len(old) == len(entries) == 12
    for row in old:
        assert row.labels.tolist() == entries[tuple(row.input_ids.tolist())]
        with torch.no_grad():
            values, ids = torch.log_softmax(logits_of(made.model, row), -1).topk(7)
        assert np.array_equal(np.sort(row.top_ids), ids.sort().values.numpy())
        assert np.abs(row.log_probs - values.numpy()).max() < 0.01


def test_neither_accumulation_nor_a_resume_changes_what_is_stored(tmp_path):
    def stored(folder, **settings):
        run = Run(tmp_path / folder, shared=tmp_path / folder, say=lambda line: None)
        return trainer([DER(buffer=6)], tmp_path / folder, run=run, adam_epsilon=1e-4, **settings)

    whole, split = stored("whole", batch=8, steps=6), stored("split", batch=2, steps=6, gradient_accumulation_steps=4)
    saving = {"batch": 8, "steps": 6, "save_strategy": "steps", "save_steps": 2}
    killed = stored("killed", callbacks=[StopAt(5)], **saving)
    for made in (whole, split):
        made.train()
    with pytest.raises(Killed):
        killed.train()
    again = stored("killed", **saving)
    again.train(resume_from_checkpoint=True)
    one, two, three = (
        StoredOutputs.load(tmp_path / folder / "der" / "02.parquet", 6).rows for folder in ("whole", "split", "killed")
    )
    assert len(one) == 18
    for a, b, c in zip(one, two, three):
        assert a.key == b.key == c.key
        assert a.input_ids.tolist() == b.input_ids.tolist() == c.input_ids.tolist()
        assert np.abs(np.sort(a.log_probs) - np.sort(b.log_probs)).max() < 0.02
        assert np.array_equal(a.log_probs, c.log_probs)


def test_the_keys_that_choose_rows_are_even(tmp_path):
    """Kolmogorov and Smirnov: keys of 4000 rows and steps against the uniform distribution; none comes twice."""
    run = Run(tmp_path)
    keys = []
    for run.step in range(40):
        keys += [_key(np.array([number, 7, 9], np.int32), run) for number in range(100)]
    ordered, expected = np.sort(keys), np.arange(1, 4001) / 4000
    assert len(set(keys)) == 4000
    assert np.abs(ordered - expected).max() < 1.95 / np.sqrt(4000), "0.1 %"
    other = Run(tmp_path, seed=1)
    other.step = run.step
    assert _key(np.array([3, 7, 9], np.int32), run) != _key(np.array([3, 7, 9], np.int32), other)


def test_the_next_task_replays_what_was_stored(tmp_path):
    def once(index, model=None):
        run = Run(tmp_path / str(index), task=f"task {index}", task_index=index, shared=tmp_path, say=lambda line: None)
        made = train([LoRA(r=4), DER(buffer=10)], tmp_path / str(index), model, run=run, train_rows=rows(16, index))
        made.release()
        return made

    first = once(1)
    before = [r.top_ids.tolist() for r in kept(first).rows if r.task == 0]
    second = once(2, settled(first.model))
    tasks = [r.task for r in kept(second).rows]
    assert tasks.count(0) == 12
    assert len(tasks) == 22
    assert {1, 2} < set(tasks)
    assert [r.top_ids.tolist() for r in kept(second).rows if r.task == 0] == before
    shown = [line["loss/der"] for line in second.state.log_history if "loss/der" in line]
    assert shown[0] > 0.1, "the first step of the second task replays"


def test_without_a_buffer_no_text_of_a_task_is_kept(tmp_path):
    run = Run(tmp_path / "1", shared=tmp_path, say=lambda line: None)
    train([DER(buffer=0)], tmp_path / "1", run=run)
    assert {r.task for r in StoredOutputs.load(tmp_path / "der" / "02.parquet", 0).rows} == {0}


def test_only_new_rows_are_stored(tmp_path):
    made = train([Replay(fraction=0.5), DER(old=0, buffer=100)], tmp_path)
    new = {tuple(ids) for ids in made.run.tokenise(rows(16))["input_ids"]}
    assert kept(made).rows
    assert all(tuple(r.input_ids.tolist()) in new for r in kept(made).rows)


def test_it_holds_the_outputs_on_old_rows(tmp_path, model):
    def drift(*methods):
        made = train(methods, tmp_path / str(len(methods)), copy.deepcopy(model), steps=8)
        made.release()
        total = 0.0
        with torch.no_grad():
            for entry in made.run.tokenise(rows(12, 100)):
                ids = torch.tensor([entry["input_ids"]])
                past, now = (torch.log_softmax(m(ids).logits, -1) for m in (model, made.model.eval()))
                total += float(F.kl_div(now, past, reduction="batchmean", log_target=True))
        return total

    assert drift(DER(strength=2.0, labels=0.0, buffer=0)) < 0.7 * drift()


def test_what_cannot_work_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="buffer 0 and old 0"):
        train([DER(buffer=0, old=0)], tmp_path)
    with pytest.raises(ConfigError, match=rf"top_k.*allowed: 1 to {V}"):
        train([DER(top_k=V + 1)], tmp_path)
    with pytest.raises(ConfigError, match=r"methods\.der\.buffer: rows are packed or flattened") as caught:
        train([DER()], tmp_path, padding_free=True, max_length=None)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="packed rows cannot be told apart"):
        train([DER(buffer=0)], tmp_path, packing=True)


def test_rows_of_its_own_after_a_task_are_kept_for_the_next(tmp_path, monkeypatch):
    """With the outputs of the model that has learned the task; the task's own rows are nowhere."""
    asked = []

    def own(model, tokenizer, number, seed, given, say, avoid):
        asked.append((number, [len(rows) for rows in given]))
        return rows(3, 300)

    monkeypatch.setattr("retain.methods.der.pseudo_rows", own)

    def once(index, model=None, new=True):
        method = DER(buffer=0, source="self", old=0, own=3, top_k=5)
        run = Run(
            tmp_path / str(index), task=f"task {index}", task_index=index, shared=tmp_path, say=lambda line: None,
            new_rows=rows(16, index) if new else None, private=True,
        )  # fmt: skip
        made = train([method], tmp_path / str(index), model, run=run, train_rows=rows(16, index))
        made.release()
        return made

    first = once(1)
    assert asked == [(3, [16, 12])], "what is written is compared with new and old rows"
    assert not any(line.get("loss/der") for line in first.state.log_history), "nothing to replay in the first task"
    stored = StoredOutputs.load(tmp_path / "der" / "02.parquet", 0).rows
    wanted = first.run.tokenise(rows(3, 300))
    assert [row.input_ids.tolist() for row in stored] == wanted["input_ids"]
    assert {row.task for row in stored} == {1}
    for row in stored:
        values, _ = torch.log_softmax(logits_of(first.model, row), -1).topk(5)
        assert np.abs(row.log_probs - values.detach().numpy()).max() < 0.01
    second = once(2, first.model)
    assert [line["loss/der"] for line in second.state.log_history if "loss/der" in line][-1] > 0
    assert [r.task for r in StoredOutputs.load(tmp_path / "der" / "03.parquet", 0).rows] == [1] * 3 + [2] * 3
    with pytest.raises(ConfigError, match=r"methods\.der\.own: nothing can be compared"):
        once(3, second.model, new=False)
