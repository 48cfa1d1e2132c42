"""Pages as tests read them: their elements, links, forms and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

from fastapi.testclient import TestClient

_VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta"}


@dataclass(eq=False)
class Form:
    """A form: where it goes, the fields that it holds, and its buttons by their words."""

    action: str
    method: str
    fields: dict[str, str] = field(default_factory=dict)
    buttons: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(eq=False)
class PageText(HTMLParser):
    """What a page holds."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    text: str = ""
    title: str = ""
    _open: list[str] = field(default_factory=list)
    _button: dict[str, str | None] | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.elements.append((tag, given))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "form":
            self.forms.append(Form(given.get("action") or "", (given.get("method") or "get").lower()))
        if tag == "input" and self.forms and given.get("name"):
            self.forms[-1].fields[str(given["name"])] = given.get("value") or ""
        if tag == "button":
            self._button = given

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.elements.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another element"
        if tag == "button":
            self._button = None

    def handle_data(self, data: str) -> None:
        if "title" in self._open[-1:]:
            self.title += data
        self.text += data
        if self._button is not None and self.forms and data.strip() and self._open[-1] == "button":
            name, value = self._button.get("name") or "", self._button.get("value") or ""
            self.forms[-1].buttons[data.strip()] = (name, value)

    @property
    def words(self) -> str:
        """The text, with single spaces."""
        return " ".join(self.text.split())

    def links(self) -> list[str]:
        """All that the page leads to or loads."""
        found = [
            attributes.get(name) for _, attributes in self.elements for name in ("href", "src", "action", "hx-get", "hx-post")
        ]
        return [link for link in found if link is not None]

    def form(self, button: str) -> Form:
        """The form that has a button with these words."""
        return next(form for form in self.forms if button in form.buttons)


def read(text: str) -> PageText:
    """Read a page; fails where elements do not nest."""
    page = PageText()
    page.feed(text)
    page.close()
    assert not page._open, f"never closed: {page._open}"
    return page


def get(client: TestClient, url: str, status: int = 200) -> PageText:
    """Ask for a page."""
    response = client.get(url)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return read(response.text)


def press(client: TestClient, page: PageText, button: str, **fields: str) -> PageText:
    """Press a button as a browser without scripts does; gives the page that follows."""
    form = page.form(button)
    name, value = form.buttons[button]
    data = {**form.fields, **fields, **({name: value} if name else {})}
    assert form.method == "post"
    response = client.post(form.action, data=data)
    assert response.status_code == 200, response.text
    return read(response.text)


def is_local(link: str) -> bool:
    """Whether a link stays on this server."""
    parts = urlsplit(urljoin("http://here/", link))
    return (parts.scheme, parts.netloc) == ("http", "here")
