"""A written page, read as a browser reads it."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Text, tags and scripts of a page, and whether every tag that was opened was closed."""

    VOID = {"meta", "link", "input", "img", "br", "hr"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


# A window is never narrower than 500 pixels in headless mode; a frame can be.
FRAME = '<!doctype html><body><iframe style="border: 0; width: {}px; height: 900px" srcdoc="{}"></iframe>'

LISTEN = """<head><script>window.seen = [];
addEventListener("error", (e) => seen.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => seen.push(e.violatedDirective + " " + e.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...words) => seen.push(words.join(" "));
</script>"""

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
FLAGS += ["--virtual-time-budget=3000"]


def printed(text: str, folder: Path) -> bytes:
    """The PDF that the page is printed to."""
    page, pdf = folder / "page.html", folder / "page.pdf"
    page.write_text(text, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return pdf.read_bytes()


def look(text: str, check: str, width: int, folder: Path) -> dict:
    """What the script `check` leaves in `data-seen` of the frame's body, with the page opened at a width in pixels."""
    watched = text.replace("<head>", LISTEN, 1).replace("</body>", check)
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width, html.escape(watched)), encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, "--dump-dom", "--window-size=1400,1000", profile, frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(next(a["data-seen"] for tag, a in Page(dom).tags if tag == "body"))
