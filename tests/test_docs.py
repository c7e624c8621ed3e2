"""Every fenced block of the README and the docs runs, on a tiny model: python, yaml, and `retain` commands."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from harness_kit import write_example_rows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language == kind]


@pytest.fixture
def desk(tmp_path: Path, tiny_cache: Path, thin_suites: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the data files that the pages name."""
    for name in ("medical", "legal", "yours"):
        rows = [{"prompt": f"What is {name} {i}?", "response": f"It is {i * 7 % 10}."} for i in range(16)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    questions = {"questions": ["What is one?", "What is two?"], "ground_truths": ["1", "2"]}
    (tmp_path / "data" / "domains").mkdir()
    for name in ("history", "biology"):
        (tmp_path / "data" / "domains" / f"{name}.json").write_text(json.dumps({"domain_name": name, **questions}))
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "lm_eval").symlink_to(ROOT / "examples" / "lm_eval")
    write_example_rows(tmp_path / "data")
    monkeypatch.setenv("LM_EVAL_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks(page: Path, desk: Path) -> None:
    from datasets import Dataset
    from tiny import tiny_model, tiny_tokenizer
    from trl import SFTConfig

    tokenizer = tiny_tokenizer()
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {i}?"}],
                "completion": [{"role": "assistant", "content": f"It is {i}."}],
            }
            for i in range(16)
        ]
    )
    names = {
        "model": tiny_model(tokenizer),
        "tokenizer": tokenizer,
        "rows": rows,
        "args": SFTConfig(
            str(desk / "out"),
            max_steps=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=192,
            save_strategy="no",
        ),
    }
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.stem)
def test_yaml_blocks(page: Path, desk: Path) -> None:
    from retain.config import parse
    from retain.pipeline import plan

    for text in blocks(page, "yaml"):
        values = yaml.safe_load(text)
        if "tasks" in values:
            assert plan(parse(values)).stages


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.stem)
def test_commands(
    page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh_precision
) -> None:
    """`retain` lines run as written, in this process, which has everything imported; `make` and `pip` lines are what
    brought us here."""
    from retain.cli import main

    monkeypatch.setenv("COLUMNS", "100")
    for text in blocks(page, "yaml"):
        if "tasks" in yaml.safe_load(text):
            (desk / "run.yaml").write_text(text)
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["retain"]:
                continue
            allowed: set[object] = {0, None}
            if "--budget" in words:  # the thin suites can be sure of nothing less; whether it is met is not the point
                words[words.index("--budget") + 1] = "60%"
                allowed.add(1)
            fresh_precision()
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr()
            assert ended.value.code in allowed, f"{line}\n{said.out[-2000:]}\n{said.err[-2000:]}"


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(t for language, t in FENCE.findall(text) if language == "text" and "src/retain/" in t)
    named = set(re.findall(r"(\w+(?:/|\.py))\s{2,}", "\n".join(tree.splitlines()[1:])))
    here = {p.name + ("/" if p.is_dir() else "") for p in (ROOT / "src/retain").iterdir()}
    here -= {"__pycache__/", "py.typed", "__init__.py", "__main__.py"}
    assert named == here
