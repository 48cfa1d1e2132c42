"""Problems as RFC 9457 has them: whatever goes wrong is answered by one JSON object that says what, and what to do."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from spade_faiss.core.errors import AccessError, BankError, InputError, NotFoundError, SpadeError
from spade_faiss.core.files import is_full
from spade_faiss.serve.errors import ConflictError, RefusedError, TooLargeError, UnavailableError, UnknownError

MEDIA_TYPE = "application/problem+json"
_log = logging.getLogger(__name__)

# The first that an error is an instance of counts.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UnavailableError, 503),
    (UnknownError, 404),
    (TooLargeError, 413),
    (ConflictError, 409),
    (NotFoundError, 503),  # of a bank that is served: somebody moved it
    (AccessError, 503),
    (BankError, 503),
    (InputError, 422),
)
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}
_EXAMPLES = {
    400: "the request ended before its body was complete",
    401: "a token is needed: send Authorization: Bearer TOKEN, or log in at /login",
    403: "another site had this browser send the request",
    404: "there is no bank 'parts'; there are: bottles, screws",
    408: "the request took longer than 60 s to arrive",
    409: "another picture was sent with this key",
    413: "the request is larger than the 64000000 bytes allowed",
    415: "send a picture as it is, or several as multipart/form-data",
    422: "the picture is damaged, or of a kind that cannot be decoded",
    503: "64 pictures are waiting, as many as may; send it again later",
}


def problem_numbers(error: Exception) -> dict[str, Any]:
    """An error that is raised on purpose as a problem, where it is a part of an answer."""
    status = status_of(error)
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": str(error)}


def problem(status: int, detail: str, instance: str = "", **more: Any) -> Response:
    """A problem as a response.

    Args:
        status: the HTTP status.
        detail: what went wrong.
        instance: the path that was asked for.
        more: further members of the object.
    """
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    if instance:
        content["instance"] = instance
    return JSONResponse(content, status, media_type=MEDIA_TYPE)


def status_of(error: Exception) -> int:
    """The HTTP status of an error that is raised on purpose."""
    if isinstance(error, RefusedError):
        return error.status
    if is_full(error) or (isinstance(error, InputError) and is_full(error.__cause__)):
        return 503
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def problem_of(error: Exception, instance: str = "") -> Response:
    """The response to an error that is raised on purpose."""
    status = status_of(error)
    response = problem(status, str(error), instance)
    if status == 503:
        response.headers["retry-after"] = str(getattr(error, "retry_after_s", 2))
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of its problems, for the OpenAPI document."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {
                MEDIA_TYPE: {
                    "schema": _PROBLEM,
                    "example": {
                        "type": "about:blank",
                        "title": HTTPStatus(status).phrase,
                        "status": status,
                        "detail": _EXAMPLES[status],
                    },
                }
            },
        }
        for status in statuses
    }


def add_problems(app: FastAPI) -> None:
    """Have an app answer every error with a problem."""

    async def on_ours(request: Request, error: Exception) -> Response:
        if status_of(error) == 503:
            _log.debug("%s %s: %s", request.method, request.url.path, error)
        return _as_page(request, problem_of(error, request.url.path), str(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = str(error.detail) or HTTPStatus(error.status_code).phrase
        if error.status_code == 404 and detail == HTTPStatus.NOT_FOUND.phrase:
            detail = f"there is nothing at {request.url.path[:200]}; /openapi.json says what there is"
        response = problem(error.status_code, detail, request.url.path)
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return _as_page(request, response, detail)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = [
            {"where": ".".join(map(str, item["loc"])), "what": item["msg"], "got": repr(item.get("input"))[:100]}
            for item in error.errors()
        ]
        first = f"{errors[0]['where']}: {errors[0]['what']}" if errors else "the request cannot be understood"
        return _as_page(request, problem(422, first, request.url.path, errors=errors), first)

    async def on_bug(request: Request, error: Exception) -> Response:
        _log.error("a bug at %s %s", request.method, request.url.path, exc_info=error)
        detail = "this is a bug of spade-faiss, please report it with what the server logged"
        return _as_page(request, problem(500, detail, request.url.path), detail)

    app.state.problem_page = None
    app.add_exception_handler(SpadeError, on_ours)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_bug)


def _as_page(request: Request, response: Response, detail: str) -> Response:
    """The same problem as a page, where a person looks at it: `app.state.problem_page(request, status, detail)` makes it."""
    make = request.app.state.problem_page
    if make is None or request.url.path.startswith("/v1/") or "text/html" not in request.headers.get("accept", ""):
        return response
    page: Response = make(request, response.status_code, detail)
    for name in ("retry-after", "allow"):
        if name in response.headers:
            page.headers[name] = response.headers[name]
    return page
