"""Several runs side by side: the numbers against a count by hand, what is refused, the picture, the page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import browser
import numpy as np
import pytest
from browser import Page
from fake_run import HOSTILE, build_run
from rich.console import Console

from retain.errors import RunError
from retain.report import compare, front, labels, terminal, wording
from retain.results import Estimate, load_items, load_results, save_items, save_results

TASK = "reasoning test"


def scores(directory: Path, stage: str, probe: str) -> np.ndarray:
    rows = load_items(directory / "probes" / f"{stage}.parquet")
    return np.array([row["score"] for row in rows if row["probe"] == probe])


def number(text: str) -> float:
    return float(re.match(r"[+−]?[\d.]+", text)[0].replace("−", "-"))


@pytest.fixture
def runs(make_run) -> list[Path]:
    return [make_run("naive", drop=0.4, methods={}), make_run("careful", drop=0.03, seed=1)]


def test_numbers_against_a_count_by_hand(runs):
    found = compare.load(runs)
    results = [load_results(place) for place in runs]
    gained, drops = [], []
    for place, r, standing in zip(runs, results, found):
        gained.append(np.mean(scores(place, r.stages[-1], TASK) - scores(place, r.stages[0], TASK)))
        shares = [p.name for p in r.probes if p.role == "reference" and p.metric != "perplexity"]
        before, after = ([scores(place, stage, p).mean() for p in shares] for stage in (r.stages[0], r.stages[-1]))
        drops.append(np.mean(before) - np.mean(after))
        assert standing.learned.value == pytest.approx(gained[-1])
        assert standing.learned.low < gained[-1] < standing.learned.high
        assert standing.kept.value == pytest.approx(100 * np.mean(after) / np.mean(before))
        for big, same in zip(standing.numbers, wording.three(r)):
            assert (big.value, f"95 %: {big.interval}") == (same.value, same.interval)
    learned, lost = found[1].numbers[3:]
    assert (learned.label, lost.label) == ("Learned vs naive", "Lost vs naive")
    assert number(learned.value) == pytest.approx(100 * (gained[1] - gained[0]), abs=0.051)
    assert number(lost.value) == pytest.approx(100 * (drops[1] - drops[0]), abs=0.051)
    assert lost.tone == "good"  # a tenth of the loss: less, beyond doubt
    assert [n.value for n in found[0].numbers[3:]] == ["reference", "reference"]
    turned = compare.load(runs[::-1])[1].numbers[4]
    assert turned.tone == "bad"
    assert number(turned.value) == -number(lost.value)


def test_several_tasks_have_one_interval(make_run):
    first, second = (make_run(name, tasks=("one", "two"), seed=k) for k, name in enumerate("ab"))
    found = compare.load([first, second])[1]
    assert re.fullmatch(r"\[\+[\d.]+, \+[\d.]+\]", found.numbers[0].interval)
    assert number(found.numbers[0].value) == pytest.approx(100 * found.learned.value, abs=0.051)


def test_perplexity_alone(runs):
    for place in runs:
        results = load_results(place)
        left = [p for p in results.probes if p.name in (TASK, "plain text")]
        save_results(results.model_copy(update={"probes": left, "verdict": None}), place)
    rows = load_items(runs[1] / "probes" / "01-reasoning.parquet")
    worse = [{**row, "score": row["score"] + 0.5 * (row["probe"] == "plain text")} for row in rows]
    save_items(worse, runs[1] / "probes" / "01-reasoning.parquet")
    found = compare.load(runs)
    assert found[1].numbers[4].value == "+0.500 nats"
    assert np.isnan(found[1].kept.low)
    assert compare.draw(found).svg.count('style="fill: none; stroke: #e69f00') == 1  # no interval of what was kept


def test_other_runs_are_refused(make_run, runs):
    place = make_run("other", tasks=("law",))
    with pytest.raises(RunError, match=r"'other' learned law; 'naive' reasoning.*same tasks"):
        compare.load([runs[0], place])
    results = load_results(runs[1])
    fewer = [p for p in results.probes if p.name != "grammar"]
    save_results(results.model_copy(update={"probes": fewer}), runs[1])
    with pytest.raises(RunError, match=r"other probes or numbers of items \(grammar\)"):
        compare.load(runs)
    save_results(results.model_copy(update={"model": "another/model"}), runs[1])
    with pytest.raises(RunError, match="same base model"):
        compare.load(runs)
    base = results.scores["00-base"] | {"grammar": Estimate(value=0.2, low=0.15, high=0.25)}
    save_results(results.model_copy(update={"scores": results.scores | {"00-base": base}}), runs[1])
    with pytest.raises(RunError, match=r"scored 0\.2 on 'grammar', 'naive' 0\.\d+: another base"):
        compare.load(runs)
    save_results(results, runs[1])
    rows = load_items(runs[1] / "probes" / "00-base.parquet")
    save_items([{**rows[0], "prompt": "something else"}, *rows[1:]], runs[1] / "probes" / "00-base.parquet")
    with pytest.raises(RunError, match="other questions"):
        compare.load(runs)
    with pytest.raises(RunError, match="only measured"):
        compare.load([make_run("measured", tasks=()), runs[0]])


def test_pareto_against_every_pair():
    random = np.random.default_rng(0)
    for count in range(1, 12):
        points = [tuple(map(float, p)) for p in random.integers(0, 6, (count, 2))]
        best = [
            i
            for i, p in enumerate(points)
            if not any(q[0] >= p[0] and q[1] >= p[1] and (q[0] > p[0] or q[1] > p[1]) for q in points)
        ]
        found = front.pareto(points)
        assert sorted(found) == best
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def test_picture_marks_every_run_and_the_front(runs):
    picture = compare.draw(compare.load(runs))
    texts = [e.text for e in ElementTree.fromstring(picture.svg).iter() if e.tag.endswith("text")]
    assert {"base", "naive", "careful", "learned, points on the new tasks", "kept, % of the base"} <= set(texts)
    points = [("best", estimate(40, 5), estimate(95, 2)), ("worse", estimate(30, 5), estimate(70, 4))]
    drawn = front.learned_kept(points, "points").svg
    assert "fill: #ffffff; stroke: #e69f00" in drawn  # hollow: the first run is better on both
    assert "fill: #0072b2; stroke: #0072b2" in drawn
    assert front.learned_kept(points, "points").svg == drawn
    whiskers = drawn.count('style="fill: none; stroke: #0072b2')
    without = [("best", estimate(40, 5), Estimate(value=95, low=float("nan"), high=float("nan"))), points[1]]
    assert front.learned_kept(without, "points").svg.count('style="fill: none; stroke: #0072b2') == whiskers - 1


@pytest.mark.parametrize("spread", [4.0, 15.0, 80.0])
def test_labels_cover_nothing(spread):
    random = np.random.default_rng(3)
    inside = np.array([[0.0, 0.0], [280.0, 230.0]])
    for count in (2, 5, 7):
        spots = np.array([[20.0, 200.0], *(np.array([180.0, 120.0]) + spread * random.standard_normal((count, 2)))])
        spots = np.clip(spots, 8, [270, 220])
        sizes = np.column_stack([random.uniform(20, 90, count + 1), np.full(count + 1, 13.0)])
        boxes = labels.place(spots, sizes, [], inside)
        for i, box in enumerate(boxes):
            np.testing.assert_allclose(box[1] - box[0], sizes[i])
            assert labels.shared(box, inside) == pytest.approx(sizes[i].prod())
            assert labels.shared(box, np.delete(boxes, i, 0)).sum() == 0
            assert labels.distance(box, spots).min() > 3  # half a point
            near = labels.distance(box, spots)
            assert near[i] > labels.JOINED or near[i] == near.min()


def test_page_and_markdown(runs):
    found = compare.load(runs)
    path = compare.write(found, runs[0].parent / "out")
    text = path.read_text(encoding="utf-8")
    page, lines = Page(text), (path.parent / "compare.md").read_text(encoding="utf-8")
    for standing in found:
        for big in standing.numbers:
            for word in (big.label, big.value, big.interval):
                assert word in page.text
            assert f"{big.value} {big.interval}".strip() in lines
        assert wording.headline(standing.results)[0] in page.text
    assert page.open == []
    assert "![Learned against kept](compare.svg)" in lines
    assert "none (plain fine-tuning)" in page.text
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "img")]
    (runs[0] / "report.html").write_text("x")
    page = Page(compare.write(found, runs[0].parent / "out").read_text(encoding="utf-8"))
    assert {"href": "../naive/report.html"} in [a for tag, a in page.tags if tag == "a"]


def test_hostile_names_stay_text(make_run):
    first, second = make_run("first"), make_run("second")
    build_run(second, hostile=True, seed=1, items=False)
    page = Page(compare.write(compare.load([first, second]), first.parent).read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert " ".join(HOSTILE.split()) in page.text
    text = (first.parent / "compare.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text


def test_folder_that_cannot_be_written(runs):
    blocked = runs[0].parent / "file"
    blocked.write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        compare.write(compare.load(runs), blocked)


def test_table_for_the_terminal(runs):
    found = compare.load(runs)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal.standings([(s.label, s.results, s.numbers) for s in found]))
    shown = console.export_text()
    for standing in found:
        for word in (standing.label, *(n.value for n in standing.numbers), *(n.interval for n in standing.numbers)):
            assert word in shown


CHECK = """<script>
addEventListener("load", () => {
  const box = (e) => e.getBoundingClientRect();
  const texts = [...document.querySelectorAll(".chart text")].map((e) => [e.textContent, box(e)]);
  const both = (p, q) => p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom;
  const covered = texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) => both(p, q)).map(([b]) => [a, b]));
  const wide = [...document.querySelectorAll("main *")].filter((e) => !e.closest(".wide, svg, .cards thead")
    && box(e).right > innerWidth + 1).map((e) => e.tagName + "." + e.className).slice(0, 5);
  parent.document.body.dataset.seen = JSON.stringify(
    {errors: window.seen, inner: innerWidth, scroll: document.documentElement.scrollWidth, wide, covered});
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium binary")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(make_run, tmp_path, width):
    names = {"naive": 0.4, "replay 0.3": 0.03, "replay 0.1": 0.04, "replay and distillation": 0.035, "l2sp": 0.2}
    places = [make_run(name, drop=drop, seed=k) for k, (name, drop) in enumerate(names.items())]
    text = compare.write(compare.load(places), tmp_path / "out").read_text(encoding="utf-8")
    watched = text.replace("style-src", "script-src 'unsafe-inline'; style-src", 1)  # the page itself has no script
    seen = browser.look(watched, CHECK, width, tmp_path)
    assert seen["errors"] == []
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    assert seen["covered"] == []
