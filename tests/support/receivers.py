"""What verdicts are delivered to in tests: an HTTP receiver, and a broker that speaks as much MQTT 3.1.1 as QoS 1 takes."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


# The status and the headers of the answer to a request, by its number.
Answer = Callable[[int, Request], tuple[int, dict[str, str]]]


@dataclass
class Receiver:
    """An HTTP server that keeps what it is sent."""

    answer: Answer = lambda number, request: (200, {})
    requests: list[Request] = field(default_factory=list)
    taken: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def receiving(receiver: Receiver) -> Iterator[Receiver]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = Request(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            with lock:
                receiver.requests.append(request)
                status, headers = receiver.answer(len(receiver.requests), request)
                if status < 300:
                    receiver.taken.append(request)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed

    with Server(("127.0.0.1", receiver.port), Handler) as server:
        receiver.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


class Broker:
    """Confirms connections and messages. `lose` makes it break off the connection before it confirms so many messages."""

    def __init__(self, *, lose: int = 0, password: str | None = None) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.connections = 0
        self._lose = lose
        self._password = password
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.connections += 1
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        try:
            while (packet := _packet(stream)) is not None:
                kind, flags, data = packet
                if kind == 1:
                    ok = self._password is None or data.endswith(self._password.encode())
                    connection.sendall(bytes([0x20, 2, 0, 0 if ok else 5]))
                elif kind == 3:
                    assert flags & 0b110 == 0b010, "QoS 1"
                    (length,) = struct.unpack_from(">H", data)
                    topic, number, body = data[2 : 2 + length].decode(), data[2 + length : 4 + length], data[4 + length :]
                    self.messages.append((topic, body))
                    if self._lose:
                        self._lose -= 1
                        return
                    connection.sendall(bytes([0x40, 2]) + number)
                elif kind == 12:
                    connection.sendall(bytes([0xD0, 0]))
                elif kind == 14:
                    return
        except OSError:
            return
        finally:
            stream.close()


def _packet(stream: Any) -> tuple[int, int, bytes] | None:
    """The kind, the flags and the content of the next packet."""
    first = stream.read(1)
    if not first:
        return None
    length = shift = 0
    while True:
        (byte,) = stream.read(1)
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return first[0] >> 4, first[0] & 15, stream.read(length)
