"""The method pages are as the code would write them now."""

import importlib.util
import re
from pathlib import Path

import pytest

from retain import methods

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_fresh(maker):
    for name, text in maker.pages().items():
        path = maker.FOLDER / name
        assert path.is_file(), f"{name} is missing: run `python docs/make_methods.py`"
        assert path.read_text(encoding="utf-8") == text, f"{name} is stale: run `python docs/make_methods.py`"


def test_no_page_is_left_of_a_method_that_is_gone(maker):
    assert {path.name for path in maker.FOLDER.glob("*.md")} == set(maker.pages())


def test_every_setting_and_part_is_on_its_page(maker):
    for name in maker.own_names():
        text = (maker.FOLDER / f"{name}.md").read_text(encoding="utf-8")
        for key, field in methods.load(name).Config.model_fields.items():
            assert f"| `{key}` |" in text
            assert " ".join(field.description.split()).replace("|", "\\|") in text
        for part in maker.PARTS:
            assert re.search(rf"\*\*{part}\.\*\* \S", text), f"{name}: {part}"


def test_links_lead_somewhere(maker):
    for path in maker.FOLDER.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
