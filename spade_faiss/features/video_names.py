"""Names videos and their frames: `clip.mp4#t=12.480` is the frame of `clip.mp4` that is shown at 12.48 seconds.

Nothing is read here, and PyAV is not needed to know a video by its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from spade_faiss.core.errors import DependencyError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm")
INSTALL = "pip install 'spade-faiss[video]'"
# Frames of most videos are told apart by milliseconds; more digits are written only where they are not.
_DIGITS = (3, 6, 9)
_FRAME_NAME = re.compile(r"(.+)#t=(\d{1,9}\.\d{3,9})", re.DOTALL)


def is_video(name: str) -> bool:
    """Whether a file of this name is taken for a video."""
    return not name.startswith(".") and name.lower().endswith(VIDEO_SUFFIXES)


def can_read_videos() -> bool:
    """Whether PyAV is installed, which reads them."""
    return find_spec("av") is not None


def check_can_read(path: Path) -> None:
    """Raise DependencyError, which says what to install, unless videos can be read."""
    if not can_read_videos():
        raise DependencyError(f"{str(path)!r} is a video, which the package av reads; install it with: {INSTALL}")


def split_time(path: Path) -> tuple[Path, str] | None:
    """The video and the time that a path such as `clip.mp4#t=12.480` names; None for any other path.

    A file that is really named so is itself.
    """
    found = _FRAME_NAME.fullmatch(path.name)
    if found is None or not is_video(found[1]) or path.is_file():
        return None
    return path.with_name(found[1]), found[2]


def frame_name(name: str, time: str) -> str:
    """The name of the frame that a video shows at a time, as `write_times` writes it."""
    return f"{name}#t={time}"


def write_times(times_s: Sequence[Fraction]) -> list[str]:
    """Times in seconds as text with as many digits as it takes to tell all of them apart, at least three."""
    for digits in _DIGITS:
        written = [write_time(time, digits) for time in times_s]
        if len(set(written)) == len(written):
            break
    return written if times_s else []


def write_time(time_s: Fraction, digits: int) -> str:
    """A time of 0 or more as text."""
    units = round(time_s * 10**digits)
    return f"{units // 10**digits}.{units % 10**digits:0{digits}d}"
