"""A bank that is served by an app in this process, on top of a history in a temporary folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from spade_faiss import Run
from spade_faiss.serve.history.database import sqlite_url
from spade_faiss.serve.history.files import Files
from spade_faiss.serve.history.history import History
from spade_faiss.serve.metrics import Metrics
from spade_faiss.serve.service import Service
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.station.upkeep import Upkeep
from spade_faiss.serve.web.app import create_app

PNG = {"content-type": "image/png"}


@dataclass(frozen=True, eq=False)
class Line:
    """A server in this process: what clients see of it, and what is behind."""

    client: TestClient
    station: Station
    history: History
    service: Service
    bank: Path

    def score(self, path: Path, **headers: str) -> Any:
        """Score a picture; its record."""
        named = {**PNG, **{name.replace("_", "-"): value for name, value in headers.items()}}
        reply = self.client.post("/v1/banks/weave/score", content=path.read_bytes(), headers=named)
        assert reply.status_code == 200, reply.text
        return reply.json()["pictures"][0]["picture"]


Serve = Callable[..., Line]


@pytest.fixture
def serve(fitted_bank: Path, tmp_path: Path) -> Iterator[Serve]:
    """Starts servers of a copy of the bank `weave`; settings are those of `ServeSettings`."""
    with ExitStack() as stack:

        def start(*, upkeep: bool = True, opened: bool = True, bank: Path | None = None, **settings: Any) -> Line:
            path = bank or tmp_path / "weave.bank"
            if not path.exists():
                shutil.copytree(fitted_bank, path)
            chosen = ServeSettings(data=str(tmp_path / "served"), **settings)
            history = History(chosen.database or sqlite_url(str(tmp_path / "history.sqlite")), Files(tmp_path / "served"))
            stack.callback(history.close)
            station = Station("weave", path, history, chosen, Run(), Metrics())
            stack.callback(station.close)
            app = create_app({"weave": station}, history, chosen)
            client = stack.enter_context(TestClient(app, base_url="http://127.0.0.1"))
            if opened:
                station.open()
                assert station.is_open, station.message
            if upkeep and opened:
                follower = Upkeep(station)
                follower.start()
                stack.callback(follower.close)
            return Line(client, station, history, app.state.service, path)

        yield start


@pytest.fixture
def line(serve: Serve) -> Line:
    """A server with the usual settings, which follows no answers."""
    return serve(upkeep=False)


@pytest.fixture
def defect(dataset_folder: Path) -> Path:
    """A picture with a defect."""
    return sorted((dataset_folder / "test").glob("[!g]*/*.png"))[0]


@pytest.fixture
def good(dataset_folder: Path) -> Path:
    """A normal picture that is not in the bank."""
    return sorted((dataset_folder / "test" / "good").glob("*.png"))[0]
