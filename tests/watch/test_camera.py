"""A stream as a source: frames as they come, the connection made anew, late frames dropped."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.features.frames import Frame
from spade_faiss.watch.arrivals import Arrival
from spade_faiss.watch.backoff import Backoff
from spade_faiss.watch.sources.camera import CameraSource, label_of
from tests.support.videos import Pixels, numbered, read_number, write_video
from tests.support.watching import judge_of, read_lines, watching


@dataclass
class Camera:
    """Sends MPEG-TS to whoever connects: some frames, then it breaks off."""

    port: int = 0
    connections: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)


@contextmanager
def camera(frames: list[Pixels], *, pause_s: float = 0.0) -> Iterator[Camera]:
    found = Camera()
    with socket.create_server(("127.0.0.1", 0)) as server:
        found.port = server.getsockname()[1]
        server.settimeout(0.05)

        def serve() -> None:
            while not found.stopping.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                found.connections += 1
                with connection, suppress(OSError, av.error.FFmpegError):
                    _send(connection, frames, pause_s, found.stopping)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            found.stopping.set()
            thread.join()


def _send(connection: socket.socket, frames: list[Pixels], pause_s: float, stopping: threading.Event) -> None:
    with connection.makefile("wb") as file, av.open(file, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.gop_size = 5
        for pixels in frames:
            if stopping.is_set():
                return
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            time.sleep(pause_s)
        container.mux(stream.encode(None))


def take(source: CameraSource, count: int, timeout_s: float = 20) -> list[Arrival]:
    found: list[Arrival] = []
    end = time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < end:
        if (arrival := source.get(0.1)) is not None:
            found.append(arrival)
    assert len(found) == count
    return found


def number_of(arrival: Arrival) -> int:
    assert isinstance(arrival.record, Frame)
    assert isinstance(arrival.record.pixels, np.ndarray)
    return read_number(arrival.record.pixels)


def test_every_nth_frame_and_names_without_secrets() -> None:
    with camera(numbered(30), pause_s=0.001) as server:
        source = CameraSource(f"tcp://me:secret@127.0.0.1:{server.port}?timeout=5000000", every=3, most=100, once=True)
        source.start()
        found = take(source, 10)
        assert [number_of(arrival) for arrival in found] == list(range(0, 30, 3))
        while not source.has_ended:
            assert source.get(0.05) is None
        source.stop()
    assert len({arrival.id for arrival in found}) == 10
    assert all(arrival.record.id.startswith(f"tcp://127.0.0.1:{server.port}#20") for arrival in found)
    assert not any("secret" in arrival.record.id for arrival in found)


def test_frames_of_one_moment_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    source = CameraSource("tcp://127.0.0.1:9", every=1, most=10, once=True)
    frame = av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1.7e9 + 0.0004)
        for _ in range(5):
            source._take(frame)
    found = [source.get(0) for _ in range(5)]
    assert len({arrival.record.id for arrival in found if arrival is not None}) == 5


def test_it_is_opened_again_when_it_breaks_off() -> None:
    with camera(numbered(8), pause_s=0.001) as server:
        source = CameraSource(f"tcp://127.0.0.1:{server.port}", every=1, most=100, once=False)
        source.start()
        found = take(source, 16)
        source.stop()
    assert [number_of(arrival) for arrival in found] == [*range(8), *range(8)]
    assert server.connections >= 2


def test_frames_that_nobody_takes_are_dropped_the_oldest_first() -> None:
    with camera(numbered(30), pause_s=0.001) as server:
        source = CameraSource(f"tcp://127.0.0.1:{server.port}", every=1, most=4, once=True)
        source.start()
        end = time.monotonic() + 20
        while source.dropped < 26 and time.monotonic() < end:
            time.sleep(0.01)
        assert source.dropped == 26
        assert [number_of(arrival) for arrival in take(source, 4)] == [26, 27, 28, 29]
        source.stop()


def test_a_stream_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    source = CameraSource(f"tcp://127.0.0.1:{port}", every=1, most=4, once=True)
    source.start()
    with pytest.raises(InputError, match=f"cannot read tcp://127.0.0.1:{port}"):
        for _ in range(100):
            source.get(0.1)
    source.stop()
    with pytest.raises(InputError, match="no stream that can be read"):
        CameraSource("file:///etc/passwd", every=1, most=4, once=True)


def test_a_playlist_does_not_lead_to_files_of_this_machine(tmp_path: Path) -> None:
    """A camera may be anybody's: what it sends names no file here."""
    secret = write_video(tmp_path / "secret.ts", numbered(10), codec="mpeg2video")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def serve() -> None:
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    head = f"HTTP/1.0 200 OK\r\nContent-Type: application/x-mpegURL\r\nContent-Length: {len(playlist)}\r\n\r\n"
                    connection.sendall(head.encode() + playlist)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        source = CameraSource(f"http://127.0.0.1:{server.getsockname()[1]}/a.m3u8", every=1, most=4, once=True)
        source.start()
        with pytest.raises(InputError, match="cannot read"):
            for _ in range(100):
                assert source.get(0.1) is None
        source.stop()
        thread.join()


def test_frames_are_judged(tmp_path: Path, fitted_bank: Path) -> None:
    with (
        camera(numbered(12, (80, 96)), pause_s=0.001) as server,
        watching(
            f"tcp://127.0.0.1:{server.port}",
            [f"folder:{tmp_path / 'out'}"],
            judge=judge_of(fitted_bank),
            every=4,
            once=True,
        ) as running,
    ):
        running.join()
    lines = read_lines(tmp_path / "out")
    assert len(lines) + running.watch.done.dropped == 3
    assert lines
    assert all(line["kind"] == "verdict" and line["p_value"] is not None for line in lines)


def test_waits_grow_and_begin_anew() -> None:
    backoff = Backoff(1, 30)
    waits = [backoff.next_s() for _ in range(10)]
    assert all(0.75 * min(30, 2**k) <= wait <= min(30, 2**k) for k, wait in enumerate(waits))
    assert backoff.next_s(40) == 40
    assert backoff.next_s(1e9) == 300
    backoff.reset()
    assert backoff.next_s() <= 1
    assert label_of("https://a/b?c=d") == "https://a/b"
