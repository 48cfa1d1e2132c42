"""A camera or stream as a source: it is opened again when it breaks off, and frames that nobody takes in time are dropped."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.features.decoding import MAX_PIXELS
from spade_faiss.features.frames import Frame
from spade_faiss.watch.arrivals import Arrival, picture_id
from spade_faiss.watch.backoff import Backoff

_log = logging.getLogger(__name__)

SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "tcp", "udp", "srt")
# Nothing on this machine's disk can be reached by what a stream says.
_PROTOCOLS = "rtsp,rtsps,rtp,srtp,rtmp,rtmps,http,https,httpproxy,tcp,udp,tls,crypto,srt"
_TIMEOUT_S = 10.0


class CameraSource:
    """The frames of a stream, as they come.

    Args:
        url: its address.
        every: only every n-th frame is taken.
        most: how many frames wait to be scored; a later one takes the place of the oldest.
        once: end when the stream ends, and do not open it again.

    Raises:
        DependencyError: if PyAV is not installed.
        InputError: for an address of another kind.
    """

    def __init__(self, url: str, *, every: int, most: int, once: bool) -> None:
        from spade_faiss.watch.packages import import_av

        self._av = import_av()
        if urlsplit(url).scheme not in SCHEMES:
            raise InputError(f"{label_of(url)!r} is no stream that can be read; give one of {', '.join(SCHEMES)}")
        self._url = url
        self.label = label_of(url)
        self._every = every
        self._once = once
        self._frames: deque[Arrival] = deque(maxlen=most)
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="source-camera", daemon=True)
        self._dropped = 0
        self._taken = 0
        self._last_s = 0.0
        self._is_done = False
        self._error: BaseException | None = None

    @property
    def dropped(self) -> int:
        """See `Source`."""
        return self._dropped

    @property
    def has_ended(self) -> bool:
        """See `Source`."""
        return self._is_done and not self._frames

    def start(self) -> None:
        """See `Source`."""
        self._thread.start()

    def get(self, timeout_s: float) -> Arrival | None:
        """See `Source`."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._is_done, timeout_s)
            if self._frames:
                return self._frames.popleft()
        if self._error is not None:
            raise self._error
        return None

    def unreadable(self, arrival: Arrival, *, changed: bool) -> bool:
        """See `Source`."""
        return True

    def settled(self, arrival: Arrival) -> None:
        """See `Source`."""

    def stop(self) -> None:
        """See `Source`; a stream that says nothing is left alone."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=1)

    def _work(self) -> None:
        try:
            self._read()
        except BaseException as error:  # it is raised where frames are taken
            self._error = error
        finally:
            with self._changed:
                self._is_done = True
                self._changed.notify_all()

    def _read(self) -> None:
        backoff = Backoff(0.5, 30)
        while not self._stopping.is_set():
            before = self._taken
            try:
                self._read_stream()
                why = "it ended"
            except (self._av.error.FFmpegError, OSError) as error:
                why = str(error.strerror or error)
            if self._taken > before:
                backoff.reset()
            if self._stopping.is_set():
                return
            if self._once:
                if not self._taken:
                    raise InputError(f"cannot read {self.label}: {why}")
                return
            wait = backoff.next_s()
            _log.warning("%s: %s; it is opened again in %.1f s", self.label, why, wait)
            self._stopping.wait(wait)

    def _read_stream(self) -> None:
        options = {"protocol_whitelist": _PROTOCOLS, "rtsp_transport": "tcp"}
        with self._av.open(
            self._url, options=options, timeout=(_TIMEOUT_S, _TIMEOUT_S), metadata_errors="replace"
        ) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"{self.label} has no pictures, only other streams")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            number = 0
            for packet in container.demux(stream):
                if self._stopping.is_set():
                    return
                try:
                    frames = packet.decode()
                except self._av.error.FFmpegError as error:  # damaged on its way: the next key frame is whole again
                    _log.debug("%s: %s", self.label, error)
                    continue
                for frame in frames:
                    if number % self._every == 0 and not frame.is_corrupt:
                        self._take(frame)
                    number += 1

    def _take(self, frame: Any) -> None:
        # Frames that come at once, as after a stall, get names more than a millisecond apart: a batch refuses equal ones.
        self._last_s = now = max(time.time(), self._last_s + 0.00101)
        stamp = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        pixels = frame.to_ndarray(format="rgb24")
        if turns := round(frame.rotation / 90) % 4:
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        name = f"{self.label}#{stamp}"
        arrival = Arrival(
            id=picture_id(name, str(time.time_ns()), str(self._taken)),
            record=Frame(name, Path(name), pixels=pixels),
            arrived_s=now,
            is_remembered=False,
        )
        with self._changed:
            self._taken += 1
            self._dropped += len(self._frames) == self._frames.maxlen
            self._frames.append(arrival)
            self._changed.notify_all()


def label_of(url: str) -> str:
    """An address without the user, the password and the query, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
