"""The colours that mean something stay apart for readers who see no red or no green, and text stands out."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import colorspacious
import numpy as np
import pytest

import retain.report
from retain.report.canvas import BEFORE, LINES, RUNS
from retain.report.figures import luminance

CSS = (Path(retain.report.__file__).parent / "style.css").read_text(encoding="utf-8")
SCHEMES = {
    "light": CSS.index(":root"),
    "dark": CSS.index("prefers-color-scheme: dark"),
    "print": CSS.index("@media print {"),
}
#: None is a reader with all three cones; the others see no red, no green (Machado et al. 2009, severity 100).
READERS = [None, "protanomaly", "deuteranomaly"]
APART = 10  # CAM02-UCS; two colours that just differ are about 1 apart, neighbours on a ten-colour palette about 10


def scheme(name: str) -> dict[str, str]:
    found = re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", CSS[SCHEMES[name] : CSS.index("}", SCHEMES[name])])
    return {key: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:]) for key, value in found}


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])


def apart(one: str, other: str, reader: str | None) -> float:
    seen = [rgb(one), rgb(other)]
    if reader:
        space = {"name": "sRGB1+CVD", "cvd_type": reader, "severity": 100}
        seen = [np.clip(colorspacious.cspace_convert(c, space, "sRGB1"), 0, 1) for c in seen]
    return float(colorspacious.deltaE(*seen, input_space="sRGB1"))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(rgb(one)), luminance(rgb(other))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_simulation_sees_what_is_known():
    """Orange and yellow-green are one colour without red cones; blue and orange never are."""
    assert apart("#e69f00", "#b8a800", None) > APART > 1 > apart("#e69f00", "#b8a800", "protanomaly")
    assert apart("#0072b2", "#e69f00", "protanomaly") > 5 * APART


@pytest.mark.parametrize("reader", READERS)
def test_good_bad_and_unknown_stay_apart(reader):
    for name in SCHEMES:
        colours = scheme(name)
        for kind in ("", "-mark"):
            words = [colours[word + kind] for word in ("good", "bad", "unknown")]
            assert min(apart(*pair, reader) for pair in combinations(words, 2)) > APART, (name, kind)
            assert apart(words[0], words[1], reader) > 3 * APART, (name, kind)


@pytest.mark.parametrize("reader", READERS)
def test_runs_and_lines_stay_apart(reader):
    assert min(apart(*pair, reader) for pair in combinations([BEFORE, *RUNS], 2)) > 2 * APART
    assert min(apart(*pair, reader) for pair in combinations(LINES, 2)) > APART


def test_swatches_of_the_page_are_the_colours_of_the_charts():
    default = re.search(r"\.swatch \{[^}]*background: (#\w+)", CSS)[1]
    found = dict(re.findall(r"\.s(\d) \{ background: (#\w+)", CSS))
    assert [found.get(str(k), default) for k in range(7)] == LINES[:7]


@pytest.mark.parametrize("name", ["light", "dark", "print"])
def test_text_stands_out(name):
    """WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    colours = scheme(name)
    for word in ("ink", "soft", "accent", "good", "bad", "unknown"):
        assert contrast(colours[word], colours["page"]) >= 4.5, word
        assert contrast(colours[word], colours["card"]) >= 4.5, word
    for word in ("good", "bad", "unknown"):
        assert contrast(colours[word], colours[f"{word}-back"]) >= 4.5, word
        assert contrast(colours["ink"], colours[f"{word}-back"]) >= 4.5, word
        assert contrast(colours["soft"], colours[f"{word}-back"]) >= 4.5, word
