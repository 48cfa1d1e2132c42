"""A server in this process: one bank, its history, the thread that follows answers, and an address for a browser."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from spade_faiss.core.settings import Run
from spade_faiss.serve.history.files import Files, suffix_of
from spade_faiss.serve.history.history import History
from spade_faiss.serve.history.records import Filter, ScoredPicture, new_id, utc_now
from spade_faiss.serve.metrics import Metrics
from spade_faiss.serve.service import Service
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.station.upkeep import Upkeep
from spade_faiss.serve.station.verdicts import Upload
from spade_faiss.serve.web.app import create_app

BANK = "weave"
_PATIENCE_S = 60.0


@dataclass(frozen=True, eq=False)
class Server:
    """A bank that is served, called `weave`.

    Args:
        app: the app.
        station: the bank.
        history: what was scored.
    """

    app: FastAPI
    station: Station
    history: History

    @property
    def service(self) -> Service:
        """What the app works with."""
        found: Service = self.app.state.service
        return found

    def client(self) -> TestClient:
        """A client that asks for pages, without a browser."""
        return TestClient(self.app, "http://127.0.0.1", headers={"accept": "text/html"})

    def score(self, paths: Sequence[Path], names: Sequence[str] = ()) -> list[ScoredPicture]:
        """Score files as if they had been uploaded, under their own names unless others are given."""
        uploads = []
        for path, name in zip(paths, names or [path.name for path in paths], strict=True):
            data, ident = path.read_bytes(), new_id()
            file = self.history.files.incoming(ident, suffix_of(data))
            file.write_bytes(data)
            uploads.append(
                Upload(
                    id=ident,
                    path=file,
                    suffix=suffix_of(data),
                    bytes=len(data),
                    name=name,
                    source="upload",
                    key=None,
                    received=utc_now(),
                )
            )
        return [job.future.result(_PATIENCE_S) for job in self.station.submit(uploads)]

    def queue(self) -> Sequence[ScoredPicture]:
        """The alarms that wait for an answer, the least usual first."""
        return self.history.find(Filter(bank=BANK, waiting=True, order="p_value")).items

    def settled(self, answer_id: str) -> str:
        """What has become of an answer, once that is known."""
        wait_for(lambda: self.history.get_answer(answer_id).state != "pending")
        return self.history.get_answer(answer_id).state


@contextmanager
def serving(bank: Path, folder: Path, token: str | None = None) -> Iterator[Server]:
    """Serve a copy of a bank; `folder` takes the copy, and all that the server writes."""
    own = folder / "weave.bank"
    shutil.copytree(bank, own)
    token_file = None
    if token is not None:
        token_file = folder / "token"
        token_file.write_text(token)
    settings = ServeSettings(data=folder / "served", token_file=token_file, max_queue=256)
    files = Files(Path(settings.data))
    history = History(f"sqlite:///{folder / 'history.db'}", files)
    station = Station(BANK, own, history, settings, Run(), Metrics())
    upkeep = Upkeep(station)
    upkeep.start()
    try:
        wait_for(lambda: station.state != "opening")
        assert station.state == "ready", station.message
        yield Server(create_app({BANK: station}, history, settings), station, history)
    finally:
        upkeep.close()
        station.close()
        history.close()


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Have an app listen to this machine; gives its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_for(done: Callable[[], object]) -> None:
    """Wait until a function returns something true; fail after a minute."""
    end = time.monotonic() + _PATIENCE_S
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
