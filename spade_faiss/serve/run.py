"""Runs the server: opens banks and history, answers requests until it is told to end, and answers what it has taken then."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from spade_faiss.bank.places import MANIFEST
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.settings import Run
from spade_faiss.core.sole_writer import SoleWriter
from spade_faiss.serve.errors import UnavailableError
from spade_faiss.serve.history.database import sqlite_url
from spade_faiss.serve.history.files import Files
from spade_faiss.serve.history.history import History
from spade_faiss.serve.metrics import Metrics
from spade_faiss.serve.settings import ServeSettings
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.station.upkeep import Upkeep
from spade_faiss.serve.web.app import create_app
from spade_faiss.storage.url import check_no_url

DATABASE = "history.sqlite"
_LOCK = "server.lock"
_SUFFIX = ".bank"
_LONGEST_NAME = 100
# How often what is too old is removed.
_PURGE_S = 60.0
_BACKLOG = 1024
# How long open connections may take when the server ends; what was taken is answered whatever it takes.
_GRACE_S = 30

_log = logging.getLogger(__name__)


def serve(
    banks: Sequence[str | Path], settings: ServeSettings, run: Run, *, started: Callable[[str], None] = lambda url: None
) -> None:
    """Serve banks until SIGTERM or SIGINT.

    Args:
        banks: their folders; each is called as its folder, without `.bank`.
        settings: how they are served.
        run: how work is done on this machine; each bank has its memory budget.
        started: called with the server's URL once it listens.

    Raises:
        InputError: for settings that cannot be, two banks of one name, an address that is in use, or a folder of data that
            another server uses.
        NotFoundError: if there is no bank at a path.
    """
    named = name_banks(banks)
    settings.token()  # a token that cannot be used is said before anything is done
    with _listen(settings) as listening, _files(settings) as files, _history(settings, files) as history:
        metrics = Metrics()
        stations = {name: Station(name, path, history, settings, run, metrics) for name, path in named.items()}
        upkeeps = [Upkeep(station) for station in stations.values()]
        app = create_app(stations, history, settings)
        host, port = listening.getsockname()[:2]
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_GRACE_S,
            h11_max_incomplete_event_size=1 << 16,
        )
        ending = threading.Event()
        # As all threads here, it keeps no process alive that was told to end twice: what is on disk is safe at any moment.
        purge = threading.Thread(target=_purge, args=(history, settings, ending), name="purge", daemon=True)
        for upkeep in upkeeps:
            upkeep.start()
        purge.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            started(f"http://{shown}:{port}")
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(_Server(config).serve(sockets=[listening]))
        finally:
            ending.set()
            for upkeep in upkeeps:
                upkeep.close()
            for station in stations.values():
                station.close()
            purge.join()


def name_banks(banks: Sequence[str | Path]) -> dict[str, Path]:
    """The names of banks, as which they are served.

    Raises:
        InputError: if there is none, or if two have one name.
        NotFoundError: if there is no bank at a path.
    """
    named: dict[str, Path] = {}
    for bank in banks:
        check_no_url("bank", bank)
        path = Path(bank).resolve()
        if not (path / MANIFEST).is_file():
            raise NotFoundError(f"there is no bank at {bank}; make one with: spade-faiss fit IMAGES --bank {bank}")
        name = path.name.removesuffix(_SUFFIX) or path.name
        if len(name) > _LONGEST_NAME or not name.isprintable() or any(letter in name for letter in "/?#%\\"):
            raise InputError(f"{name!r} cannot be the name of a bank in a URL; rename the folder {path}")
        if name in named:
            raise InputError(f"two banks are called {name!r}: {named[name]} and {path}; rename the folder of one")
        named[name] = path
    if not named:
        raise InputError("no bank is given; name the folder of one")
    return named


def _listen(settings: ServeSettings) -> socket.socket:
    """A socket at the address; taken before anything else is done, so that one that is in use is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise InputError(
            f"cannot listen at {settings.host}:{settings.port}: {error.strerror or error}; choose another --port or --host"
        ) from error
    return listening


@contextmanager
def _files(settings: ServeSettings) -> Iterator[Files]:
    """The files below the folder of data, which no other server uses meanwhile."""
    root = Path(settings.data).absolute()
    root.mkdir(parents=True, exist_ok=True)
    lock = SoleWriter(root / _LOCK, f"the served data {root}")
    try:
        yield Files(root)
    finally:
        lock.end()


@contextmanager
def _history(settings: ServeSettings, files: Files) -> Iterator[History]:
    """The history, without what a kill left of pictures that have no record."""
    history = History(settings.database or sqlite_url(str(files.root / DATABASE)), files)
    try:
        if removed := history.reconcile():
            _log.warning("%d files of pictures were removed that were not answered before the last server ended", removed)
        for path in files.exports.iterdir():
            path.unlink()
        yield history
    finally:
        history.close()


def _purge(history: History, settings: ServeSettings, ending: threading.Event) -> None:
    """Remove what is too old or too much, again and again."""
    keep, keep_bytes = settings.kept_for, settings.kept_bytes
    if keep is None and keep_bytes is None:
        return
    while not ending.is_set():
        try:
            history.purge(keep, keep_bytes)
        except UnavailableError as error:
            _log.warning("old pictures are removed later: %s", error)
        except Exception as error:  # outermost frame of a thread
            _log.error("old pictures could not be removed; it is tried again", exc_info=error)
        ending.wait(_PURGE_S)


class _Server(uvicorn.Server):
    """Ends on a signal, and does not send it again: to be told to end is no failure."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals over while the server runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # `nohup` has the end of the terminal ignored.
        taken = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, end) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
