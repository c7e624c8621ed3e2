"""The written report: everything is in it, nothing in it is dangerous, and it opens in a browser."""

from __future__ import annotations

import json
import re
import shutil

import browser
import pytest
from browser import Page
from fake_run import HOSTILE, build_run

from retain.errors import RunError
from retain.report import markdown, wording, write_report
from retain.report.flips import collect, outcome
from retain.results import load_items, load_results, save_results


def read(directory, **options) -> Page:
    return Page(write_report(directory, **options).read_text(encoding="utf-8"))


def test_every_number_is_there(make_run):
    directory = make_run("careful", drop=0.2)
    results, page = load_results(directory), read(directory)
    for info in results.probes:
        assert info.name in page.text
    for change in results.changes:
        info = next(info for info in results.probes if info.name == change.probe)
        factor, digits = (1, 2) if info.kind == "perplexity" else (100, 1)
        for estimate in (change.before, change.after):
            assert f"{factor * estimate.value:.{digits}f}" in page.text
            assert f"[{factor * estimate.low:.{digits}f}, {factor * estimate.high:.{digits}f}]" in page.text
        digits = 3 if info.kind == "perplexity" else 1
        low, high = (
            f"{factor * v:+.{digits}f}".replace("-", "−") for v in (change.difference.low, change.difference.high)
        )
        assert f"[{low}, {high}]" in page.text
        assert change.conclusion in page.text
    assert results.verdict.sentence in page.text
    for words in (
        "text the model wrote itself (400 rows)",
        results.command,
        results.model,
        "fraction",
        "0.15",
        "2.13.0",
    ):
        assert words in page.text
    assert page.open == []


def test_verdict_comes_first(make_run):
    page = read(make_run())
    results_words = [word for word in page.words if word.strip()]
    verdict = next(k for k, word in enumerate(results_words) if "Learned" in word and "title" not in word)
    table = next(k for k, word in enumerate(results_words) if "In pictures" in word)
    assert verdict < table


def test_big_numbers_follow_from_the_results(make_run):
    results = load_results(make_run(drop=0.2))
    references = [c for c in results.changes if c.probe not in ("reasoning test", "plain text")]
    before = sum(c.before.value for c in references) / 5
    after = sum(c.after.value for c in references) / 5
    assert wording.kept(results).value == f"{100 * after / before:.1f} %"
    macro = results.verdict.difference
    assert wording.kept(results).interval == (
        f"95 %: [{100 * (before + macro.low) / before:.1f}, {100 * (before + macro.high) / before:.1f}]"
    )
    assert wording.lost(results).value == f"{100 * (before - after):.1f} points"
    assert wording.lost(results).interval == f"95 %: [{-100 * macro.high:.1f}, {-100 * macro.low:.1f}]"
    task = next(c for c in results.changes if c.probe == "reasoning test")
    assert wording.learned(results).value == f"+{100 * task.difference.value:.1f} points"


@pytest.mark.parametrize(
    ("conclusions", "low", "high", "words", "tone"),
    [
        (["kept", "gained"], -0.01, 0.03, "Learned, and kept what it could do", "good"),
        (["lost", "kept"], -0.04, 0.01, "Learned, but 1 of 5 old probes got worse", "bad"),
        (["cannot tell", "kept"], -0.05, 0.02, "Learned; cannot tell what was lost", "unknown"),
        (["cannot tell", "kept"], -0.019, 0.02, "Learned, and kept what it could do", "good"),
        (["cannot tell", "kept"], -0.05, -0.01, "Learned, but lost 3.0 points of what it could do", "bad"),
    ],
)
def test_headline(make_run, conclusions, low, high, words, tone):
    results = load_results(make_run())
    task = next(c for c in results.changes if c.probe == "reasoning test")
    others = [c for c in results.changes if c.probe not in ("reasoning test", "plain text")]
    spread = [c.model_copy(update={"conclusion": conclusions[min(k, 1)]}) for k, c in enumerate(others)]
    macro = results.verdict.difference.model_copy(update={"value": -0.03, "low": low, "high": high})
    verdict = results.verdict.model_copy(update={"difference": macro})
    results = results.model_copy(update={"changes": [task, *spread], "verdict": verdict})
    assert wording.headline(results) == (words, tone)


def test_lower_is_better_counts_as_gain(make_run):
    results = load_results(make_run())
    probes = [
        info.model_copy(update={"higher_is_better": False}) if info.role == "task" else info for info in results.probes
    ]
    turned = wording.learned(results.model_copy(update={"probes": probes}))
    assert turned.value == wording.learned(results).value.replace("+", "−")


def test_nothing_is_loaded_from_the_network(make_run):
    text = write_report(make_run(), compare=[make_run("naive", drop=0.3)]).read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    assert not re.search(r"@import|url\((?!#)", text)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_hostile_text_stays_text(make_run):
    directory = make_run(hostile=True, tasks=("a</script><b>",), items=False)
    build_run(directory, hostile=True)
    results = load_results(directory)
    infos = [results.probes[0].model_copy(update={"name": HOSTILE}), *results.probes[1:]]
    changes = [
        c.model_copy(update={"probe": HOSTILE}) if c.probe == results.probes[0].name else c for c in results.changes
    ]
    scores = {
        stage: {HOSTILE if name == results.probes[0].name else name: v for name, v in found.items()}
        for stage, found in results.scores.items()
    }
    update = {
        "probes": infos,
        "changes": changes,
        "scores": scores,
        "command": HOSTILE,
        "old": HOSTILE,
        "model": HOSTILE,
    }
    save_results(results.model_copy(update={**update, "methods": {HOSTILE: {HOSTILE: HOSTILE}}}), directory)
    (directory / "run.yaml").write_text(HOSTILE, encoding="utf-8")
    (directory / "env.json").write_text(json.dumps({HOSTILE: HOSTILE}), encoding="utf-8")
    page = read(directory)
    assert len(page.scripts) == 2
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert " ".join(HOSTILE.split()) in page.text
    assert any(item["prompt"] == HOSTILE for item in page.data["items"])
    for picture in (directory / "figures").glob("*.svg"):
        assert "<script" not in picture.read_text(encoding="utf-8")
    plain = re.sub(r"^(`{3,})sh\n.*?^\1$", "", (directory / "report.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in plain
    assert "<img" not in plain
    assert "](http" not in plain


def test_flips_match_the_item_tables(make_run):
    directory = make_run(drop=0.2)
    results, page = load_results(directory), read(directory)
    counts: dict[tuple[str, str], int] = {}
    for item in page.data["items"]:
        counts[item["probe"], item["outcome"]] = counts.get((item["probe"], item["outcome"]), 0) + 1
    for change in results.changes:
        if change.probe != "plain text":
            for word in ("lost", "gained", "kept"):
                assert counts.get((change.probe, word), 0) == getattr(change, word)
    assert not [item for item in page.data["items"] if item["probe"] == "plain text"]
    after = {(row["probe"], row["item"]): row for row in load_items(directory / "probes" / "01-reasoning.parquet")}
    for item in page.data["items"]:
        assert item["after"] == after[item["probe"], item["item"]]["output"]
    first = page.data["items"][0]
    assert first["outcome"] == "lost"
    assert re.fullmatch(r"answer \d+ / the answer \d+", first["reference"])


def test_flips_without_right_or_wrong_follow_the_score():
    row = {"correct": None, "score": 0.5, "output": "x"}
    assert outcome(row, {**row, "score": 0.2}) == "worse"
    assert outcome(row, {**row, "score": 0.2}, higher_is_better=False) == "better"
    assert outcome(row, row) == "same"


def test_flips_that_do_not_fit_are_counted(make_run, monkeypatch):
    monkeypatch.setattr("retain.report.flips.TOTAL_LIMIT", 20_000)
    directory = make_run(drop=0.2)
    flips = collect(directory, load_results(directory))
    assert 0 < len(flips.items) < sum(flips.counts.values())
    assert len(flips.items) + flips.left_out == sum(flips.counts.values()) == 610
    assert {item["outcome"] for item in flips.items} <= {"lost", "gained"}
    assert f"{flips.left_out} more items did not fit" in read(directory).text


def test_compare_shows_both_runs(make_run):
    careful, naive = make_run("careful", drop=0.02), make_run("naive", drop=0.3, methods={}, seed=5)
    page = read(careful, compare=[naive])
    for directory in (careful, naive):
        results = load_results(directory)
        for number in (wording.learned(results), wording.kept(results), wording.lost(results)):
            assert number.value in page.text
            assert number.interval in page.text
        assert wording.headline(results)[0] in page.text
    assert page.data["others"] == ["naive"]
    theirs = {(row["probe"], row["item"]): row for row in load_items(naive / "probes" / "01-reasoning.parquet")}
    for item in page.data["items"]:
        assert item["others"] == [theirs[item["probe"], item["item"]]["output"]]
    assert "| naive |" in (careful / "report.md").read_text(encoding="utf-8")
    assert "naive" in (careful / "figures" / "scores.svg").read_text(encoding="utf-8")


def test_compare_refuses_what_cannot_be_compared(make_run):
    mine, other = make_run("mine"), make_run("other")
    with pytest.raises(RunError, match="the run itself"):
        write_report(mine, compare=[mine])
    results = load_results(other)
    save_results(results.model_copy(update={"model": "another/model"}), other)
    with pytest.raises(RunError, match=r"another/model.*Compare runs on the same base model"):
        write_report(mine, compare=[other])
    probes = [info.model_copy(update={"items": info.items + 1}) for info in results.probes]
    save_results(results.model_copy(update={"probes": probes}), other)
    with pytest.raises(RunError, match="share no probe"):
        write_report(mine, compare=[other])


def test_runs_of_the_same_name_keep_apart(make_run):
    mine, other = make_run("mine"), make_run("other")
    save_results(load_results(other).model_copy(update={"name": "mine"}), other)
    assert read(mine, compare=[other]).data["others"] == ["mine (other)"]


def test_measured_only(make_run):
    directory = make_run(tasks=())
    page = read(directory)
    assert "nothing was trained" in page.text
    for info in load_results(directory).probes:
        assert info.name in page.text
    assert not (directory / "figures" / "matrix.svg").exists()
    assert page.open == []


def test_sequence_of_tasks(make_run):
    directory = make_run(tasks=("one", "two", "three"))
    page = read(directory)
    for words in ("Backward transfer", "−0.041", "Task by task", "after two", "mean of 3 task probes"):
        assert words in page.text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "probes", "run.yaml", "env.json"])
def test_files_that_are_missing_leave_a_gap(make_run, missing):
    directory = make_run()
    path = directory / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read(directory)
    assert "reasoning test" in page.text
    assert (directory / "figures" / "training.svg").exists() == (missing != "metrics.jsonl")
    assert ("Item by item" in page.text) == (missing != "probes")


def test_damaged_files_are_named(make_run):
    directory = make_run()
    (directory / "probes" / "01-reasoning.parquet").write_text("not parquet")
    with pytest.raises(RunError, match=r"01-reasoning\.parquet: not an item table"):
        write_report(directory)
    with pytest.raises(RunError, match=r"no results\.json"):
        write_report(directory / "probes")


def test_same_run_same_bytes(make_run):
    directory = make_run()
    first = write_report(directory).read_bytes()
    assert write_report(directory).read_bytes() == first


def test_markdown_has_the_numbers_and_ten_examples(make_run):
    directory = make_run(drop=0.2)
    write_report(directory)
    text, results = (directory / "report.md").read_text(encoding="utf-8"), load_results(directory)
    for info, change in wording.changes_of(results, "reference"):
        assert "| " + " | ".join(markdown.cell(word) for word in markdown.change_row(info, change)) + " |" in text
    examples = text.split("## Items that changed")[1].split("\n## ")[0]
    rows = [line for line in examples.splitlines() if line.startswith(("| lost", "| gained"))]
    assert len(rows) == markdown.EXAMPLES
    assert {row.split(" | ")[0] for row in rows} == {"| lost", "| gained"}
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


CHECK = """<script>
window.addEventListener("load", () => {
  const out = {errors: window.seen, inner: innerWidth, scroll: document.documentElement.scrollWidth};
  out.wide = [...document.querySelectorAll("main *")].filter((e) => !e.closest(".wide, pre, svg, .cards thead")
    && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.tagName + "." + e.className).slice(0, 5);
  const all = (what) => [...document.querySelectorAll(what)];
  out.unreachable = all("a, button, input, summary, .wide").filter((e) => e.tabIndex !== 0).map((e) => e.outerHTML);
  const top = (e) => e.getBoundingClientRect();
  out.facts = all("#verdict .number").map((e) => [top(e).top, top(e).left]);
  out.below = top(document.querySelector("nav")).top - Math.max(...all("#verdict .number").map((e) => top(e).bottom));
  out.background = getComputedStyle(document.body).backgroundColor;
  out.all = document.getElementById("count").textContent;
  out.cards = document.querySelectorAll("#list li").length;
  document.querySelector("button[data-outcome=lost]").click();
  out.lost = document.getElementById("count").textContent;
  const find = document.getElementById("find");
  find.value = "Q007 countries"; find.dispatchEvent(new Event("input"));
  document.querySelector("button[data-outcome='']").click();
  out.found = document.getElementById("count").textContent;
  out.first = document.querySelector("#list li .prompt")?.textContent;
  parent.document.body.dataset.seen = JSON.stringify(out);
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium binary")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("hostile", "lang"), [(False, "en"), (True, "en"), (False, "zh")])
def test_in_a_browser(make_run, tmp_path, width, hostile, lang):
    directory = make_run("careful", drop=0.2, hostile=hostile)
    text = write_report(directory, [make_run("naive", drop=0.4)], lang).read_text(encoding="utf-8")
    seen = browser.look(text, CHECK, width, tmp_path)
    assert seen["errors"] == []
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    total = len(Page(text).data["items"])
    assert seen["unreachable"] == []
    assert seen["facts"] == sorted(seen["facts"])  # lost, learned, how sure: downwards or from left to right
    assert len({top for top, _ in seen["facts"]}) == (1 if width == 1280 else 3)
    assert seen["below"] > 0
    count, part = ("{} items", "{} of {} items") if lang == "en" else ("{} 道题", "{1} 道题中的 {0} 道")
    assert seen["all"] == count.format(total)
    assert seen["cards"] == 25
    lost = sum(c.lost for c in load_results(directory).changes)
    assert seen["lost"] == part.format(lost, total)
    assert seen["found"] == part.format(1, total)
    assert seen["first"].startswith("countries: what is the right answer to question 7 of")


PAPER = """<script>
const rules = [...document.styleSheets[0].cssRules].filter((rule) => rule.media?.mediaText.startsWith("print"));
const sheet = document.createElement("style");  // what holds for paper holds here too
sheet.textContent = rules.flatMap((rule) => [...rule.cssRules])
  .filter((rule) => !(rule instanceof CSSPageRule)).map((rule) => rule.cssText).join(" ");
document.head.append(sheet);
for (const rule of document.styleSheets[0].cssRules)
  if (rule.media?.mediaText.startsWith("screen")) rule.media.mediaText = "speech";
window.addEventListener("load", () => {
  const visible = (what) => [...document.querySelectorAll(what)].filter((e) => e.getClientRects().length);
  const cut = visible("table").filter((e) => e.scrollWidth > e.clientWidth + 1
    || e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.textContent.trim().slice(0, 40));
  const out = { errors: window.seen, buttons: visible("button, input, nav a").length, tables: visible("table").length };
  parent.document.body.dataset.seen = JSON.stringify({ ...out, cut });
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium binary")
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_on_paper(make_run, tmp_path, lang):
    """At the width of A4 less its margins (688 pixels): no interactive parts, no table that is cut; then the PDF."""
    text = write_report(make_run(tasks=("one", "two"), drop=0.2), lang=lang).read_text(encoding="utf-8")
    seen = browser.look(text, PAPER, 688, tmp_path)
    assert seen["errors"] == []
    assert seen["buttons"] == 0
    assert seen["tables"] >= 6
    assert seen["cut"] == []
    pdf = browser.printed(text, tmp_path)
    assert pdf.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10
