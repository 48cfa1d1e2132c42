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


def walkway(count: int, *, seed: int, odd: range = range(0)) -> list[Pixels]:
    """Gray frames (158 x 238) of people who walk on a static ground, as in UCSD Ped2; in `odd` ones, a cart drives by."""
    rng = np.random.default_rng(seed)
    ground = np.random.default_rng(99)  # the same camera in every video
    height, width = 158, 238
    y, x = np.mgrid[:height, :width]
    background = 130 + 20 * np.sin(x / 30) + 15 * (y > 90) + ground.normal(0, 6, (height, width))
    people = [(rng.uniform(0, width), rng.uniform(30, 130), rng.choice([-1, 1]) * rng.uniform(0.6, 1.4)) for _ in range(5)]
    frames = []
    for number in range(count):
        picture = background.copy()
        for start, row, speed in people:
            column = (start + speed * number) % width
            sway = 2 * np.sin(number / 3 + start)
            body = ((x - column) / 4) ** 2 + ((y - row) / 11) ** 2 <= 1
            legs = (abs(x - column - sway) <= 2) & (y > row) & (y < row + 17)
            picture[body | legs] = 60
        if number in odd:
            left = (number - odd.start) * (width - 60) / len(odd)
            cart = (x > left) & (x < left + 52) & (y > 70) & (y < 100)
            wheels = ((x - left - 12) ** 2 + (y - 102) ** 2 < 50) | ((x - left - 40) ** 2 + (y - 102) ** 2 < 50)
            picture[cart] = 225
            picture[wheels] = 20
        frames.append((picture + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8))
    return frames
