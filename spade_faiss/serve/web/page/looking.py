"""The pages that show something and change nothing."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from spade_faiss.report import inferno
from spade_faiss.serve.errors import UnknownError
from spade_faiss.serve.history.records import Answer, Filter, Page, ScoredPicture
from spade_faiss.serve.service import Service
from spade_faiss.serve.web.page.evidence import picture_view
from spade_faiss.serve.web.page.figures import BankPlace, LiveView, live_view, rate_rows, stamp_of
from spade_faiss.serve.web.page.rendering import render, security_of, service_of
from spade_faiss.serve.web.page.words import counted, effect

router = APIRouter(include_in_schema=False)

_RECENT, _RECENT_WIDE = 12, 24
_QUEUE = 30  # of the alarms that wait, how many the queue shows
_CHANGES = 8
_UNCHANGED = 204  # htmx leaves a part of the page as it is then, and nothing that has the focus is replaced


@router.get("/")
def home(request: Request) -> Response:
    """All banks, live."""
    service = service_of(request)
    recent = _RECENT if len(service.stations) > 1 else _RECENT_WIDE
    views = [_live(service, name, recent) for name in sorted(service.stations)]
    title = "All banks" if len(views) != 1 else "Overview"
    return render(request, "home", title=title, here="home", views=views)


@router.get("/banks/{bank}")
def bank(request: Request, bank: str, uploaded: int = 0, alarms: int = 0, refused: str = "") -> Response:
    """A bank, live."""
    service = service_of(request)
    view = _live(service, bank, _RECENT_WIDE)
    return render(
        request,
        "bank",
        title=bank,
        bank=bank,
        view=view,
        notice=_uploaded(uploaded, alarms, refused),
        rates=rate_rows(service.achieved(bank)),
        changes=service.history.changes(bank, _CHANGES),
    )


@router.get("/banks/{bank}/live")
def live(request: Request, bank: str, seen: str = "", wide: bool = False, recent: int = _RECENT) -> Response:
    """The part of the page of all banks that is about one, or the live part of its own page; nothing where it is as seen."""
    view = _live(service_of(request), bank, min(max(recent, 1), _RECENT_WIDE))
    if view.stamp == seen:
        return Response(status_code=_UNCHANGED)
    return render(request, "bank_live" if wide else "live", view=view, bank=bank)


@router.get("/banks/{bank}/review")
def review(request: Request, bank: str, picture: str = "", answered: str = "", undone: str = "") -> Response:
    """The alarms that wait for an answer, the least usual first, and one of them in full."""
    service = service_of(request)
    service.station(bank)
    shown = _picture_or_none(service, picture) or service.history.next_in_queue(bank)
    if shown is not None and shown.bank != bank:
        raise UnknownError(f"picture {shown.id} is of bank {shown.bank!r}, not of {bank!r}")
    queue = _queue(service, bank)
    ids = [item.id for item in queue.items]
    at = ids.index(shown.id) if shown is not None and shown.id in ids else None
    following = service.history.next_in_queue(bank, shown.id) if shown is not None else None
    return render(
        request,
        "picture",
        title=f"Review: {shown.name}" if shown else "Review",
        bank=bank,
        waiting=queue.total,
        queue=queue,
        previous=ids[at - 1] if at else None,
        next=following.id if following else None,
        **_said(service, answered, undone),
        **_shown(service, shown),
    )


@router.get("/banks/{bank}/rail")
def rail(request: Request, bank: str, picture: str, seen: str = "") -> Response:
    """The queue beside the picture that is looked at; nothing where it is as seen."""
    service = service_of(request)
    queue = _queue(service, bank)
    if queue.stamp == seen:
        return Response(status_code=_UNCHANGED)
    return render(request, "rail", bank=bank, picture=service.history.get(picture), queue=queue)


@router.get("/pictures/{name}")
def picture(request: Request, name: str, answered: str = "", undone: str = "") -> Response:
    """A picture with its map, and what it was compared with."""
    service = service_of(request)
    shown = service.history.get(name)
    said = _said(service, answered or (shown.answer.id if shown.answer else ""), undone)
    if not answered and said["notice"] is not None and not undone:
        said["notice"] = None  # the panel says it
    return render(
        request,
        "picture",
        title=shown.name,
        bank=shown.bank,
        waiting=waiting_of(service, shown.bank),
        queue=None,
        **said,
        **_shown(service, shown),
    )


@router.get("/answers/{name}/state")
def state(request: Request, name: str) -> Response:
    """What has become of an answer."""
    service = service_of(request)
    return render(request, "state", state=_state(service, service.history.get_answer(name), told=True))


@router.get("/login")
def login(request: Request, next: str = "/") -> Response:
    """Where the token is asked for."""
    security = security_of(request)
    if not security.needs_token or security.entry(request.headers) is not None:
        return RedirectResponse(local_path(next), 303)
    return render(request, "login", title="Sign in", wrong="", next=local_path(next))


def local_path(text: str) -> str:
    """A path of this server, or its first page: nobody is led to another site."""
    is_local = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable() and "\\" not in text
    return text if is_local else "/"


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What was done, on top of the page; `undo` is where it is undone."""

    text: str
    undo: str = ""
    bad: bool = False


@dataclass(frozen=True, kw_only=True)
class State:
    """What has become of an answer; `told` says whether it is to be spoken when it arrives."""

    id: str
    text: str
    pending: bool
    bad: bool
    told: bool


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The alarms that wait for an answer: the first of them, how many there are, and a stamp of what is shown."""

    items: list[ScoredPicture]
    total: int
    stamp: str

    @property
    def more(self) -> int:
        """How many are not shown."""
        return self.total - len(self.items)


def _live(service: Service, bank: str, recent: int) -> LiveView:
    station = service.station(bank)
    overview = service.overview(bank)
    newest = service.history.find(Filter(bank=bank, size=recent))
    return live_view(overview, BankPlace.of(station), newest)


def _queue(service: Service, bank: str) -> Queue:
    found: Page[ScoredPicture] = service.history.find(_waiting_filter(bank, _QUEUE))
    return Queue(items=list(found.items), total=found.total, stamp=stamp_of(found.items, found.total))


def waiting_of(service: Service, bank: str) -> int:
    """How many alarms of a bank wait for an answer."""
    return service.history.find(_waiting_filter(bank, 1)).total


def _waiting_filter(bank: str, size: int) -> Filter:
    return Filter(bank=bank, waiting=True, order="p_value", size=size)


def _picture_or_none(service: Service, name: str) -> ScoredPicture | None:
    """The picture that a link of a queue names; None for one that was removed since: the queue goes on."""
    try:
        return service.history.get(name) if name else None
    except UnknownError:
        return None


def _shown(service: Service, picture: ScoredPicture | None) -> dict[str, Any]:
    if picture is None:
        return {"picture": None}
    station = service.station(picture.bank)
    bank = station.detector.bank
    sizes = {}
    if (places := bank.tile_places) is not None:
        for normal in picture.nearest:
            if (number := bank.pictures.number(normal.id)) is not None:
                _, _, width, height = places[bank.pictures.rows(number)[0]].tolist()
                sizes[normal.id] = (height, width)
    colors = base64.b64encode(inferno.colors().tobytes()).decode("ascii")
    return {"picture": picture, "view": picture_view(picture, station.maxima(picture.product), sizes), "colors": colors}


def _said(service: Service, answered: str, undone: str) -> dict[str, Any]:
    """What is said of the answer that was given, or taken back, last."""
    try:
        given = service.history.get_answer(answered or undone) if answered or undone else None
        name = "" if given is None else service.history.get(given.picture_id).name
    except UnknownError:
        given = None
    if given is None:
        return {"notice": None, "state": None}
    if given.undone:
        text = f"Taken back: “{given.kind}” of {name}."
        return {"notice": Notice(text=text), "state": _state(service, given) if given.kind == "normal" else None}
    text = f"Answered “{given.kind}”: {name}."
    if given.kind == "defect":
        return {"notice": Notice(text=f"{text} It is kept as a label.", undo=_undo_url(given)), "state": None}
    return {"notice": Notice(text=text, undo=_undo_url(given)), "state": _state(service, given)}


def _undo_url(given: Answer) -> str:
    return f"/answers/{given.id}/undo"


def _state(service: Service, given: Answer, told: bool = False) -> State:
    pending, bad = given.state == "pending", given.state == "failed"
    place = {"in the bank": "in the bank", "undone": "not in the bank any more"}.get(given.state, given.state)
    change = None if pending or bad else service.change_of(given.id)
    if pending:
        text = "The bank gives it up …" if given.undone else "The bank takes it in, and looks again at older alarms …"
    elif bad:
        text = f"The bank could not follow: {given.message or 'no reason was given'}"
    elif change is None:
        text = f"It is {place}."
    elif change.error:
        text, bad = f"It is {place}, but what followed failed: {change.error}", True
    elif given.undone:
        text = f"It is {place}, generation {change.generation_after}."
    else:
        text = f"It is {place}, generation {change.generation_after}: {effect(change, given.picture_id)}"
    if given.message and given.state != "failed":
        text += f" {given.message}"
    return State(id=given.id, text=text, pending=pending, bad=bad, told=told and not pending)


def _uploaded(uploaded: int, alarms: int, refused: str) -> Notice | None:
    if not uploaded and not refused:
        return None
    parts = []
    if uploaded:
        found = counted(alarms, "alarm", "alarms") if alarms else "no alarm"
        parts.append(f"{counted(uploaded, 'picture was', 'pictures were')} scored: {found}.")
    if refused:
        parts.append(f"Refused: {refused[:500]}")
    return Notice(text=" ".join(parts), bad=bool(refused))
