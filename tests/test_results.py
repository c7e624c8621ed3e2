"""`results.json` and its published schema: up to date, and what is written is what it allows."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from fake_run import build_run
from typer.testing import CliRunner

from retain import cli
from retain.errors import RunError
from retain.results import SCHEMA_VERSION, Results, json_schema, load_results, save_results

SCHEMA = Path(__file__).parents[1] / "docs/results.schema.json"


def test_the_published_schema_is_that_of_the_code() -> None:
    cli._commands()
    done = CliRunner().invoke(cli.app, ["report", "--schema"])
    assert done.exit_code == 0
    assert SCHEMA.read_text(encoding="utf-8") == done.stdout, "retain report --schema > docs/results.schema.json"
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("tasks", [(), ("one",), ("one", "two")])
def test_what_is_written_follows_the_schema(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    build_run(tmp_path, tasks=tasks, items=False, metrics=False)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    check = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    check.validate(written)
    assert written["schema_version"] == SCHEMA_VERSION
    for broken in ({"seed": "x"}, {"schema_version": SCHEMA_VERSION + 1}, {"more": 1}, {"scores": {"a": {"b": 1}}}):
        assert not check.is_valid(written | broken), broken
        with pytest.raises(ValueError):
            Results.model_validate(written | broken)


def test_files_of_before_still_load(tmp_path: Path) -> None:
    """Without the version, and without all that was added since."""
    results = build_run(tmp_path, items=False, metrics=False)
    old = json.loads(results.model_dump_json())
    for key in ("schema_version", "group_deltas", "notes", "thresholds", "ahead"):
        del old[key]
    for key in ("one_sided", "learned", "intervals"):
        del old["verdict"][key]
    (tmp_path / "results.json").write_text(json.dumps(old), encoding="utf-8")
    jsonschema.Draft202012Validator(json_schema()).validate(old)
    found = load_results(tmp_path)
    assert found.schema_version == 1
    assert found.verdict is not None
    assert found.verdict.one_sided is None
    assert load_results(tmp_path / "results.json") == found


def test_a_later_version_is_named(tmp_path: Path) -> None:
    results = build_run(tmp_path, items=False, metrics=False)
    save_results(results.model_copy(update={"schema_version": SCHEMA_VERSION + 1}), tmp_path)
    with pytest.raises(RunError, match=r"not a results file of version 1 \(schema_version: .*later retain"):
        load_results(tmp_path)
