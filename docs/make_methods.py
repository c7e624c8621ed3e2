"""Writes docs/methods/: one page per method, from its docstring, its settings and its example.

python docs/make_methods.py            write the pages
python docs/make_methods.py --check    exit with 1 when a page is not as it would be written
"""

from __future__ import annotations

import argparse
import re
import sys
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from pydantic_core import PydanticUndefined

from retain import methods

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"
MADE = "<!-- Made by docs/make_methods.py from the code. Change the code, then run it again. -->\n\n"
#: Parts of a docstring, in order.
PARTS = ("Deviations from the paper", "Needs", "Cost", "Combine with", "Conflicts", "Tune")


def pages() -> dict[str, str]:
    """File name → text of every page."""
    made = {f"{name}.md": page(name) for name in own_names()}
    return {"README.md": index()} | made


def own_names() -> list[str]:
    """Methods that live in this repository, without those of installed packages."""
    return [name for name in methods.names() if name in methods.summaries()]


def page(name: str) -> str:
    """One method's page."""
    method, about = methods.load(name), methods.summaries()[name]
    doc = split(about["doc"])
    class_name = about["class"]
    lines = [f"# {doc['name']}\n", f"{doc['sentence'][0].upper()}{doc['sentence'][1:]}\n"]
    lines.append(f"```text\n{doc['formula']}\n```\n")
    lines.append(f"{doc['body']}\n" if doc["body"] else "")
    facts = [f"- **{part}.** {doc[part]}" for part in PARTS]
    lines.append(
        "\n".join([f"- **Family.** {about['family']}", f"- **Source.** {source(about['paper'])}", *facts]) + "\n"
    )
    lines.append("## Settings\n")
    rows = [row for key, field in method.Config.model_fields.items() for row in settings(key, field)]
    lines.append("\n".join(["| Setting | Kind | Default | What it does |", "| --- | --- | --- | --- |", *rows]) + "\n")
    off = ", ".join(f"{key}: {show(value)}" for key, value in method.off.items())
    lines.append("" if name == "none" else f"Off, bit for bit: `{name}: {{{off}}}`.\n")
    lines.append("## Use\n")
    lines.append(f"In Python: `from retain import {class_name}`. In a run ([file](../../examples/{name}.yaml)):\n")
    example = (ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8")
    lines.append(f"```yaml\n{example}```\n")
    return MADE + "\n".join(line for line in lines if line)


def index() -> str:
    """The list of methods by family."""
    about = {name: methods.summaries()[name] for name in own_names()}
    lines = ["# Methods\n", "Names are those of the configuration; any that do not conflict can be combined.\n"]
    for family in dict.fromkeys([*methods.FAMILIES, *sorted(a["family"] for a in about.values())]):
        mine = [name for name in about if about[name]["family"] == family]
        if mine:
            lines.append(f"## {methods.FAMILIES.get(family, family)}\n")
            entries = [f"- [{name}]({name}.md): {split(about[name]['doc'])['sentence']}" for name in mine]
            lines.append("\n".join(entries) + "\n")
    return MADE + "\n".join(lines)


def split(doc: str) -> dict[str, str]:
    """A method's docstring in its parts: name, sentence, formula, body, and `PARTS`."""
    title, formula, rest = re.split(r"\n\n", doc, maxsplit=2) if doc.count("\n\n") > 1 else (*doc.split("\n\n"), "")
    name, _, sentence = " ".join(title.split()).partition(" — ")
    found = {"name": name, "sentence": sentence, "formula": "\n".join(line[4:] for line in formula.split("\n"))}
    marks = re.split(rf"({'|'.join(PARTS)}):", rest)
    found["body"] = marks[0].strip()
    found |= {part: " ".join(text.split()) for part, text in zip(marks[1::2], marks[2::2])}
    return found


def source(paper: str) -> str:
    """A paper as a link."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def settings(key: str, field: Any) -> list[str]:
    """The row of a setting, and those of the settings inside it."""
    inside = next(
        (t for t in (field.annotation, *typing.get_args(field.annotation)) if hasattr(t, "model_fields")), None
    )
    fields = inside.model_fields.items() if inside is not None else ()
    return [setting(key, field), *(setting(f"{key}.{name}", part) for name, part in fields)]


def setting(key: str, field: Any) -> str:
    """One row of the settings table."""
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    kind = ", ".join([kind_of(field.annotation), *limits])
    default = "required" if field.default is PydanticUndefined else f"`{show(field.default)}`"
    cells = (f"`{key}`", kind, default, " ".join((field.description or "").split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_WORDS = {float: "number", int: "whole number", str: "text", bool: "true or false", NoneType: "nothing"}


def kind_of(annotation: Any) -> str:
    """A type in words."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(inside[0])
    if origin is typing.Literal:
        return ", ".join(f"`{show(choice)}`" for choice in inside)
    if origin in (typing.Union, UnionType):
        return " or ".join(kind_of(part) for part in inside)
    if origin is list:
        return f"list of {kind_of(inside[0])}"
    if origin is dict:
        return f"{kind_of(inside[0])} → {kind_of(inside[1])}"
    if hasattr(annotation, "model_fields"):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _WORDS.get(annotation, str(annotation))


def show(value: Any) -> str:
    """A value as YAML writes it."""
    if hasattr(value, "model_fields_set"):
        return "{" + ", ".join(f"{name}: {show(part)}" for name, part in value) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    check = parser.parse_args().check
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    stale = [n for n, text in wanted.items() if not (FOLDER / n).is_file() or (FOLDER / n).read_text("utf-8") != text]
    gone = [path for path in FOLDER.glob("*.md") if path.name not in wanted]
    if not check:
        for name in stale:
            (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        for path in gone:
            path.unlink()
    for name in [*stale, *(path.name for path in gone)]:
        print(f"docs/methods/{name}: {'stale' if check else 'written'}")
    return int(check and bool(stale or gone))


if __name__ == "__main__":
    sys.exit(main())
