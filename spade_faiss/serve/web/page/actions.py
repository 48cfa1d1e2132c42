"""What people do on the page: answer, undo, upload, sign in and out. Each ends with a redirect: a reload does nothing twice."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Request
from starlette.responses import RedirectResponse, Response

from spade_faiss.serve.history.records import Kind, ScoredPicture
from spade_faiss.serve.web.page.looking import local_path
from spade_faiss.serve.web.page.rendering import render, security_of, service_of
from spade_faiss.serve.web.page.words import bank_url, picture_url
from spade_faiss.serve.web.scoring import receive_and_score

router = APIRouter(include_in_schema=False)

_LONGEST_REASON = 300

Csrf = Annotated[str, Form()]


@router.post("/pictures/{name}/answer")
def answer(
    request: Request,
    name: str,
    kind: Annotated[str, Form()],
    note: Annotated[str, Form()] = "",
    csrf: Csrf = "",
    queue: Annotated[int, Form()] = 0,
) -> Response:
    """Answer a picture; in a queue, the next one follows."""
    security_of(request).check_csrf(request, csrf)
    service = service_of(request)
    picture = service.history.get(name)
    following = None
    if queue:
        following = service.history.next_in_queue(picture.bank, name) or service.history.next_in_queue(picture.bank)
    given = service.answer(name, _kind(kind), note.strip(), _who(request))
    if not queue:
        return _to(picture_url(name), answered=given.id)
    shown = following.id if following is not None and following.id != name else ""
    return _to(f"{bank_url(picture.bank)}/review", picture=shown, answered=given.id)


@router.post("/answers/{name}/undo")
def undo(request: Request, name: str, csrf: Csrf = "", queue: Annotated[int, Form()] = 1) -> Response:
    """Take an answer back, and show its picture again."""
    security_of(request).check_csrf(request, csrf)
    service = service_of(request)
    given = service.undo(name)
    if queue:
        return _to(f"{bank_url(given.bank)}/review", picture=given.picture_id, undone=given.id)
    return _to(picture_url(given.picture_id), undone=given.id)


@router.post("/banks/{bank}/upload")
async def upload(request: Request, bank: str, csrf: str = "") -> Response:
    """Score the files of a form. The token is in the address, so that it is checked before anything is read.

    One picture is shown then; of several it is said how many are alarms.
    """
    security_of(request).check_csrf(request, csrf)
    results = await receive_and_score(request, service_of(request), bank)
    scored = [found for _, found in results if isinstance(found, ScoredPicture)]
    refused = [str(found) for _, found in results if not isinstance(found, ScoredPicture)]
    if len(scored) == 1 and not refused:
        return _to(picture_url(scored[0].id))
    alarms = sum(bool(picture.alarm) for picture in scored)
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    said = f"{refused[0][:_LONGEST_REASON]}{more}" if refused else ""
    return _to(bank_url(bank), uploaded=str(len(scored)), alarms=str(alarms), refused=said)


@router.post("/login")
def log_in(
    request: Request, token: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "/", csrf: Csrf = ""
) -> Response:
    """Begin a session of who knows the token."""
    security = security_of(request)
    security.check_csrf(request, csrf)
    if not security.is_token(token.strip()):
        return render(request, "login", 401, title="Sign in", wrong="That is not the token. Try again.", next=local_path(next))
    response = RedirectResponse(local_path(next), 303)
    security.set_session(request, response)
    return response


@router.post("/logout")
def log_out(request: Request, csrf: Csrf = "") -> Response:
    """End the session."""
    security = security_of(request)
    security.check_csrf(request, csrf)
    response = RedirectResponse("/login", 303)
    security.end_session(response)
    return response


def _to(path: str, **query: str) -> Response:
    """Have the browser go on to a page."""
    asked = urlencode({name: value for name, value in query.items() if value})
    return RedirectResponse(f"{path}?{asked}" if asked else path, 303)


def _kind(text: str) -> Kind:
    # The service refuses what is neither.
    return text  # type: ignore[return-value]


def _who(request: Request) -> str:
    """Who answers, as far as that is known: everybody on the page shares one token."""
    return "page" if request.client is None else f"page at {request.client.host}"
