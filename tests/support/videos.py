"""Videos that tests write."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

# A codec for each kind of file.
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".mov": "mpeg4", ".webm": "libvpx-vp9"}


def write_video(
    path: Path,
    frames: Sequence[Pixels],
    *,
    rate: int = 10,
    times_ms: Sequence[int] | None = None,
    codec: str = "",
    gop: int = 12,
) -> Path:
    """Write frames (H, W, 3) or (H, W) as a video; with `times_ms`, at a variable frame rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = cast(av.VideoStream, container.add_stream(codec or CODECS[path.suffix], rate=rate))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.gop_size = gop
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="gray" if pixels.ndim == 2 else "rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbered(count: int, size: tuple[int, int] = (48, 64)) -> list[Pixels]:
    """Frames that can be told apart: of `read_number`."""
    return [np.full((*size, 3), 20 + 6 * number % 216, np.uint8) for number in range(count)]


def read_number(pixels: Pixels) -> int:
    """Which of the first 36 of `numbered` it is."""
    return round((float(pixels.mean()) - 20) / 6)
