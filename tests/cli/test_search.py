"""`retain search` on a tiny model: trials that are ordinary runs, that go on after a kill, and one line per mistake."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import warm
from run_kit import settings, write_config
from typed import refused, retain, typed

from retain.advice import search as searching
from retain.advice import search_study, search_workers
from retain.advice.pruning import Point
from retain.config import parse, read
from retain.pipeline import plan, run
from retain.report.search import beaten, load
from retain.results import Estimate, load_items, load_metrics, load_results
from retain.rundir import BASE, RunDirectory

OVER = ["--over", "methods.l2sp.strength=0.01..1:log", "--over", "train.learning_rate=1e-4..1e-2:log"]
SCRIPT = Path(__file__).parent / "scripts" / "type_words.py"


def short(shop: Path, output: Path, **changes: object) -> dict:
    """Settings of a run of one task and a few steps."""
    values = settings(shop, output, **({"tasks": [str(shop / "count")], "methods": ["l2sp"], "old": None} | changes))
    return values | {"train": values["train"] | {"max_steps": 2, "save_strategy": "no"}}


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no reports, which take longer than the trainings."""
    monkeypatch.setattr("retain.report.page.write_report", lambda *args, **more: None)


@pytest.fixture(scope="module")
def searched(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(YAML file, folder) of a search of three trials."""
    folder = tmp_path_factory.mktemp("runs") / "found"
    config = write_config(folder.parent / "run.yaml", short(shop, folder.parent / "alone"))
    with pytest.MonkeyPatch.context() as patch:
        retain(patch, "search", config, *OVER, "--trials", 3, "--output", folder)
    return config, folder


def numbers(folder: Path) -> list[dict]:
    """What every trial tried and what came of it."""
    return [trial.model_dump(exclude={"seconds"}) for trial in load(folder).trials]


def test_every_trial_is_a_run_and_the_base_is_asked_once(searched, tmp_path, light) -> None:
    config, folder = searched
    found = load(folder)
    assert [t.state for t in found.trials] == ["finished"] * 3
    assert found.trials[0].values == {"methods.l2sp.strength": 0.1, "train.learning_rate": 1e-3}, "what the file has"
    assert len({t.values["train.learning_rate"] for t in found.trials}) == 3
    base = load_items(RunDirectory(folder / "base").items(BASE))
    for trial in found.trials:
        place = folder / trial.directory
        assert {look["stage"] for look in load_metrics(place) if look["kind"] == "look"} == {"01-count"}
        assert load_items(RunDirectory(place).items(BASE)) == base
        verdict = load_results(place).verdict
        assert verdict is not None
        assert trial.learned == verdict.learned
        assert trial.lost is not None
        assert trial.lost.value == -verdict.difference.value
        assert (trial.lost.low, trial.lost.high) == (-verdict.difference.high, -verdict.difference.low)
        assert trial.steps == 2
    last = found.trials[2]
    values = read(config).model_dump(mode="json") | {"output": str(tmp_path / "alone"), "methods": [
        {"l2sp": {"strength": last.values["methods.l2sp.strength"]}}
    ]}  # fmt: skip
    values["train"] |= {"learning_rate": last.values["train.learning_rate"]}
    alone = run(parse(values), lambda line: None)
    same = load_results(folder / last.directory)
    drop = {"created", "command", "name", "training"}
    assert alone.model_dump(exclude=drop) == same.model_dump(exclude=drop)


def test_what_it_leaves(searched) -> None:
    _, folder = searched
    found = load(folder)
    best = read(folder / "best.yaml")
    plan(best)
    chosen = next(t for t in found.trials if t.number == found.best)
    assert best.methods == [{"l2sp": {"strength": chosen.values["methods.l2sp.strength"]}}]
    assert best.directory == folder / "best"
    assert "optimistic" in (folder / "best.yaml").read_text().split("name:")[0]
    assert "<svg" in (folder / "search.svg").read_text()
    text, web = (folder / "search.md").read_text(), (folder / "search.html").read_text()
    for words in (text, web):
        assert f"Recommended: trial {found.best}" in words
        assert "chosen by them, out of 3" in words
    gone = {t.number for t in beaten(found.trials)}
    assert found.best not in gone
    for trial in found.trials:
        kept = list((folder / trial.directory / "tasks").rglob("*.safetensors"))
        assert bool(kept) == (trial.number not in gone), "weights of those that another one beats are not kept"
        assert (folder / trial.directory / "report.html").is_file()
    assert web.count("trials/000") >= 1, "the front links to the reports of its runs"


def test_a_killed_search_goes_on_and_ends_with_the_same_numbers(searched, tmp_path) -> None:
    config, folder = searched
    output = tmp_path / "killed"
    words = ["search", str(config), *map(str, OVER), "--trials", "3", "--output", str(output)]
    process = warm.Script(SCRIPT, words, tmp_path)
    deadline = time.monotonic() + 200
    while not (output / "trials" / "0001" / "run.yaml").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "search.json").exists()
    stamp = (output / "trials" / "0000" / "results.json").stat().st_mtime_ns
    with open(output / "trials.journal", "a") as file:
        file.write('{"half a li')
    again = warm.Script(SCRIPT, words, tmp_path)
    out, err = again.communicate()
    assert again.returncode == 0, out + err[-3000:]
    assert numbers(output) == numbers(folder)
    assert (output / "trials" / "0000" / "results.json").stat().st_mtime_ns == stamp


def test_two_processes_share_the_trials(searched, tmp_path, monkeypatch, capsys) -> None:
    config, folder = searched
    monkeypatch.setattr(search_workers, "CONTEXT", warm._CONTEXT)
    shutil.copytree(folder / "base", tmp_path / "both" / "base")
    retain(
        monkeypatch, "search", config, *OVER, "--trials", 4, "--workers", 2, "--keep-all", "--output", tmp_path / "both"
    )
    found = load(tmp_path / "both")
    assert [(t.number, t.state) for t in found.trials] == [(i, "finished") for i in range(4)]
    assert {path.name for path in (tmp_path / "both" / "trials").iterdir()} == {f"000{i}" for i in range(4)}
    assert {path.name for path in (tmp_path / "both" / "workers").iterdir()} == {"1.log", "2.log"}
    assert numbers(tmp_path / "both")[0] == numbers(folder)[0]
    for trial in found.trials:
        assert list((tmp_path / "both" / trial.directory / "tasks").rglob("*.safetensors")), "--keep-all keeps them"


def test_two_folders_share_a_database(searched, tmp_path, monkeypatch, capsys, light) -> None:
    config, _ = searched
    own = ["--storage", f"sqlite:///{tmp_path}/trials.db"]
    for name, trials in (("one", 1), ("two", 2)):
        retain(monkeypatch, "search", config, *OVER, *own, "--trials", trials, "--output", tmp_path / name)
    assert [t.number for t in load(tmp_path / "two").trials] == [0, 1]
    assert [path.name for path in (tmp_path / "two" / "trials").iterdir()] == ["0001"], "the other one is not here"
    line = refused(
        monkeypatch,
        capsys,
        "search",
        config,
        "--over",
        "train.learning_rate=1e-4,1e-3",
        *own,
        "--output",
        tmp_path / "x",
    )
    assert "holds a search with other `over`" in line


def test_after_ctrl_c_the_same_command_goes_on(searched, tmp_path, monkeypatch, capsys, light) -> None:
    config, folder = searched
    shutil.copytree(folder / "base", tmp_path / "out" / "base")
    words = ["search", config, *OVER, "--trials", 2, "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:

        def stop(config, say, watch):
            if config.directory.name == "0001":
                raise KeyboardInterrupt
            return run(config, say, watch)

        patch.setattr(searching, "run", stop)
        assert typed(patch, *words) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert [t.state for t in load(tmp_path / "out").trials] == ["finished", "running"]
    retain(monkeypatch, *words)
    assert numbers(tmp_path / "out") == numbers(folder)[:2]


def test_a_failed_trial_is_written_down_and_the_others_go_on(searched, tmp_path, monkeypatch, capsys) -> None:
    config, folder = searched
    shutil.copytree(folder / "base", tmp_path / "out" / "base")

    def fail(config, say, watch):
        if config.directory.name == "0000":
            raise MemoryError("no room\nfor it")
        return load_results(folder / "trials" / config.directory.name)

    monkeypatch.setattr(searching, "run", fail)
    words = ["search", config, *OVER, "--output", tmp_path / "out"]
    retain(monkeypatch, *words, "--trials", 3)
    found = load(tmp_path / "out")
    assert [t.state for t in found.trials] == ["failed", "finished", "finished"]
    assert found.trials[0].reason == "MemoryError: no room for it"
    assert found.best in (1, 2)
    assert "1 failed" in capsys.readouterr().out
    shutil.copytree(folder / "base", tmp_path / "none" / "base")
    assert typed(monkeypatch, *words[:-1], tmp_path / "none", "--trials", 1) == 1
    assert "no trial finished (MemoryError: no room for it)" in capsys.readouterr().err


def test_a_trial_that_ends_its_process_again_and_again_is_given_up(searched, tmp_path) -> None:
    config, _ = searched
    settings = read(config)
    made = searching.Search(settings, searching_over(settings), tmp_path / "out", trials=1)
    begun = []
    for _ in range(search_study.MOST_BEGUN + 1):
        study = made.study()
        trial = study.next(lambda number: search_study.sampler("random", 0, number), 1)
        begun.append(trial and trial.number)
        study.release()
    assert begun == [0] * search_study.MOST_BEGUN + [None]
    (trial,) = made.study().tried()
    assert (trial.state, trial.reason) == ("failed", "its process ended 3 times before it did")


def searching_over(settings):
    from retain.advice.search_space import read_over

    return read_over(OVER[1::2], settings)


def test_a_trial_of_a_process_that_lives_is_left_alone(searched, tmp_path) -> None:
    settings = read(searched[0])
    made = searching.Search(settings, searching_over(settings), tmp_path / "out", trials=2)
    one, two = made.study(), made.study()
    taken = [
        s.next(lambda number: search_study.sampler("random", 0, number), 2).number for s in (one, two, made.study())[:2]
    ]
    assert taken == [0, 1]
    assert made.study().next(lambda number: None, 2) is None
    one.release()
    assert made.study().next(lambda number: None, 2).number == 0


def crafted(monkeypatch, points: dict[str, tuple[float, float]]) -> None:
    """Trials are said to have learned and lost so much, with narrow intervals, at every point."""

    def standing(results, place, units):
        learned, lost = points[place.path.name]
        steps = sum(step.steps for step in results.training)
        sides = (Estimate(value=value, low=value - 0.02, high=value + 0.02) for value in (learned, lost))
        return Point(*sides, steps)

    monkeypatch.setattr(searching, "standing", standing)


def test_a_hopeless_trial_of_two_tasks_ends_after_the_first(shop, tmp_path, monkeypatch, capsys, light) -> None:
    tasks = [str(shop / "count"), str(shop / "which")]
    config = write_config(tmp_path / "run.yaml", short(shop, tmp_path / "alone", tasks=tasks))
    crafted(monkeypatch, {"0000": (0.6, 0.1), "0001": (0.2, 0.5), "0002": (0.2, 0.0)})
    words = ["search", config, *OVER, "--trials", 3, "--output", tmp_path / "out"]
    retain(monkeypatch, *words)
    found = load(tmp_path / "out")
    assert [t.state for t in found.trials] == ["finished", "hopeless", "finished"]
    ended = found.trials[1]
    assert ended.steps == 2
    assert ended.reason == "at the end of task count it had learned less and lost more than trial 0 had, beyond doubt"
    assert not (tmp_path / "out" / "trials" / "0001" / "tasks" / "02-which").exists()
    assert found.steps_saved == pytest.approx(2 / 12)
    assert found.best == 0
    assert "saved 16.7 % of the steps" in " ".join(capsys.readouterr().out.split())


def test_a_look_of_the_monitor_can_end_a_trial(shop, tmp_path, monkeypatch, light) -> None:
    monitor = {"every": 1, "probes": [str(shop / "probes.jsonl")], "probes_every": 1, "anchor_count": 2, "limit": 4}
    config = write_config(tmp_path / "run.yaml", short(shop, tmp_path / "alone", monitor=monitor))
    asked = []

    def beaten(mine, finished):
        asked.append((mine.steps, [number for number, theirs in finished if theirs is not None]))
        return 0 if finished else None

    monkeypatch.setattr(searching, "beaten_by", beaten)
    retain(monkeypatch, "search", config, *OVER, "--trials", 2, "--output", tmp_path / "out")
    first, second = load(tmp_path / "out").trials
    assert (first.state, second.state, second.steps) == ("finished", "hopeless", 1)
    assert asked == [(1, []), (2, []), (1, [0])], "the same step of the finished one is there to compare with"
    assert second.reason.startswith("at the look at step 1 of task count")


def test_raising_and_a_grid(searched, tmp_path, monkeypatch, capsys, light) -> None:
    config, folder = searched
    crafted(monkeypatch, {"0000": (0.6, 0.4), "0001": (0.5, 0.2), "0002": (0.4, 0.01)})
    shutil.copytree(folder / "base", tmp_path / "raised" / "base")
    shutil.copytree(folder / "base", tmp_path / "grid" / "base")
    words = ["--mode", "raise", "--lose-at-most", 0.02, "--output", tmp_path / "raised"]
    retain(monkeypatch, "search", config, *words)
    found = load(tmp_path / "raised")
    assert [t.values for t in found.trials] == [{"factor": 1.0}, {"factor": 2.0}, {"factor": 4.0}]
    assert found.best == 2
    assert read(tmp_path / "raised" / "best.yaml").methods == [{"l2sp": {"strength": 0.4}}]
    capsys.readouterr()
    over = ["--over", "methods.l2sp.strength=0.01..1:log", "--output", tmp_path / "grid"]
    retain(monkeypatch, "search", config, "--mode", "grid", "--points", 3, *over)
    assert "3 runs" in capsys.readouterr().out
    tried = [t.values["methods.l2sp.strength"] for t in load(tmp_path / "grid").trials]
    assert tried == [0.01, 0.1, 1.0]


def test_the_chosen_one_again_with_other_seeds(searched, monkeypatch, capsys, light) -> None:
    config, folder = searched
    retain(monkeypatch, "search", config, *OVER, "--trials", 3, "--output", folder, "--confirm", 2)
    again = load(folder).again
    assert again is not None
    assert again.seeds == [1, 2]
    runs = [load_results(folder / one.directory) for one in again.runs]
    assert [results.seed for results in runs] == [1, 2]
    assert again.learned.value == pytest.approx(sum(r.verdict.learned.value for r in runs) / 2)
    assert "Run again with 2 other seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "bayes"], "--mode: unknown 'bayes'"),
        (["--mode", "raise", "--over", "methods.l2sp.strength=0..1"], "--over: not with --mode raise"),
        (["--mode", "raise", "--workers", "2"], "--workers: not with --mode raise"),
        (["--learn-at-least", "0.1"], "no effect without --mode raise"),
        (["--confirm", "1"], "--confirm: one run has no interval"),
        (["--over", "methods.ewc.strength=0..1"], "the configuration has no method 'ewc'"),
        (["--over", "methods.l2sp.strength=-1..1"], "--over methods.l2sp.strength=-1..1: -1 is not possible"),
        (["--storage", "nosuch://x/y"], "cannot be used as the storage of a search"),
        (["-o", "tasks.0=nowhere.jsonl"], "nowhere.jsonl"),
        (["-o", "methods=[none]", "--mode", "raise"], "--mode raise: no method here has a strength without an end"),
    ],
)
def test_bad_words(searched, tmp_path, monkeypatch, capsys, words, said) -> None:
    assert said in refused(monkeypatch, capsys, "search", searched[0], *words, "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "trials").exists()


def test_another_search_in_the_same_folder(searched, monkeypatch, capsys) -> None:
    config, folder = searched
    line = refused(monkeypatch, capsys, "search", config, *OVER[:2], "--output", folder)
    assert "holds a search with other `over`" in line
    line = refused(monkeypatch, capsys, "search", config, *OVER, "-o", "seed=3", "--output", folder)
    assert "other `seed` (0; now 3)" in line


def test_what_nothing_measures(searched, shop, tmp_path, monkeypatch, capsys) -> None:
    config = write_config(tmp_path / "run.yaml", short(shop, tmp_path / "alone", probes={"reference": []}))
    line = refused(monkeypatch, capsys, "search", config, *OVER)
    assert "nothing measures what is lost" in line


def test_perplexities_are_told_in_nats(searched, shop, tmp_path, monkeypatch, light) -> None:
    rows = [json.loads(line) for line in (shop / "probes.jsonl").read_text().splitlines()]
    texts = [row for row in rows if "text" in row]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    values = short(shop, tmp_path / "alone", probes={"reference": [str(tmp_path / "texts.jsonl")]})
    config = write_config(tmp_path / "run.yaml", values)
    retain(monkeypatch, "search", config, *OVER, "--trials", 1, "--output", tmp_path / "out")
    found = load(tmp_path / "out")
    assert (found.learned_unit, found.lost_unit) == ("points", "nats per token")
    (trial,) = found.trials
    change = next(c for c in load_results(tmp_path / "out" / trial.directory).changes if c.probe == "prose")
    assert trial.lost is not None
    assert trial.lost.value == pytest.approx(change.difference.value)
    assert "nats per token" in (tmp_path / "out" / "search.md").read_text()
