"""The site builds without a warning, and no page of it asks another server for anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pages.fill import DOCS, ROOT

# What a browser loads by itself; a link that a person clicks may lead anywhere.
LOADS = re.compile(r"<(?:script|link|img|iframe|source|video|object|embed)\b[^>]*?(?:src|href|data)=[\"']?(?:https?:)?//[^>]*>")
IN_STYLES = re.compile(r"(?:url\(|@import\s)\s*[\"']?(?:https?:)?//[^)\"';]*")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 25
    assert styles
    texts = {path: path.read_text(encoding="utf-8") for path in (*pages, *styles)}
    found = {str(path): LOADS.findall(text) + IN_STYLES.findall(text) for path, text in texts.items()}
    assert {path: hits for path, hits in found.items() if hits} == {}


def test_search_works_from_disk(site: Path) -> None:
    script = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("var __index = "))
    assert {"reference/command-line.html#fit", "explanation/spade.html"} <= {entry["location"] for entry in index["docs"]}
    shim = (site / "javascripts" / "iframe-worker.js").read_text(encoding="utf-8")
    assert "window.Worker=" in shim
    for page in DOCS.rglob("*.md"):
        assert "javascripts/iframe-worker.js" in (site / page.relative_to(DOCS).with_suffix(".html")).read_text(
            encoding="utf-8"
        )


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script src="https://unpkg.com/x"></script>', True),
        ("<link rel=stylesheet href=//fonts.example/x.css>", True),
        ('<img alt="a" src="http://example.com/x.png">', True),
        ('<a href="https://example.com">there</a>', False),
        ('<script src="../javascripts/x.js"></script>', False),
    ],
)
def test_what_counts_as_loading(text: str, loads: bool) -> None:
    assert bool(LOADS.search(text)) == loads
