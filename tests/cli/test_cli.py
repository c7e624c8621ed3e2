"""The command line: quick help, one-line errors with exit code 2, and the commands on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retain.cli import main

SMALL = ["-o", "probes.limit=2", "-o", "train.max_steps=2", "-o", "train.max_length=64", "-o", "methods=[none]"]


def retain(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "retain", *words], capture_output=True, text=True, cwd=cwd, timeout=240
    )


def rows(path: Path, number: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"Say {i}.", "response": str(i)}) for i in range(number)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = (
        "import sys, retain.cli as c; c._commands(); "
        "from typer.testing import CliRunner as R; r = R().invoke(c.app, ['--help']); assert r.exit_code == 0; "
        "print(sorted(m for m in ('torch', 'transformers', 'datasets', 'scipy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    seconds = []  # of processor time: on an idle machine it is the waiting time, on a busy one that says nothing
    for _ in range(5):
        before = os.times()
        assert retain("--help").returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5


def test_every_command_explains_itself() -> None:
    from retain.cli import _commands, app

    _commands()
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__, command.name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "nothing to learn"),
        (["run", "no.yaml"], "no.yaml: no such file"),
        (["run", "--task", "nothing.jsonl"], "nothing.jsonl"),
        (["run", "--task", "data/a.jsonl", "-o", "methods=[ewk]"], "Did you mean 'ewc'"),
        (["run", "--task", "data/a.jsonl", "-o", "methods=[ewc, l2sp]"], "cannot be combined"),
        (["run", "--task", "data/a.jsonl", "-o", "methods=[{replay: {source: old}}]"], "needs 'old'"),
        (["run", "--task", "data/a.jsonl", "-o", "methods=[{ewc: {strenght: 1}}]"], "Did you mean 'strength'"),
        (["run", "--task", "data/a.jsonl", "-o", "tran.max_steps=2"], "Did you mean 'train'"),
        (["run", "--task", "data/a.jsonl", "-o", "train.max_stepz=2"], "Did you mean 'max_steps'"),
        (["run", "--task", "data/bad.jsonl"], "bad.jsonl, line 2"),
        (["run", "--task", "data/empty.jsonl"], "empty.jsonl"),
        (["run", "--task", "data/a.jsonl", "--model", "no/such-model"], "no/such-model"),
        (["run", "--task", "data/a.jsonl", "-o", "tasks.0.on=assistant"], "generation"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "one"], "at least two"),
        (["methods", "ewk"], "Did you mean 'ewc'"),
        (["export", "nowhere", "--to", "x"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: list[str],
    said: str,
    tmp_path: Path,
    tiny_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows(tmp_path / "data" / "a.jsonl")
    (tmp_path / "data" / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (tmp_path / "data" / "empty.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["retain", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("retain: ")
    assert said in message
    assert not (tmp_path / "runs").exists(), "nothing is written when the input is bad"


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line that a command with bad input says."""
    monkeypatch.setattr(sys, "argv", ["retain", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retain: ")]
    return line


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("methods: [repaly]", "methods: unknown 'repaly'. Did you mean 'replay'"),
        ("methods: [ewc, l2sp]", "methods: 'ewc' and 'l2sp' cannot be combined (both pull to the same weights"),
        ("train: {max_stepz: 2}", "train: unknown 'max_stepz'"),
    ],
)
def test_the_file_of_a_wrong_setting_is_named(setting, said, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "mine.yaml").write_text(f"tasks: [a.jsonl]\n{setting}\n")
    monkeypatch.chdir(tmp_path)
    for command in ("run", "plan"):
        assert refused(monkeypatch, capsys, command, "mine.yaml").startswith(f"retain: mine.yaml: {said}")
    assert [f.name for f in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_run_directory_of_another_configuration(tmp_path, tiny_cache, monkeypatch, capsys) -> None:
    from retain.config import override, parse
    from retain.rundir import RunDirectory

    data = rows(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    values = override({"tasks": [{"data": str(data)}], "model": {}}, [*SMALL[1::2], "output=here", "seed=1"])
    RunDirectory("here").begin(parse(values))
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    line = refused(monkeypatch, capsys, "run", "--task", data, "--output", "here", *SMALL)
    assert line.startswith("retain: here: this directory holds a run with other `seed`. Choose another `output:`")
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_a_full_disk_is_one_line_for_every_command(monkeypatch, capsys) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device", "runs/one/report.html")

    monkeypatch.setattr("retain.report.page.write_report", full)
    line = refused(monkeypatch, capsys, "report", "runs/one")
    assert line.startswith("retain: the disk is full ([Errno 28] No space left on device: 'runs/one/report.html').")


@pytest.mark.slow
def test_run_report_compare_export_and_probe(tmp_path: Path, tiny_cache: Path, monkeypatch, capsys) -> None:
    """One run in a process of its own, as a user starts it; the rest in this one, which has everything imported."""
    data = rows(tmp_path / "data" / "a.jsonl")
    done = retain("run", "--task", str(data), "--output", "runs/one", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs/one/report.html" in done.stdout
    monkeypatch.chdir(tmp_path)

    def here(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["retain", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    assert here("run", "--task", str(data), "--output", "runs/two", *SMALL)[0] == 0
    assert here("compare", "runs/one", "runs/two")[0] == 0
    assert here("report", "runs/one", "--against", "runs/two")[0] == 0
    assert here("plan", "--task", str(data))[0] == 0
    assert here("export", "runs/one", "--to", "model")[0] == 0
    code, said, wrong = here("probe", "model", "--limit", "2", "--items", "items.parquet")
    assert code == 0, wrong
    assert "countries" in said
    assert (tmp_path / "items.parquet").is_file()
    code, _, wrong = here("run", "--task", str(data), "--output", "runs/one", *SMALL, "-o", "seed=1")
    assert code == 2
    assert "`seed`" in wrong
