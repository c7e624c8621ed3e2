"""What a search found: the shape of `search.json`, and `search.html`, `search.md` and `search.svg` made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text

from retain.errors import RunError
from retain.report import front, markdown, page, wording
from retain.report.canvas import INK, Picture
from retain.report.language import say
from retain.results import Estimate, write_text

Unit = Literal["points", "nats per token"]
#: How a trial was chosen: the best balance of those that learned some, or the least lost of those that learned enough
#: (where a number is in nats), or the most learned within a limit; where there is none such, the least lost at all, or
#: the most learned.
Rule = Literal["rule_balance", "rule_share", "rule_limit", "rule_over", "rule_most"]
#: Of the most that a trial learned: who learned as much is asked how little it lost, or for its balance.
ENOUGH, SOME = 0.95, 0.5
#: How trials end, and the text that counts them.
_COUNTS = {
    "finished": "count_finished",
    "hopeless": "count_hopeless",
    "failed": "count_failed",
    "running": "count_running",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tried(_Record):
    """A trial. `learned` and `lost` are shares or nats per token, as the units of the search say."""

    number: int
    values: dict[str, Any]  # path → value
    state: Literal["finished", "hopeless", "failed", "running"]
    learned: Estimate | None = None  # mean gain on the task probes; positive = better
    lost: Estimate | None = None  # mean loss on the reference probes after the last task; positive = worse
    steps: int = 0  # optimizer steps in all
    seconds: float = 0.0  # of training and probing
    reason: str = ""  # why it failed or was ended early
    directory: str = ""  # of its run, from the folder of the search


class Again(_Record):
    """The chosen trial once more, with other seeds. The intervals are over the runs (Student's t)."""

    seeds: list[int]
    learned: Estimate
    lost: Estimate
    runs: list[Tried]


class Found(_Record):
    """Everything that is known of a search."""

    name: str
    model: str
    tasks: list[str]
    created: str
    mode: str
    over: list[str]
    seed: int
    confidence: float = 0.95
    learned_unit: Unit = "points"
    lost_unit: Unit = "points"
    trials: list[Tried]
    best: int | None = None  # number of the recommended trial
    rule: Rule | None = None  # by which it was chosen
    limit: float | None = None  # of that rule: the largest loss that was asked for, in the unit of `lost`
    steps_saved: float | None = None  # share of the optimizer steps that ending hopeless trials saved
    again: Again | None = None


def on_front(trials: Sequence[Tried]) -> list[Tried]:
    """The finished trials that no other one, nor the base itself, beats; the least learned first."""
    finished = [t for t in trials if t.learned is not None and t.lost is not None and t.state == "finished"]
    places = [(0.0, 0.0), *((t.learned.value, -t.lost.value) for t in finished if t.learned and t.lost)]
    return [finished[i - 1] for i in front.pareto(places) if i]


def beaten(trials: Sequence[Tried]) -> list[Tried]:
    """The finished trials that another one beats: it learned no less and lost no more, and one of the two is better.

    None of these is ever recommended, whatever is still tried.
    """
    found = [(t, t.learned.value, -t.lost.value) for t in trials if t.state == "finished" and t.learned and t.lost]
    return [t for t, *mine in found if any(a >= mine[0] and b >= mine[1] and [a, b] != mine for _, a, b in found)]


def draw(found: Found) -> Picture | None:
    """All finished trials as points; None where there is none. Names stand at those of the front."""
    finished = [t for t in found.trials if t.state == "finished" and t.learned and t.lost]
    if not finished:
        return None
    best = {t.number for t in on_front(finished)} | {found.best}
    points = [
        (
            say("search.trial", n=t.number) if t.number in best else "",
            _scaled(t.learned, found.learned_unit),
            _scaled(t.lost, found.lost_unit, -1),
        )
        for t in finished
        if t.learned and t.lost
    ]
    axis = say("search.kept_axis", unit=_unit(found.lost_unit))
    picture = front.learned_kept(points, _unit(found.learned_unit), found.confidence, base=0.0, kept_axis=axis)
    return Picture("search", picture.title, picture.alt, picture.svg)


def write(found: Found, folder: Path) -> Path:
    """Write the page in its three forms and `search.json`; returns the path of `search.html`.

    Raises:
        RunError: the folder cannot be written.
    """
    picture = draw(found)
    texts = {"search.json": found.model_dump_json(indent=1) + "\n", "search.md": _markdown(found, picture)}
    texts["search.html"] = page.template("search.html.j2").render(
        found=found,
        picture=picture,
        head=head(found),
        front=[(t, cells(t, found)) for t in on_front(found.trials)],
        trials=[(t, [*cells(t, found), state(t)]) for t in found.trials],
        conclusion=conclusion(found),
    )
    if picture is not None:
        texts["search.svg"] = picture.svg.replace(INK, "#767676")
    try:
        for name, text in texts.items():
            write_text(folder / name, text)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}). Give another folder as --output.") from error
    return folder / "search.html"


def load(folder: Path) -> Found:
    """Read `search.json`.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = Path(folder) / "search.json"
    try:
        return Found.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}).") from None


def shown(found: Found) -> Table:
    """The front for the terminal."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for place, word in enumerate(head(found)):
        table.add_column(word, justify="right" if 0 < place < 3 else "left", overflow="fold")
    for trial in on_front(found.trials):
        style = "bold" if trial.number == found.best else ""
        table.add_row(*(Text(cell, style=style) for cell in cells(trial, found)))
    return table


def head(found: Found) -> list[str]:
    """The words above a table of trials."""
    learned = say("search.learned", unit=_unit(found.learned_unit))
    return [say("search.number"), learned, say("search.lost", unit=_unit(found.lost_unit)), say("search.settings")]


def cells(trial: Tried, found: Found) -> list[str]:
    """A trial in the columns of `head`."""
    settings = say("list.comma").join(f"{path}={_value(value)}" for path, value in trial.values.items())
    numbers = [(trial.learned, found.learned_unit), (trial.lost, found.lost_unit)]
    return [str(trial.number), *(amount(number, unit) for number, unit in numbers), settings]


def state(trial: Tried) -> str:
    """How a trial ended, in words."""
    return say(f"search.{trial.state}") + (say("list.colon") + trial.reason if trial.reason else "")


def amount(number: Estimate | None, unit: Unit) -> str:
    """A number with its interval: "+12.5 [+8.1, +16.9]"."""
    if number is None:
        return "–"
    scaled, digits = _scaled(number, unit), 1 if unit == "points" else 3
    value, low, high = (wording.number(end, digits, True) for end in (scaled.value, scaled.low, scaled.high))
    return f"{value} [{low}, {high}]"


def rule(found: Found) -> str:
    """By which rule the recommended trial was chosen, in words."""
    scale = 100 if found.lost_unit == "points" else 1
    enough = SOME if found.rule == "rule_balance" else ENOUGH
    share, limit = wording.percent(f"{100 * enough:g}"), f"{scale * (found.limit or 0):g}"
    return say(f"search.{found.rule}", share=share, limit=limit, unit=_unit(found.lost_unit))


def conclusion(found: Found) -> list[str]:
    """What came of it and how far it can be trusted, a sentence each."""
    ended = {word: sum(t.state == word for t in found.trials) for word in _COUNTS}
    counts = [say(f"search.{_COUNTS[word]}", n=n) for word, n in ended.items() if n]
    lines = [say("search.tried", counts=say("list.comma").join(counts))]
    if found.steps_saved is not None and ended["hopeless"]:
        saved = wording.percent(wording.number(100 * found.steps_saved))
        lines.append(say("search.saved", share=saved))
    if found.best is not None:
        lines.append(say("search.best", n=found.best, rule=rule(found)))
        lines.append(say("search.optimistic", n=max(1, ended["finished"])))
    if found.again is not None:
        learned = amount(found.again.learned, found.learned_unit)
        lost = amount(found.again.lost, found.lost_unit)
        lines.append(say("search.again", n=len(found.again.seeds), learned=learned, lost=lost))
    return lines


def _markdown(found: Found, picture: Picture | None) -> str:
    best, every = on_front(found.trials), found.trials
    parts = [
        f"# {say('search.title')}{say('list.colon')}{markdown.cell(found.name)}",
        f"{markdown.cell(found.model)} → {markdown.cell(say('page.then').join(found.tasks))}",
        "\n".join(f"- {line}" for line in conclusion(found)),
        f"## {say('search.front')}",
        markdown.table(head(found), [cells(t, found) for t in best]),
    ]
    if picture is not None:
        parts += [f"![{picture.title}](search.svg)", picture.alt]
    rows = [[*cells(t, found), state(t)] for t in every]
    parts += [f"## {say('search.every')}", markdown.table([*head(found), say("search.state")], rows)]
    return "\n\n".join(parts) + "\n"


def _scaled(number: Estimate | None, unit: Unit, sign: int = 1) -> Estimate:
    assert number is not None
    factor = sign * (100 if unit == "points" else 1)
    low, high = sorted((factor * number.low, factor * number.high))
    return Estimate(value=factor * number.value, low=low, high=high)


def _unit(unit: Unit) -> str:
    return say("unit.points" if unit == "points" else "unit.nats_token")


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
