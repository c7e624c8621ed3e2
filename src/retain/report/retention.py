"""Knowledge retention: one model against another on the same questions, domain by domain, as Markdown, HTML or JSON.

Retention is the score after as a percentage of the score before, at most 100 (`functional.forgetting.retention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from retain import analysis
from retain.errors import DataError, RunError
from retain.report import flips, language, markdown, wording
from retain.report.language import say
from retain.report.terminal import STYLES
from retain.report.wording import Tone
from retain.results import Change, Estimate, ProbeInfo, write_text

EVERY = "all questions"
ENDINGS = (".md", ".html", ".json")
_HEAD = ("domain", "items", "before", "after", "retention", "band", "lost", "gained", "change", "conclusion")
_TONES: dict[str, Tone] = {"excellent": "good", "good": "good", "fair": "unknown", "poor": "bad"}
Rows = Sequence[Mapping[str, Any]]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kept(_Record):
    """What is left of one domain: `retention` is that of `change`, in percent, with its interval."""

    info: ProbeInfo
    change: Change
    retention: Estimate


class Flip(_Record):
    """A question that was answered right by one model only (or that got worse or better)."""

    domain: str
    item: str
    outcome: str
    question: str
    reference: str
    before: str
    after: str


class Retention(_Record):
    """The report: domains in the order of the probes, all of them together, and the questions that changed.

    `every` pools the questions of the domains that are scored by right or wrong, each question counting once; None
    where fewer than two domains are. Its p is its own: the domains' are adjusted among themselves (Holm).
    """

    base: str
    tuned: str
    confidence: float
    seed: int
    domains: list[Kept]
    every: Kept | None
    flips: list[Flip]


def retention_report(
    base: str,
    tuned: str,
    before: Rows,
    after: Rows,
    infos: Sequence[ProbeInfo],
    confidence: float = 0.95,
    seed: int = 0,
    texts: Mapping[tuple[str, str], str] | None = None,
) -> Retention:
    """Set the answers of one model against those of another.

    Args:
        base, tuned: what the models are called.
        before, after: their item rows, of the same probes.
        infos: the probes.
        texts: (probe, item) → question, where the prompt as the model saw it is not to be shown.

    Raises:
        RunError: items that differ, or too few for an interval.
    """
    domains = _kept(before, after, infos, confidence, seed)
    every = None
    old, new = pooled(infos, before), pooled(infos, after)
    if old is not None and new is not None:
        (every,) = _kept(old[1], new[1], [old[0]], confidence, seed)
    return Retention(
        base=base, tuned=tuned, confidence=confidence, seed=seed, domains=domains, every=every,
        flips=_flips(before, after, infos, texts or {}),
    )  # fmt: skip


def pooled(infos: Sequence[ProbeInfo], rows: Rows) -> tuple[ProbeInfo, list[dict[str, Any]]] | None:
    """The questions of several probes of one metric, a share of right answers, as one probe; None without such."""
    counted = [info for info in infos if wording.is_share(info) and info.higher_is_better]
    if len(counted) < 2 or len(counted) < len(infos) or len({info.metric for info in counted}) > 1:
        return None
    info = counted[0].model_copy(
        update={"name": EVERY, "items": sum(info.items for info in counted), "chance": None, "task": None}
    )
    return info, [{**row, "probe": EVERY, "item": f"{row['probe']}/{row['item']}"} for row in rows]


def _kept(before: Rows, after: Rows, infos: Sequence[ProbeInfo], confidence: float, seed: int) -> list[Kept]:
    found = analysis.changes(before, after, infos, confidence, seed)
    spread = analysis.retention_intervals(before, after, found, infos, confidence, seed)
    return [Kept(info=info, change=one, retention=spread[info.name]) for info, one in zip(infos, found)]


def _flips(before: Rows, after: Rows, infos: Sequence[ProbeInfo], texts: Mapping[tuple[str, str], str]) -> list[Flip]:
    later = {(row["probe"], row["item"]): row for row in after}
    better = {info.name: info.higher_is_better for info in infos}
    found = []
    for row in before:
        key = (row["probe"], row["item"])
        outcome = flips.outcome(dict(row), dict(later[key]), better[key[0]])
        if outcome in ("lost", "gained"):
            shown = {"question": texts.get(key, row["prompt"]), "reference": row["reference"]}
            said = {"before": row["output"], "after": later[key]["output"]}
            found.append(Flip(domain=key[0], item=key[1], outcome=outcome, **shown, **said))
    return sorted(found, key=lambda flip: flip.outcome != "lost")


def cells(kept: Kept) -> list[str]:
    """One row of the table, in the order of `head`."""
    info, change = kept.info, kept.change
    return [
        say("retention.every") if info.name == EVERY else info.name,
        str(change.items),
        f"{wording.score(info, change.before.value)} {wording.score_interval(info, change.before)}",
        f"{wording.score(info, change.after.value)} {wording.score_interval(info, change.after)}",
        f"{wording.percent(wording.number(kept.retention.value))} [{wording.number(kept.retention.low)}, "
        f"{wording.number(kept.retention.high)}]",
        language.name("band", change.band),
        str(change.lost),
        str(change.gained),
        f"{wording.difference(info, change.difference.value)} {wording.unit(info)} "
        f"{wording.difference_interval(info, change.difference)}",
        language.name("conclusion", change.conclusion),
    ]


def head() -> list[str]:
    """The words above the table."""
    return [say(f"retention.{word}") for word in _HEAD]


def tone(kept: Kept) -> Tone:
    """The colour of a band."""
    return _TONES[kept.change.band]


def lines(report: Retention) -> list[Kept]:
    """The rows of the table: the domains, then all of them."""
    return [*report.domains, *([report.every] if report.every else [])]


def shown(report: Retention) -> Table:
    """The table for the terminal."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(say("retention.domain"), overflow="fold")
    for word in ("before", "after", "retention", "band", "lost_gained", "conclusion"):
        table.add_column(say(f"retention.{word}"), justify="left" if word in ("band", "conclusion") else "right")
    for kept in lines(report):
        if kept is report.every:
            table.add_section()
        name, _, old, new, share, band, lost, gained, _, conclusion = cells(kept)
        coloured = Text(band, style=STYLES[tone(kept)])
        table.add_row(Text(name), old, new, share, coloured, f"{lost}/{gained}", conclusion)
    return table


def explained(report: Retention) -> str:
    """How to read the numbers."""
    return say("retention.explained", percent=wording.percent(f"{100 * report.confidence:g}"))


def changed(report: Retention) -> list[tuple[str, str, list[Flip]]]:
    """The questions that changed: outcome, title, questions; lost ones first."""
    found = []
    for outcome, key in (("lost", "retention.lost_questions"), ("gained", "retention.gained_questions")):
        if mine := [flip for flip in report.flips if flip.outcome == outcome]:
            found.append((outcome, say(key, n=len(mine)), mine))
    return found


def write(report: Retention, path: Path) -> None:
    """Write the report, in the form that the file's ending says.

    Raises:
        RunError: the file cannot be written.
    """
    check_ending(path)
    if path.suffix == ".json":
        text = report.model_dump_json(indent=1) + "\n"
    elif path.suffix == ".md":
        text = _markdown(report)
    else:
        from retain.report import page  # draws in matplotlib's colours; the terminal does without

        shown = {"rows": [(cells(kept), tone(kept)) for kept in lines(report)], "explained": explained(report)}
        text = page.template("retention.html.j2").render(report=report, head=head(), changed=changed(report), **shown)
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}). Give another file as --output.") from error


def check_ending(path: Path) -> None:
    """Raises DataError where the file's ending is none of `ENDINGS`."""
    if path.suffix not in ENDINGS:
        raise DataError(f"--output: '{path}' given. Give a name that ends in {', '.join(ENDINGS)}.")


def _markdown(report: Retention) -> str:
    parts = [
        f"# {say('retention.title')}{say('list.colon')}{markdown.cell(report.base)} → {markdown.cell(report.tuned)}",
        markdown.table(head(), [cells(kept) for kept in lines(report)]),
        explained(report),
    ]
    words = [say(f"retention.{word}") for word in ("domain", "question", "right_answer", "before", "after")]
    for _, title, mine in changed(report):
        rows = [(flip.domain, flip.question, flip.reference, flip.before, flip.after) for flip in mine]
        parts += [f"## {title}", markdown.table(words, rows)]
    return "\n\n".join(parts) + "\n"
