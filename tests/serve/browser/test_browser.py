"""What people do on the page, in Debian's Chromium: a first start, a review by keyboard, the threshold, on phones; safely."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

from spade_faiss.serve.history.records import Filter
from tests.serve.browser.conftest import HOSTILE, Window, pages
from tests.support.serving import BANK, Server, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.slow]

AXE = (Path(__file__).parent / "axe.min.js").read_text(encoding="utf-8")
Open = Callable[..., Window]
Looked = tuple[Server, str]

_DROP = """([selector, name, bytes]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0))], name, { type: "image/png" }));
  const target = document.querySelector(selector);
  const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
  for (const kind of ["dragover", "drop"]) target.dispatchEvent(new DragEvent(kind, options));
}"""


def until(page: Page, condition: str) -> None:
    """Wait for a condition; Playwright's own way is what the policy forbids, to evaluate text as a script."""
    wait_for(lambda: page.evaluate(condition))


def forget_statuses(window: Window) -> None:
    """A page about a problem is a page that could not be loaded, to the browser."""
    window.trouble[:] = [trouble for trouble in window.trouble if "404" not in trouble and "422" not in trouble]


def ready(window: Window) -> None:
    """Wait until the map is drawn."""
    window.page.wait_for_selector("[data-ready]")


def test_from_a_first_start_to_three_answers_by_keyboard(fresh: Looked, open_window: Open, dataset_folder: Path) -> None:
    """Somebody starts, uploads pictures, answers three alarms without a mouse, and takes one back."""
    server, address = fresh
    window = open_window(address)
    page = window.go("/")
    assert "No pictures yet" in page.inner_text("main")
    page.click("text=Upload some")
    spots = sorted((dataset_folder / "test" / "spot").iterdir())[:4]
    page.set_input_files("#files", [*spots, dataset_folder / "test" / "good" / "000.png"])
    page.click("button:has-text('Score')")
    page.wait_for_selector("text=5 pictures were scored")
    names = {item.id: item.name for item in server.queue()}
    assert len(names) >= 4
    first, second, third = list(names)[:3]

    page.keyboard.press("r")
    page.wait_for_url("**/review")
    ready(window)
    page.keyboard.press("j")
    page.wait_for_url(f"**picture={second}")
    ready(window)
    page.keyboard.press("k")
    page.wait_for_url(f"**picture={first}")
    ready(window)

    page.keyboard.press("n")
    page.wait_for_url(f"**picture={second}&answered=*")
    ready(window)
    # Whoever hears the page is at its beginning, and is told.
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.wait_for_selector("#announce:has-text('Answered “normal”')", state="attached")
    page.wait_for_selector("#state:has-text('generation 2: this alarm is gone')")
    page.wait_for_selector("#announce:has-text('this alarm is gone')", state="attached")
    until(page, "document.querySelectorAll('.rail [data-item]').length === 3")

    page.keyboard.press("d")
    page.wait_for_url(re.compile("answered="))
    page.wait_for_selector("text=Answered “defect”")
    ready(window)
    page.keyboard.press("u")
    page.wait_for_url(f"**picture={second}&undone=*")
    page.wait_for_selector("text=Taken back")
    ready(window)
    page.keyboard.press("d")
    page.wait_for_selector("text=Answered “defect”")
    ready(window)
    page.focus("#note")
    page.keyboard.type("and no doubt")  # n, d and the others are letters here
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    until(page, "document.querySelector('.count').textContent.startsWith('1')")
    given = [item.answer for item in server.history.find(Filter(answered=True, order="p_value")).items]
    assert sorted((answer.kind, answer.note) for answer in given if answer) == [
        *(("defect", ""), ("defect", "and no doubt"), ("normal", "")),
    ]
    assert server.history.get(third).answer is not None

    page.keyboard.press("/")
    page.wait_for_url("**/search")
    page.keyboard.press("/")
    page.keyboard.type("000")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=2 pictures")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/pictures/*")


def test_files_are_dropped_and_refusals_are_said(fresh: Looked, open_window: Open, dataset_folder: Path) -> None:
    import base64

    server, address = fresh
    window = open_window(address)
    page = window.go(f"/banks/{BANK}")
    data = (dataset_folder / "test" / "spot" / "000.png").read_bytes()
    page.evaluate(_DROP, ["[data-drop]", HOSTILE, base64.b64encode(data).decode()])
    page.wait_for_url("**/pictures/*")
    assert HOSTILE in page.inner_text("h1")
    ready(window)
    window.go(f"/banks/{BANK}")
    page.evaluate(_DROP, ["[data-drop]", "x.png", base64.b64encode(b"no picture").decode()])
    page.wait_for_selector(".notice.bad:has-text('Refused')")
    assert page.evaluate("window.hacked") is None
    assert len(server.history.find(Filter()).items) == 1


def test_the_threshold_says_which_alpha_it_means(looked_at: Looked, open_window: Open) -> None:
    """The slider's words agree with the calibration, and what is outlined with the map."""
    server, address = looked_at
    picture = server.queue()[0]
    values = server.history.files.read_map(picture.id)
    maxima = server.station.maxima(None)
    assert values is not None
    assert maxima is not None
    window = open_window(address)
    page = window.go(f"/pictures/{picture.id}")
    ready(window)

    def shown() -> tuple[float, float, int]:
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        data = page.eval_on_selector("canvas", "(canvas) => [Number(canvas.dataset.alpha), Number(canvas.dataset.above)]")
        return float(page.input_value("#threshold")), data[0], data[1]

    seen = set()
    page.focus("#threshold")
    for key in ("", "Home", "PageUp", "ArrowRight", "PageUp", "PageUp", "ArrowLeft", "PageUp", "End"):
        if key:
            page.keyboard.press(key)
        level, alpha, above = shown()
        assert alpha == pytest.approx((1 + (maxima > level).sum()) / (len(maxima) + 1))
        assert above == int((values > level).sum())
        seen.add((alpha, above))
        assert "alpha" in (page.get_attribute("#threshold", "aria-valuetext") or "")
    assert len(seen) > 4
    assert "This picture has none" in page.inner_text("#meaning")
    page.click("#reset")
    assert shown()[0] == pytest.approx(picture.threshold)
    assert f"of {len(maxima)} calibration pictures" in page.inner_text("#meaning")

    pixels = (
        "(canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.reduce((a, b) => a + b, 0)"
    )
    full = page.eval_on_selector("canvas", pixels)
    page.focus("#opacity")
    page.keyboard.press("Home")
    shown()
    outline = page.eval_on_selector("canvas", pixels)
    page.keyboard.press("Tab")
    page.keyboard.press("m")  # a key of the page, as no text is being typed
    shown()
    assert full > outline > page.eval_on_selector("canvas", pixels) == 0


def test_axe_finds_nothing_serious_on_any_page(looked_at: Looked, open_window: Open) -> None:
    """All rules in the light; in the dark, where only colors differ, those of contrast."""
    server, address = looked_at
    window = open_window(address)
    findings = {}
    for name, path in pages(server).items():
        page = window.go(path)
        if name in ("review", "picture"):
            ready(window)
        page.evaluate(AXE)
        for theme, options in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
            report = page.evaluate("(options) => axe.run(document, options)", {"resultTypes": ["violations"], **options})
            for found in report["violations"]:
                if found["impact"] in ("serious", "critical"):
                    findings[f"{name}, {theme}: {found['id']}"] = [node["html"][:200] for node in found["nodes"]]
        if name == "review":
            page.keyboard.press("?")
            report = page.evaluate("() => axe.run('dialog')")
            assert report["violations"] == []
    forget_statuses(window)
    assert not findings, json.dumps(findings, indent=1)


@pytest.mark.parametrize("width", [320, 390])
def test_phones_scroll_in_one_direction(looked_at: Looked, open_window: Open, width: int) -> None:
    server, address = looked_at
    window = open_window(address, width, 780, has_touch=True, is_mobile=True)
    for name, path in pages(server).items():
        page = window.go(path)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, (name, wide)
    window.go(pages(server)["review"])
    # What answers is under the thumb at once, and large enough for it.
    for button in window.page.query_selector_all(".answer-bar button"):
        box = button.bounding_box()
        assert box is not None
        assert box["height"] >= 44
        assert box["y"] + box["height"] <= 780
    forget_statuses(window)


def test_hostile_names_run_nothing_and_nothing_leaves(looked_at: Looked, open_window: Open) -> None:
    """Names and notes are words wherever they stand: windows have seen no error, no dialog and no request elsewhere."""
    server, address = looked_at
    window = open_window(address)
    for path in pages(server).values():
        page = window.go(path)
        assert page.evaluate("window.hacked") is None
        assert page.query_selector("img[src='x']") is None
    forget_statuses(window)
    # The policy itself: a script that got in all the same would not run.
    page = window.go("/")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 2'}))")
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in trouble for trouble in window.trouble)
    window.trouble.clear()


def test_live_parts_leave_the_focus_and_can_be_paused(fresh: Looked, open_window: Open, dataset_folder: Path) -> None:
    server, address = fresh
    good = sorted((dataset_folder / "test" / "good").iterdir())
    (first,) = server.score(good[:1])
    window = open_window(address)
    page = window.go("/")
    page.focus(f"#recent-{first.id}")
    server.score(good[1:2])
    until(page, "document.querySelectorAll('.thumb').length === 2")
    assert page.evaluate("document.activeElement.id") == f"recent-{first.id}"
    page.click("#hold")
    assert page.get_attribute("#hold", "aria-pressed") == "true"
    server.score(good[2:3])
    page.wait_for_timeout(3500)
    assert len(page.query_selector_all(".thumb")) == 2
    page.click("#hold")
    until(page, "document.querySelectorAll('.thumb').length === 3")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark"
    page = window.go(f"/banks/{BANK}")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.get_attribute("#theme", "aria-pressed") == "true"


def test_keys_can_be_turned_off_and_trouble_is_said(fresh: Looked, open_window: Open, dataset_folder: Path) -> None:
    server, address = fresh
    server.score(sorted((dataset_folder / "test" / "spot").iterdir())[:2])
    window = open_window(address)
    page = window.go(f"/banks/{BANK}/review")
    ready(window)
    page.keyboard.press("?")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    page.wait_for_timeout(300)
    assert not server.history.find(Filter(answered=True)).items
    page.route("**/answer", lambda route: route.abort())
    page.click("button[value=defect]")
    page.wait_for_selector("#trouble:has-text('does not answer')")
    page.unroute("**/answer")
    page.eval_on_selector(
        "[name=csrf]", "(input) => { for (const other of document.querySelectorAll('[name=csrf]')) other.value = 'x'; }"
    )
    page.click("button[value=defect]")
    page.wait_for_selector("#trouble:has-text('not from a page of this session')")
    window.go(f"/banks/{BANK}/review")
    ready(window)
    page.click("button[value=defect]")
    page.wait_for_selector("text=Answered “defect”")
    wait_for(lambda: server.history.find(Filter(answered=True)).items)
    window.trouble[:] = [
        trouble for trouble in window.trouble if not trouble.startswith(("Failed to load", "htmx:", "Response Status Error"))
    ]
