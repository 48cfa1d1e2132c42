"""The server's app: the API, the page, operations, and the security that all of it is behind."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI

from spade_faiss._version import __version__
from spade_faiss.serve.history.history import History
from spade_faiss.serve.service import Service
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.web import api, operations
from spade_faiss.serve.web.page.routes import add_page
from spade_faiss.serve.web.problems import add_problems
from spade_faiss.serve.web.security import Security, SecurityMiddleware

_DESCRIPTION = """Scores pictures against banks of normal ones, remembers each verdict, and learns from what people say of it.

Problems are answered as [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) has them. With 503 comes Retry-After."""


def create_app(stations: Mapping[str, Station], history: History, settings: ServeSettings) -> FastAPI:
    """Make the app.

    What its routes work with is `app.state.service` (a `Service`) and `app.state.security` (a `Security`).

    Args:
        stations: the banks that are served, by their names.
        history: what was scored and answered.
        settings: how they are served.
    """
    # Its own page of documentation would ask another server for its scripts.
    app = FastAPI(title="spade-faiss", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.service = Service(stations, history, settings)
    app.state.security = Security(settings, history.files.root)
    add_problems(app)
    app.include_router(api.router)
    app.include_router(operations.router)
    add_page(app)
    app.add_middleware(SecurityMiddleware, security=app.state.security)
    return app
