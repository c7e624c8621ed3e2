"""Replay of rows that the model writes: from demonstrations, on policy, or by a server."""

import json

import pytest
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from training_kit import rows, same_bits, stored, train

from retain.data.checking import checker
from retain.data.filters import NearDuplicates
from retain.errors import ConfigError
from retain.methods.context import Run
from retain.methods.replay import Replay
from retain.models import generation
from retain.models.generation import Generated, generate
from retain.models.own_rows import about, fingerprint

THINGS = ("horse", "lamp", "cloud", "table", "violin", "engine", "candle", "forest", "paper", "garden", "winter")


def read(path):
    return Dataset.from_parquet(str(path), cache_dir=str(path.parent / ".cache")).to_list()


def run_of(folder, index=1, **more):
    return Run(
        folder / str(index), task=f"t{index}", task_index=index, shared=folder, say=more.pop("say", lambda line: None),
        new_rows=more.pop("new_rows", None), **more,
    )  # fmt: skip


@pytest.fixture
def helpful(monkeypatch):
    """Inputs by a fake writer, answers by the model itself; the calls that were made."""
    calls = []

    def speak(model, tokenizer, prompts, limit, temperature, top_p, draw):
        calls.append((temperature, len(prompts)))
        if temperature == 1.0:
            number = 100 * sum(t == 1.0 for t, _ in calls)
            texts = [f"why do {THINGS[(number + i) % 11]} and {THINGS[i // 11]} differ" for i in range(len(prompts))]
            return [Generated(text, 5, True) for text in texts]
        found = generate(model, tokenizer, prompts, limit, temperature, top_p, draw)
        return [Generated(a.text or "nothing", a.tokens, True) for a in found]  # the tiny model seldom ends

    monkeypatch.setattr(generation, "generate", speak)
    return calls


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A tiny model that has learned four answers by heart."""
    made = train([], tmp_path_factory.mktemp("learned"), train_rows=rows(4), steps=60, learning_rate=5e-3)
    made.release()
    return made.model.eval()


# -- demonstrations ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("features", ["tfidf", "hidden"])
def test_every_row_has_an_output_of_the_declared_checkpoint(helpful, features, tmp_path, model):
    settings = {"shown": 3, "clusters": 5, "features": features}
    method = Replay(fraction=0.5, source="demonstrations", rows=12, max_tokens=16, demonstrations=settings)
    start = fingerprint(model)
    shown = rows(6, 100)
    run = run_of(tmp_path, say=(said := []).append)
    made = train([method], tmp_path / "1", model, old=shown, run=run)
    assert made.run.has_replay
    path = tmp_path / "buffer" / "demonstrations-01.parquet"
    written, note = read(path), about(path)
    assert note["writer"]["weights"] == start
    assert 0 < len(written) <= 12, "the budget"
    again = generate(
        tiny_model(tiny_tokenizer()), tiny_tokenizer(), [row["prompt"] for row in written], max_new_tokens=16
    )
    assert [row["completion"][0]["content"] for row in written] == [a.text or "nothing" for a in again]
    assert note["covered"] == note["clusters"] == len({row["cluster"] for row in written}) >= 5
    near = NearDuplicates(0.6)
    for row in shown:
        near.add(row["prompt"][0]["content"])
    assert not any(near.seen(row["prompt"][0]["content"]) for row in written)
    assert any("clusters" in line for line in said)
    assert len(read(tmp_path / "buffer" / "demonstrations-inputs.parquet")) == 18, "a surplus of one and a half"


@pytest.mark.parametrize("refresh", [True, False])
def test_inputs_are_written_once_and_answered_by_the_latest_model(helpful, refresh, tmp_path):
    settings = {"source": "demonstrations", "rows": 8, "max_tokens": 12, "buffer": 0, "refresh": refresh}
    first = train([Replay(fraction=0.5, **settings)], tmp_path / "1", old=rows(6, 100), run=run_of(tmp_path))
    first.release()
    inputs = [call for call in helpful if call[0] == 1.0]
    helpful.clear()
    latest = fingerprint(first.model)
    train([Replay(fraction=0.5, **settings)], tmp_path / "2", first.model, old=rows(6, 100), run=run_of(tmp_path, 2))
    assert inputs
    assert not [call for call in helpful if call[0] == 1.0], "once per run"
    second = tmp_path / "buffer" / "demonstrations-02.parquet"
    assert bool(helpful) == second.is_file() == refresh
    if refresh:
        assert about(second)["writer"]["weights"] == latest
        assert (
            about(second)["writer"]["weights"]
            != about(second.with_name("demonstrations-01.parquet"))["writer"]["weights"]
        )


def test_probe_items_are_not_written_again(helpful, tmp_path):
    run = run_of(tmp_path, avoid=[f"why do {thing} and horse differ" for thing in THINGS])
    train(
        [Replay(fraction=0.5, source="demonstrations", rows=8, max_tokens=12)],
        tmp_path / "1",
        old=rows(6, 100),
        run=run,
    )
    note = about(tmp_path / "buffer" / "demonstrations-inputs.parquet")
    assert note["dropped"]["near a probe item"] > 0
    texts = [row["input"] for row in read(tmp_path / "buffer" / "demonstrations-inputs.parquet")]
    assert not any(text.endswith("horse differ") for text in texts)


def test_the_tiny_model_itself_goes_all_the_way(tmp_path):
    """Nothing replaced: what a random model writes is mostly dropped, and every reason is counted."""
    method = Replay(fraction=0.5, source="demonstrations", rows=2, max_tokens=48)
    run = run_of(tmp_path)
    train([method], tmp_path / "1", old=rows(6, 100), run=run, max_length=256, steps=2)
    note = about(tmp_path / "buffer" / "demonstrations-inputs.parquet")
    kept = len(read(tmp_path / "buffer" / "demonstrations-inputs.parquet"))
    assert kept + sum(note["dropped"].values()) == note["tried"]


# -- on policy ---------------------------------------------------------------------------------------------
def old_rows():
    """Four prompts whose answers the learned model knows, four with another answer."""
    wrong = rows(4).map(lambda row: {"completion": [{"role": "assistant", "content": "Paris"}]})
    return Dataset.from_list([*rows(4).to_list(), *wrong.to_list()])


@pytest.mark.parametrize("fallback", ["stored", "drop"])
def test_kept_answers_are_the_models_and_pass_again(fallback, tmp_path, learned):
    settings = {"check": "exact", "resample": 1, "fallback": fallback}
    method = Replay(fraction=0.5, source="on_policy", max_tokens=40, on_policy=settings)
    weights = fingerprint(learned)
    import copy

    run = run_of(tmp_path, say=(said := []).append)
    train([method], tmp_path / "1", copy.deepcopy(learned), old=old_rows(), run=run)
    path = tmp_path / "buffer" / "on-policy-01.parquet"
    written, note = read(path), about(path)
    assert note["writer"]["weights"] == weights
    assert "before task 1" in note["writer"]["checkpoint"]
    own = [row for row in written if row["answer_of"] == "model"]
    references = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows(4)}
    check = checker("exact", 0.5)
    assert len(own) == 4
    for row in own:
        assert check(row["completion"][0]["content"], references[row["prompt"][0]["content"]], row["prompt"])
    assert [row["completion"][0]["content"] for row in written if row["answer_of"] == "stored"] == (
        ["Paris"] * 4 if fallback == "stored" else []
    )
    assert note["fallback_rate"] == 0.5
    assert note["passed"] == {"1": 4}
    assert any("50% never passed" in line for line in said)


def test_greedy_answers_teach_the_model_that_wrote_them_least(tmp_path, learned):
    """The mean −log p of its own answers under the model is below that of the stored ones."""
    import copy

    import torch

    from retain.methods.context import answer_loss

    def accept(answer, reference, prompt):
        return True

    import sys
    import types

    module = sys.modules["own_check"] = types.ModuleType("own_check")
    module.accept = accept
    method = Replay(fraction=0.5, source="on_policy", max_tokens=40, on_policy={"check": "own_check:accept"})
    old = old_rows().select(range(4, 8))
    made = train([method], tmp_path / "1", copy.deepcopy(learned), old=old, run=run_of(tmp_path))
    losses = []
    for data in (
        Dataset.from_list(read(tmp_path / "buffer" / "on-policy-01.parquet")).select_columns(["prompt", "completion"]),
        old,
    ):
        ((inputs, labels),) = made.run.batches(data, 4)
        with torch.no_grad():
            losses.append(float(answer_loss(learned, inputs, labels)) / int((labels != -100).sum()))
            best = learned(**inputs).logits[:, :-1].argmax(-1)
        likeliest = (best == labels[:, 1:])[labels[:, 1:] != -100]
        assert bool(likeliest.all()) == (len(losses) == 1), "every token is the model's first choice"
    assert losses[0] < 0.2 < losses[1]


def test_earlier_tasks_are_answered_too_and_the_budget_holds(tmp_path, learned):
    import copy

    def go(index, model, **more):
        settings = {"check": "contains", "resample": 0}
        method = Replay(fraction=0.25, source="on_policy", rows=6, max_tokens=40, on_policy=settings, **more)
        run = run_of(tmp_path, index, new_rows=rows(8, 4 * index))
        made = train([method], tmp_path / str(index), model, old=old_rows(), run=run, train_rows=rows(8, 4 * index))
        made.release()
        return made

    first = go(1, copy.deepcopy(learned))
    go(2, first.model)
    one, two = (read(tmp_path / "buffer" / f"on-policy-0{n}.parquet") for n in (1, 2))
    assert len(one) == 6
    assert len(two) == 6 + 2, "a quarter is of earlier tasks"
    asked = [row["prompt"][0]["content"] for row in two[6:]]
    assert set(asked) <= {row["prompt"][0]["content"] for row in rows(8, 4)}


def test_without_refreshing_each_prompt_is_answered_once(tmp_path, learned, monkeypatch):
    import copy

    calls = []

    def counting(model, tokenizer, prompts, *rest):
        calls.extend(json.dumps(prompt) for prompt in prompts)
        return generate(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(generation, "generate", counting)

    def go(index, model):
        method = Replay(
            fraction=0.25, source="on_policy", rows=6, max_tokens=40, refresh=False, on_policy={"resample": 0}
        )
        run = run_of(tmp_path, index, new_rows=rows(8, 4 * index))
        made = train([method], tmp_path / str(index), model, old=old_rows(), run=run, train_rows=rows(8, 4 * index))
        made.release()
        return made

    first = go(1, copy.deepcopy(learned))
    before = len(calls)
    go(2, first.model)
    assert before == 6
    assert 0 < len(calls) - before <= 2, "the earlier task's prompts alone"
    one, two = (read(tmp_path / "buffer" / f"on-policy-0{n}.parquet") for n in (1, 2))
    assert [row for row in two if row in one] == one


def test_a_first_task_without_old_rows_has_nothing_to_replay(tmp_path):
    run = run_of(tmp_path, say=(said := []).append)
    plain = train([], tmp_path / "plain", old=None)
    made = train([Replay(source="on_policy")], tmp_path / "1", old=None, run=run)
    assert same_bits(stored(made.model), stored(plain.model))
    assert any("nothing to replay" in line for line in said)


def test_without_old_rows_earlier_tasks_are_answered_within_the_budget(tmp_path):
    def go(index, model=None):
        method = Replay(fraction=0.25, source="on_policy", rows=5, max_tokens=8, on_policy={"resample": 0})
        run = run_of(tmp_path, index, new_rows=rows(16, 20 * index))
        return train([method], tmp_path / str(index), model, old=None, run=run)

    first = go(1)
    first.release()
    assert not first.run.has_replay
    # the buffer is filled when the run is killed before the task is marked done: it starts the task again
    assert not go(1).run.has_replay
    assert go(2, first.model).run.has_replay
    asked = [row["prompt"][0]["content"] for row in read(tmp_path / "buffer" / "on-policy-02.parquet")]
    assert len(asked) == 5
    assert set(asked) <= {row["prompt"][0]["content"] for row in rows(16, 20)}


def test_when_no_row_is_left_it_says_what_to_change(tmp_path):
    method = Replay(source="on_policy", on_policy={"fallback": "drop", "check": "exact", "resample": 0}, max_tokens=8)
    with pytest.raises(ConfigError, match=r"on_policy: no row is left \(0 of 12 .*fallback: stored") as caught:
        train([method], tmp_path / "1", run=run_of(tmp_path))
    assert "\n" not in str(caught.value)


# -- resume, servers, settings -----------------------------------------------------------------------------
def test_a_killed_run_goes_on_with_the_rows_that_were_there(tmp_path, monkeypatch):
    """The second time only what is missing is written, and the rows are those of a run that was not killed."""
    calls, dies = [], [3]

    def slow(model, tokenizer, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == dies[0]:
            raise KeyboardInterrupt
        return generate(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(generation, "generate", slow)
    method = {"fraction": 0.5, "source": "on_policy", "rows": 70, "max_tokens": 8, "on_policy": {"resample": 0}}
    old = rows(70, 100)

    def go(name):
        calls.clear()
        train([Replay(**method)], tmp_path / name / "1", old=old, run=run_of(tmp_path / name), train_rows=rows(80))
        return read(tmp_path / name / "buffer" / "on-policy-01.parquet")

    with pytest.raises(KeyboardInterrupt):
        go("killed")
    assert calls == [32, 32, 6]
    dies[0] = 0
    again = go("killed")
    assert calls == [6]
    assert again == go("straight")
    assert not list((tmp_path / "killed").rglob("*.unfinished"))
    assert not list((tmp_path / "killed").rglob("*.part"))


@pytest.mark.parametrize("source", ["self", "demonstrations", "on_policy"])
def test_a_server_writes_in_place_of_the_model(source, tmp_path, monkeypatch):
    from retain.models.endpoint import Endpoint

    count = iter(range(10_000))

    def answer(self, prompt, common):
        n = next(count)
        return Generated(f"so {THINGS[n % 11]} and {THINGS[n // 11 % 11]} or {n}", 5, True)

    monkeypatch.setattr(Endpoint, "_answer", answer)
    monkeypatch.setattr(generation, "generate", lambda *rest: pytest.fail("the model wrote"))
    server = {"url": "http://127.0.0.1:1/v1", "model": "big"}
    more = {"on_policy": {"fallback": "stored", "resample": 0}} if source == "on_policy" else {}
    method = Replay(fraction=0.5, source=source, rows=8, endpoint=server, **more)
    made = train([method], tmp_path / "1", old=rows(6, 100), run=run_of(tmp_path), max_length=128)
    assert made.run.has_replay
    name = {"self": "self", "demonstrations": "demonstrations-01", "on_policy": "on-policy-01"}[source]
    assert "127.0.0.1:1" in json.dumps(about(tmp_path / "buffer" / f"{name}.parquet")["writer"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"demonstrations": {"shown": 3}}, r"replay\.demonstrations: .*without effect at source: auto"),
        ({"source": "self", "on_policy": {"resample": 1}}, r"replay\.on_policy: .*source: on_policy"),
        ({"source": "old", "refresh": False}, r"replay\.refresh: .*demonstrations or on_policy"),
        ({"endpoint": {"url": "http://a", "model": "b"}}, r"replay\.endpoint: .*without effect"),
        ({"source": "on_policy", "on_policy": {"threshold": 0.7}}, r"threshold: .*without effect at check: contains"),
        ({"source": "on_policy", "on_policy": {"trys": 0.7}}, r"trys"),
    ],
)
def test_settings_without_effect_are_errors(settings, said):
    with pytest.raises(ConfigError, match=said):
        Replay(**settings)
    assert Replay(**Replay().config.model_dump()).config == Replay().config


def test_an_unknown_check_is_one_line(tmp_path):
    method = Replay(source="on_policy", on_policy={"check": "contain"})
    with pytest.raises(ConfigError, match="Did you mean 'contains'"):
        train([method], tmp_path / "1", run=run_of(tmp_path))
