"""Templates with what every page needs: the names of the banks, the token of forms, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from spade_faiss._version import __version__
from spade_faiss.core.text import printable
from spade_faiss.serve.service import LONGEST_NOTE, Service
from spade_faiss.serve.web.page import words
from spade_faiss.serve.web.page.evidence import region_box
from spade_faiss.serve.web.security import Security

THEMES = ("light", "dark")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What every page needs.

    Args:
        banks: the names of the banks; none for who is not signed in.
        csrf: what forms send with them.
        signed_in: whether there is a session to end.
        theme: `light` or `dark` if somebody chose one; empty otherwise.
        version: of the package; styles and scripts of another one are loaded again.
    """

    banks: Sequence[str]
    csrf: str
    signed_in: bool
    theme: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be sent, in words."""

    files: int
    bytes: str
    note: int


def service_of(request: Request) -> Service:
    """The banks and their history."""
    found: Service = request.app.state.service
    return found


def security_of(request: Request) -> Security:
    """Who may come in."""
    found: Security = request.app.state.security
    return found


def limits_of(request: Request) -> Limits:
    """What may be sent."""
    settings = service_of(request).settings
    return Limits(files=settings.max_files, bytes=words.size_text(settings.upload_bytes), note=LONGEST_NOTE)


def render(request: Request, template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
    """A page or a part of one, from `template`.html.j2; every value is escaped."""
    security = security_of(request)
    entry = security.entry(request.headers)
    theme = request.cookies.get("theme", "")
    frame = Frame(
        banks=() if entry is None else sorted(service_of(request).stations),
        csrf=security.csrf_token(request),
        signed_in=entry == "session",
        theme=theme if theme in THEMES else "",
        version=__version__,
    )
    defaults = {"bank": "", "here": "", "limits": limits_of(request)}
    text = _environment().get_template(f"{template}.html.j2").render({**defaults, **values, "frame": frame})
    return HTMLResponse(text, status_code)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("spade_faiss.serve.web.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        shown=printable, p=words.p_text, percent=words.percent, number=words.number, when=words.when, url=_quoted
    )
    environment.globals.update(
        bank_url=words.bank_url, picture_url=words.picture_url, effect=words.effect, region_box=region_box
    )
    return environment


def _quoted(text: str) -> str:
    return quote(text, safe="")
