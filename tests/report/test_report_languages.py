"""English and Chinese: the same texts in both, and nothing of the other language on a page."""

from __future__ import annotations

import ast
import io
import re
import string
from pathlib import Path

import pytest
from browser import Page
from fake_run import build_run
from rich.console import Console

import retain
from retain import analysis
from retain.config import parse
from retain.errors import ConfigError
from retain.report import compare, gate, language, page, retention, terminal, top, totals, write_report
from retain.report.language import LANGUAGES, say, speaking, texts
from retain.results import ClassNumbers, ProbeInfo, Totals, load_items, load_results, save_results

PACKAGE = Path(retain.__file__).parent
SOURCES = {
    p: p.read_text(encoding="utf-8") for p in (PACKAGE / "report").rglob("*") if p.suffix in (".py", ".j2", ".js")
}
OLD = "rows given by the user: data/old.jsonl; text the model wrote itself before training"
NOTES = ["one: no test file: 20 of 100 rows held out for testing (seed 17)", "two: 3 test rows from data/two.jsonl"]


def places(text: str | dict[str, str]) -> set[str]:
    forms = text.values() if isinstance(text, dict) else [text]
    return {place for form in forms for _, place, _, _ in string.Formatter().parse(form) if place}


def test_every_language_has_the_same_texts():
    english = texts("en")
    for name in LANGUAGES:
        table = texts(name)
        assert list(table) == list(english)
        for key, text in table.items():
            assert all(isinstance(form, str) for form in (text.values() if isinstance(text, dict) else [text])), key
            if key != "headline.lost_probes":  # one names the number of probes, the other counts them in words
                assert places(text) == places(english[key]), key


def test_every_text_is_used_and_every_one_that_is_used_is_there():
    code = "\n".join(SOURCES.values())
    said = set(re.findall(r'\b(?:say|t)\(\s*"([a-z_]+\.[a-z_ ]+)"', code))
    assert said <= set(texts("en"))
    # A text may also be named by its section and a name that is made: f"facts.{word}", _head("probes.probe", …).
    made = set(re.findall(r'"([a-z_]+)\.(?:\{|" ~)', code)) | set(re.findall(r'language\.name\("(\w+)"', code))
    for key in texts("en"):
        section, name = key.split(".")
        plain = re.search(f"[\"']{key}[\"']", code) or (
            section in made and (section in WORDS or re.search(f"[\"']{name}[\"']", code) or name in FIELDS)
        )
        assert plain or section == "quoted", key


#: Sections whose names are words of results.json.
WORDS = {"totals", "agreement", "shift", "conclusion", "band", "group", "metric", "outcome", "outcome_why", "role"}
FIELDS = {
    *(f"{name}{end}" for name in analysis.results.Sequence.model_fields for end in ("", "_why")),
    *(f"{name}_why" for name in ("improvement", "drop", "forgetting_raw", "forgetting_adjusted", "forgetting_paired")),
}


def test_words_of_results_have_a_text():
    change = analysis.results.Change.model_fields
    for kind, field in (("conclusion", "conclusion"), ("band", "band")):
        for word in change[field].annotation.__args__:
            assert f"{kind}.{word}" in texts("zh")


NUMBERS = Totals(
    numbers=dict.fromkeys(totals.NUMBERS, 0.25),
    classes={"yes": ClassNumbers(precision=0.5, recall=0.25, f1=1 / 3, items=12)},
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of two runs that show every section."""
    directory, other = (tmp_path_factory.mktemp(name) for name in ("careful", "naive"))
    for place in (directory, other):
        build_run(place, tasks=("one", "two"), drop=0.3)
        results = load_results(place)
        verdict = results.verdict.model_copy(update={"lost_over_threshold": ["countries", "grammar"]})
        update = {"old": OLD, "notes": NOTES, "verdict": verdict, "ahead": []}
        update["totals"] = {stage: {"countries": NUMBERS} for stage in results.stages}
        save_results(results.model_copy(update=update), place)
    return directory, other


@pytest.fixture(scope="module")
def pages(runs):
    """The Chinese page and Markdown, and the names that may stay as they are."""
    directory, other = runs
    text = write_report(directory, [other], lang="zh").read_text(encoding="utf-8")
    results = load_results(directory)
    names = [info.name for info in results.probes] + [results.model, results.command]
    return text, (directory / "report.md").read_text(encoding="utf-8"), sorted(names, key=len, reverse=True)


def english(found: Page, names: list[str]) -> list[str]:
    """What a page says in English, in its text or to those who hear it."""
    shown = [a.get(k) or "" for _, a in found.tags for k in ("aria-label", "title", "placeholder", "data-label")]
    plain = [words for words in shown if re.fullmatch(r"[A-Za-z /()]+", words) and words not in names]
    return [words for words in [*found.words, *shown] if left_over(words, names)] + plain


def left_over(text: str, names: list[str]) -> list[str]:
    """Two English words or more in a row, names and files taken out."""
    text = re.sub(r"[\w./-]*\w\.(?:jsonl?|yaml|md|html)\b|\w+/", "·", text)
    for name in names:
        text = text.replace(name, "·")
    return re.findall(r"[A-Za-z]{2,}(?:[ ,;:]+[A-Za-z]{2,})+", text)


def test_the_chinese_page_has_no_english_sentence(pages):
    text, markdown, names = pages
    found = Page(text)
    assert ("html", {"lang": "zh-CN"}) in found.tags
    assert found.open == []
    body = re.sub(
        r"<(pre|title|style|script|code)\b.*?</\1>|<table class=\"plain mono\">.*?</table>", "", text, flags=re.S
    )
    assert english(Page(body), [*names, "F1"]) == []
    words = found.data["words"]
    assert all(re.search(r"[\u4e00-\u9fff]", word) for key, word in words.items() if key != "outcome")
    plain = re.sub(r"^`{3,}.*?^`{3,}$|^## 答案有变化的题目.*?(?=^## )", "", markdown, flags=re.S | re.M)
    plain = re.sub(r"^\| 方法 .*$", "", plain, flags=re.M).replace("\\", "")
    assert left_over(plain, names) == []
    for words in ("遗忘了多少", "学到了多少", "结论有多可靠", "得分下降超过 30%", "留出 20 行用于测试"):
        assert words in found.text
        assert words in markdown or words == "留出 20 行用于测试"


def test_the_comparison_in_chinese(runs, tmp_path):
    with speaking("zh"):
        found = compare.load(runs)
        path = compare.write(found, tmp_path)
        table = terminal.standings([(s.label, s.results, s.numbers) for s in found])
    names = [s.label for s in found] + [info.name for info in found[0].results.probes]
    names = sorted([*names, found[0].results.model, "one", "two", *found[0].results.methods], key=len, reverse=True)
    page = Page(path.read_text(encoding="utf-8"))
    assert ("html", {"lang": "zh-CN"}) in page.tags
    body = re.sub(r"<(style|title)\b.*?</\1>|<table class=\"plain mono\">.*?</table>", "", path.read_text(), flags=re.S)
    assert english(Page(body), names) == []
    lines = (tmp_path / "compare.md").read_text(encoding="utf-8")
    for text in (lines, shown(table)):
        assert left_over(text.replace("\\", ""), names) == []
    for words in ("学到与保持", "方括号内为 95% 区间", "参照"):
        assert words in page.text
        assert words in lines
    assert "学到：新任务上的个百分点" in (tmp_path / "compare.svg").read_text(encoding="utf-8")


def test_the_terminal_and_the_gate_in_chinese(runs):
    results = load_results(runs[0])
    names = sorted([info.name for info in results.probes] + [results.name, "one", "two"], key=len, reverse=True)
    with speaking("zh"):
        table, line = shown(terminal.summary(results)), gate.check(results, 0.02).said
    for text in (table, line):
        assert left_over(text, names) == []
        assert not re.search(r"[\u4e00-\u9fff][,;:?!]|[,;:?!][\u4e00-\u9fff]", text)
    assert "已遗忘：平均下降" in line
    for words in ("结论", "丢失/新增", "已遗忘"):
        assert words in table


def test_knowledge_retention_in_chinese(tmp_path):
    rows = [
        {"probe": name, "item": str(k), "prompt": f"{name} {k}?", "reference": "1", "output": "1", "tokens": 1}
        | {"score": float(k % 3 > 0), "correct": k % 3 > 0, "details": "{}"}
        for name in ("law", "art")
        for k in range(30)
    ]
    turned = [{**row, "score": 1 - row["score"], "correct": not row["correct"]} for row in rows]
    later = [other if row["item"] < "2" else row for row, other in zip(rows, turned)]
    infos = [
        ProbeInfo(name=name, kind="answer", group="knowledge", role="reference", metric="exact match", items=30)
        for name in ("law", "art")
    ]
    report = retention.retention_report("base", "tuned", rows, later, infos)
    with speaking("zh"):
        table = shown(retention.shown(report))
        for ending in ("html", "md", "json"):
            retention.write(report, tmp_path / f"kept.{ending}")
    page = Page((tmp_path / "kept.html").read_text(encoding="utf-8"))
    lines = (tmp_path / "kept.md").read_text(encoding="utf-8")
    assert ("html", {"lang": "zh-CN"}) in page.tags
    for text in (page.text, lines, table):
        assert left_over(text, ["base", "tuned", "law", "art"]) == []
        for words in ("领域", "保持率", "全部问题"):
            assert words in text
    assert "丢失：" in page.text
    assert '"all questions"' in (tmp_path / "kept.json").read_text(encoding="utf-8"), "files are read by programs"


def shown(renderable) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_chinese_punctuation(pages):
    text, markdown, _ = pages
    for shown in (Page(text).text, markdown, *map(str, texts("zh").values())):
        assert not re.search(r"[\u4e00-\u9fff][,;:?!]|[,;:?!][\u4e00-\u9fff]", re.sub(r"'\w+': ", "", shown))
        assert not re.search(r"[，。；：、（] ?[，。；：、）]", shown)
    assert not [key for key, words in texts("en").items() if re.search(r"[\u3000-\u9fff\uff00-\uffef]", str(words))]


def notes_of(path: str) -> list[str]:
    """Sentences that a file gives to `notes.append` or `say`, or puts together for `old`; "7" in every place."""

    def text(node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(v.value if isinstance(v, ast.Constant) else "7" for v in node.values)
        return None

    found = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "append" and node.args:
            if getattr(node.func.value, "id", "") in ("notes", "found"):
                found.append(text(node.args[0]))
        elif isinstance(node, ast.FunctionDef) and node.name == "_what_stood_for_old":
            found += [text(step.value) for step in ast.walk(node) if isinstance(step, ast.Return)]
            found += [text(entry) for step in ast.walk(node) if isinstance(step, ast.List) for entry in step.elts]
    return [words for words in found if words]


def test_what_runs_say_about_their_rows_is_known():
    from retain.data.chat import long_note

    # one sentence is made of two parts there; these are its forms
    on_policy = "prompts {}, answered anew by the model; stored answers where it was not right"
    said = [words for words in notes_of("data/tasks.py") + notes_of("outcome.py") if words != on_policy.format(7)]
    said += [on_policy.format(whose) for whose in ("of earlier tasks", "given by the user (a.jsonl)")]
    said += [long_note(k, 9, 100, out) for k in (1, 2) for out in (False, True)]
    assert len(said) >= 12
    with speaking("zh"):
        for sentence in said:
            for words in (sentence, f"law: {sentence}"):
                assert re.search(r"[\u4e00-\u9fff]", language.quoted(words)), sentence
                assert not left_over(language.quoted(words), []), language.quoted(words)
        assert language.quoted("something else") == "something else"
    assert language.quoted(said[0]) == said[0]


@pytest.mark.parametrize(("drop", "tasks"), [(0.0, ("one",)), (0.05, ("one", "two")), (0.4, ("one",))])
def test_the_sentence_is_that_of_the_analysis(tmp_path, drop, tasks):
    """Built from the results alone, it says in English word for word what the analysis said."""
    results = build_run(tmp_path, tasks=tasks, drop=drop)
    infos = [info for info in results.probes if info.kind != "perplexity"]
    before, after = (
        [row for row in load_items(tmp_path / "probes" / f"{stage}.parquet") if row["probe"] != "plain text"]
        for stage in (results.stages[0], results.stages[-1])
    )
    changes = analysis.changes(before, after, infos)
    verdict = analysis.verdict(changes, infos, before, after)
    found = results.model_copy(update={"probes": infos, "changes": changes, "verdict": verdict})
    assert top.built(found) == verdict.sentence
    with speaking("zh"):
        assert top.sentence(found).endswith("。")


def test_plurals_and_unknown_languages():
    assert say("count.tasks", n=1) == "1 task"
    assert say("count.tasks", n=1200) == "1,200 tasks"
    with speaking("zh"):
        assert say("count.tasks", n=1) == "1 个任务"
    assert language.tag() == "en"
    with pytest.raises(ConfigError, match=r"unknown 'fr'.*Allowed: en, zh"), speaking("fr"):
        pass
    with pytest.raises(KeyError):
        say("no.such")


def test_the_setting():
    assert parse({"tasks": ["x.jsonl"], "language": "zh"}).language == "zh"
    with pytest.raises(ConfigError, match="language"):
        parse({"tasks": ["x.jsonl"], "language": "fr"})


def test_the_language_ends_with_the_report(make_run, monkeypatch):
    monkeypatch.setattr(page.figures, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(make_run(), lang="zh")
    assert language.tag() == "en"
