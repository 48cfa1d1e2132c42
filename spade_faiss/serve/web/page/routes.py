"""Adds the page to an app."""

from __future__ import annotations

from http import HTTPStatus
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

from spade_faiss.serve.web.page import actions, images, looking, searching
from spade_faiss.serve.web.page.rendering import render


def add_page(app: FastAPI) -> None:
    """Add the page to an app; `app.state.service` and `app.state.security` are what it works with."""
    for router in (looking.router, searching.router, images.router, actions.router):
        app.include_router(router)
    app.state.thumbnails = images.Thumbnails()
    app.mount("/static", StaticFiles(directory=str(files(__package__) / "static")), name="static")
    app.state.problem_page = problem_page


def problem_page(request: Request, status: int, detail: str) -> Response:
    """A problem as a page, for people."""
    return render(request, "problem", status, title=HTTPStatus(status).phrase, detail=detail, status=status)
