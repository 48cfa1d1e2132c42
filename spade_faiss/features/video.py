"""Reads videos by PyAV: which frames there are, and the pixels of one after the other, upright and as RGB with 8 bits.

The frames of a file are images like the pages of one. They are decoded as a stream: threads that ask for the next few frames
share one decoder, and what is decoded ahead of them is bounded. A video may come from anybody, so that only the five kinds of
files are opened, whatever a file is called, and nothing but the file itself: FFmpeg would follow a playlist to any address.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import hash_file
from spade_faiss.core.once import Once
from spade_faiss.features.decoding import MAX_PIXELS
from spade_faiss.features.video_names import write_times

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame as AvFrame
    from av.video.stream import VideoStream

Pixels = npt.NDArray[np.uint8]
_Decoding = Generator[tuple[int, Pixels | str], None, None]

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_MOST_FRAMES = 2_000_000


@dataclass(frozen=True)
class _Listed:
    """The frames of a video in the order in which they are shown, as its container lists them.

    Args:
        times: the pts of each frame, ascending.
        time_base: the seconds of a pts.
        size: width and height of the frames as they are stored; one may be turned.
        ends_early: why the list is not complete; empty if it is.
    """

    times: tuple[int, ...]
    time_base: Fraction
    size: tuple[int, int]
    ends_early: str


class Video:
    """A video file whose frames are read one after the other; threads may share it.

    Args:
        path: the file.
        every: only every n-th frame is going to be read, the first included.
        seeks: begin to decode near the frame that is asked for first, not at the start: right for a look at one frame.
            Features of frames are made of those that were decoded from the start, so that they are the same in each run.
    """

    def __init__(self, path: Path, *, every: int = 1, seeks: bool = False) -> None:
        self.path = path
        self.every = every
        self._seeks = seeks
        self._lock = threading.Lock()
        self._listing = Once(lambda: _list(path))
        self._digest = Once(lambda: hash_file(path))
        self._decoding: _Decoding | None = None
        self._next = 0
        # Decoded before somebody asked for it: threads ask in no strict order, as many at a time as decode images.
        self._ahead: OrderedDict[int, Pixels | str] = OrderedDict()
        self._most_ahead = 2 * (os.cpu_count() or 1)

    def __reduce__(self) -> tuple[Callable[[], Video], tuple[()]]:
        # In another process it decodes anew; what was decoded here stays here.
        return partial(Video, self.path, every=self.every, seeks=self._seeks), ()

    def at(self, path: Path) -> Video:
        """The same video in another file, such as a copy of this one."""
        return Video(path, every=self.every, seeks=self._seeks)

    @property
    def numbers(self) -> range:
        """The numbers of the frames that are going to be read."""
        return range(0, len(self._listing().times), self.every)

    @property
    def ends_early(self) -> str:
        """Why frames at the end are missing; empty if none are."""
        return self._listing().ends_early

    @property
    def sha256(self) -> str:
        """The sha256 of the file."""
        return self._digest()

    def times(self) -> list[str]:
        """The time of every frame of the file in seconds, counted from the first, as text that tells them apart."""
        listed = self._listing()
        return write_times([(pts - listed.times[0]) * listed.time_base for pts in listed.times])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames as they are stored; a frame may be turned."""
        return self._listing().size

    def read(self, number: int, max_pixels: int = MAX_PIXELS) -> Pixels:
        """Return the pixels (H, W, 3) of a frame, upright.

        Raises:
            InputError: for a frame that cannot be decoded, or that is built on one that cannot.
        """
        with self._lock:
            found = self._ahead.pop(number, None)
            while found is None:
                found = self._read_on(number, max_pixels)
            if number == self.numbers[-1]:
                self._close()
        if isinstance(found, str):
            raise InputError(found)
        return found

    def _read_on(self, number: int, max_pixels: int) -> Pixels | str | None:
        """Decode one frame more on the way to `number`, and return it if it is that; keep it if it will be asked for."""
        if self._decoding is None or number < self._next:
            self._close()
            self._decoding = _decode(self.path, self._listing(), max_pixels, number if self._seeks else None, self.every)
            self._next = 0
        at, found = next(self._decoding, (len(self._listing().times), "the video ends before it"))
        self._next = at + 1
        if at == number:
            return found
        if at > number:
            return _DAMAGED
        if at % self.every == 0 and not self._seeks:
            self._ahead[at] = found
            if len(self._ahead) > self._most_ahead:
                self._ahead.popitem(last=False)
        return None

    def _close(self) -> None:
        decoding, self._decoding = self._decoding, None
        if decoding is not None:
            decoding.close()


_DAMAGED = "the frame could not be decoded: it, or one that it is built on, is damaged"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video's container, and find its stream of pictures."""
    import av

    # As a file: av.open would take a name with a colon in it for an address.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or not isinstance(stream, av.VideoStream):
            raise InputError("it has no pictures, only other streams")
        context = stream.codec_context
        if context is None:
            raise InputError("its pictures are of a kind that FFmpeg does not know")
        pixels = context.width * context.height
        if not 0 < pixels <= MAX_PIXELS:
            raise InputError(f"its frames of {context.width} x {context.height} pixels are not of 1 to {MAX_PIXELS} pixels")
        context.options = {"max_pixels": str(MAX_PIXELS)}  # sizes may change on the way
        yield container, stream


def _list(path: Path) -> _Listed:
    """List the frames by their packets, without decoding them."""
    import av

    times, why = [], ""
    with _opened(path) as (container, stream):
        promised, base = stream.frames, stream.time_base or Fraction(1)
        size = stream.codec_context.width, stream.codec_context.height
        try:
            for packet in container.demux(stream):
                if packet.pts is not None and not packet.is_discard:
                    times.append(packet.pts)
                    if len(times) > _MOST_FRAMES:
                        raise InputError(f"it has more than {_MOST_FRAMES} frames; cut it up")
        except av.error.FFmpegError as error:
            why = f" ({error.strerror})"
    if not times:
        raise InputError(f"it has no frames{why}")
    # Two fields may be packets of one frame.
    times = sorted(set(times))
    missing = promised - len(times)
    if why or missing > 0:
        said = f"{missing} of the {promised} frames that it says it has are missing" if missing > 0 else "the rest is missing"
        why = f"the file is cut off or damaged after {len(times)} frames: {said}{why}"
    return _Listed(tuple(times), base, size, why)


def _decode(path: Path, listed: _Listed, max_pixels: int, near: int | None, every: int) -> _Decoding:
    """Yield the number and the pixels of frame after frame, those from `near` on; in place of pixels, why there are none.

    Of frames in between that are not going to be read, there are no pixels either.
    """
    number_of = {pts: number for number, pts in enumerate(listed.times)}
    with _opened(path) as (container, stream):
        # AVI has no times of frames, only of packets: where these are not in the order of frames, frames are counted.
        counts = container.format.name == "avi" and bool(stream.codec_context.has_b_frames)
        if near is not None and not counts:
            container.seek(listed.times[near], stream=stream)
        expected = 0
        for position, (frame, is_broken) in enumerate(_frames(container, stream)):
            number = position if counts else number_of.get(-1 if frame.pts is None else frame.pts, -1)
            if not 0 <= number < len(listed.times):
                continue
            if near is None:  # a frame that does not come has its turn all the same: to look for it again is to begin anew
                for missing in range(expected, number):
                    yield missing, _DAMAGED
                expected = max(expected, number + 1)
            if is_broken:
                yield number, _DAMAGED
            elif number % every and near is None:
                yield number, ""
            elif frame.width * frame.height > max_pixels:
                size = f"{frame.width} x {frame.height} pixels"
                yield number, f"{size} are more than the {max_pixels} allowed; scale the video down"
            else:
                yield number, _upright(frame)
        if near is None:
            for missing in range(expected, len(listed.times)):
                yield missing, _DAMAGED


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[tuple[AvFrame, bool]]:
    """Yield the frames that can be decoded, and whether they are damaged: after an error, all are, up to the next key frame."""
    import av

    is_broken = False
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        try:
            frames: list[Any] = list(packet.decode())
        except av.error.FFmpegError:
            is_broken = True
            continue
        for frame in frames:
            is_broken = is_broken and not (frame.key_frame and not frame.is_corrupt)
            yield frame, is_broken or bool(packet.is_corrupt or frame.is_corrupt)


def _upright(frame: AvFrame) -> Pixels:
    turns = round(frame.rotation / 90) % 4  # counterclockwise, as numpy.rot90 turns
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
