"""Servers in processes of their own, and clients that keep them busy."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

_START_S = 120.0
_TIMEOUT_S = 120.0
BUSY = (503,)


@dataclass(eq=False)
class Server:
    """A server that runs in a process of its own.

    Args:
        banks: what it serves.
        data: its folder.
        options: further words of its command line.
    """

    banks: Sequence[Path]
    data: Path
    options: Sequence[str] = ()
    url: str = ""
    process: subprocess.Popen[str] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.data.with_name(self.data.name + ".log")

    def start(self, port: int = 0) -> Server:
        """Start it, and wait until all banks are ready."""
        words = [sys.executable, "-m", "spade_faiss", "serve", *map(str, self.banks), "--data", str(self.data)]
        words += ["--port", str(port), "--json", *self.options]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")
        self.url = json.loads(line)["url"]
        until = time.monotonic() + _START_S
        while call(self.url, "GET", "/readyz").status != 200:
            if time.monotonic() > until:
                raise RuntimeError(f"the server did not become ready: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return int(urlsplit(self.url).port or 0)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self._wait()

    def stop(self) -> int:
        """Tell it to end; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        code = self.process.wait(_TIMEOUT_S)
        self.process.stdout.close()
        return code

    def resident_bytes(self) -> int:
        """How much memory it holds."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(banks: Sequence[Path], data: Path, *options: str) -> Iterator[Server]:
    """A server, until the block ends."""
    server = Server(banks, data, options).start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


def call(url: str, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    """Send a request by a connection of its own; `body` is sent as JSON unless it is bytes."""
    connection = _connection(url)
    try:
        return _send(connection, method, path, body, headers)
    finally:
        connection.close()


def _connection(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port, timeout=_TIMEOUT_S)


def _send(connection: http.client.HTTPConnection, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body, named["content-type"] = json.dumps(body).encode(), "application/json"
    connection.request(method, path, body, named)
    reply = connection.getresponse()
    return Reply(reply.status, reply.read(), {name.lower(): value for name, value in reply.getheaders()})


@dataclass
class Answered:
    """A picture that was sent, and what came back.

    Args:
        path: the picture.
        seconds: from the request to the answer, tries that were refused not counted.
        picture: the record.
        refused: how often the queue was full.
    """

    path: Path
    seconds: float
    picture: dict[str, Any]
    refused: int = 0


@dataclass(eq=False)
class Load:
    """Clients that send pictures one after the other, each as soon as its last one is answered.

    Args:
        server: where to.
        bank: the name of the bank.
        paths: the pictures, without an end if they have none; each is sent once, by one of the clients.
        clients: how many clients.
        keyed: whether requests have keys, so that they may be sent again after a kill.
        patient: whether clients go on when the server is gone.
    """

    server: Server
    bank: str
    paths: Iterable[Path]
    clients: int
    keyed: bool = False
    patient: bool = False
    answered: list[Answered] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next = iter(enumerate(self.paths))
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]

    def start(self) -> Load:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __enter__(self) -> Load:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.end()

    def join(self) -> float:
        """Wait until all pictures are answered; returns how long it took since this was called."""
        start = time.perf_counter()
        for thread in self._threads:
            thread.join()
        return time.perf_counter() - start

    def end(self) -> None:
        """Send no more pictures."""
        self._ending.set()
        self.join()

    def _run(self) -> None:
        connection = _connection(self.server.url)
        while not self._ending.is_set():
            with self._lock:
                item = next(self._next, None)
            if item is None:
                break
            number, path = item
            connection = self._send(connection, number, path)
        connection.close()

    def _send(self, connection: http.client.HTTPConnection, number: int, path: Path) -> http.client.HTTPConnection:
        headers = {"content-type": "image/png", "x-spade-faiss-name": quote(path.name)}
        if self.keyed:
            headers["idempotency-key"] = f"{number}-{path.stem}"
        data, refused = path.read_bytes(), 0
        while not self._ending.is_set():
            start = time.perf_counter()
            try:
                reply = _send(connection, "POST", f"/v1/banks/{self.bank}/score", data, headers)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not self.patient:
                    self.errors.append(f"{path.name}: {error!r}")
                    break
                time.sleep(0.05)
                connection = _connection(self.server.url)
                continue
            if reply.status in BUSY:
                refused += 1
                time.sleep(0.05)
                continue
            if reply.status != 200:
                self.errors.append(f"{path.name}: {reply.status} {reply.body[:300]!r}")
                break
            picture = reply.json["pictures"][0]["picture"]
            self.answered.append(Answered(path, time.perf_counter() - start, picture, refused))
            break
        return connection


def wait_until(what: Callable[[], bool], most_s: float = 120.0) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: if it takes too long.
    """
    until = time.monotonic() + most_s
    while not what():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.05)
