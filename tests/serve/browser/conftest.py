"""Debian's Chromium, and a server that it looks at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spade_faiss.serve.history.records import Filter
from tests.support.serving import BANK, Server, listening, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

HOSTILE = "<img src=x onerror=window.hacked=1>.png"
# Of Chromium on a machine without a screen, that may run as root and with little shared memory.
_ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; the test is skipped where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no Chromium; install it with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no Playwright; it comes with '.[dev]'")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


@dataclass(eq=False)
class Window:
    """A window of the browser, and what went wrong in it.

    Args:
        page: Playwright's.
        address: where the server listens.
        trouble: errors of scripts, refusals by the policy, requests to other places, dialogs.
    """

    page: Page
    address: str
    trouble: list[str] = field(default_factory=list)

    def refuse(self, dialog: Dialog) -> None:
        """Note a dialog, and close it."""
        self.trouble.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def go(self, path: str) -> Page:
        """Open a page of the server."""
        self.page.goto(self.address + path)
        return self.page


@pytest.fixture
def open_window(chromium: Browser) -> Iterator[Callable[..., Window]]:
    """Opens windows of a size, light or dark; none may have had trouble in the end."""
    windows: list[Window] = []

    def opened(address: str, width: int = 1280, height: int = 800, **options: Any) -> Window:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        window = Window(context.new_page(), address)
        page = window.page
        page.set_default_timeout(60_000)  # a busy machine is slow, and no test waits where all is well
        page.on("pageerror", lambda error: window.trouble.append(f"script: {error}"))
        page.on("console", lambda said: window.trouble.append(said.text) if said.type == "error" else None)
        page.on("request", lambda sent: None if sent.url.startswith(address) else window.trouble.append(f"asked {sent.url}"))
        page.on("dialog", lambda dialog: window.refuse(dialog))
        windows.append(window)
        return window

    yield opened
    for window in windows:
        window.page.context.close()
    assert [trouble for window in windows for trouble in window.trouble] == []


@pytest.fixture(scope="package")
def looked_at(
    fitted_bank: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, str]]:
    """A server with some pictures, one under a hostile name, and its address. Do not change it."""
    with serving(fitted_bank, tmp_path_factory.mktemp("looked-at")) as server:
        spots = sorted((dataset_folder / "test" / "spot").iterdir())
        found = server.score(spots, [HOSTILE, *(path.name for path in spots[1:])])
        server.score(sorted((dataset_folder / "test" / "good").iterdir()))
        server.service.answer(found[-1].id, "defect", "<b>a note</b>")
        with listening(server.app) as address:
            yield server, address


@pytest.fixture
def fresh(fitted_bank: Path, tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """A server that has seen no picture, and its address."""
    with serving(fitted_bank, tmp_path) as server, listening(server.app) as address:
        yield server, address


def pages(server: Server) -> dict[str, str]:
    """All pages by what they are."""
    alarm = server.queue()[0].id
    hostile = next(item.id for item in server.history.find(Filter(bank=BANK)).items if item.name == HOSTILE)
    bank = f"/banks/{BANK}"
    return {
        "home": "/",
        "bank": bank,
        "review": f"{bank}/review?picture={alarm}",
        "picture": f"/pictures/{hostile}",
        "search": f"{bank}/search",
        "nothing": f"{bank}/search?text=nothing",
        "problem": "/pictures/0",
    }
