"""Pictures that arrive, and what a source of them is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from spade_faiss.features.records import ImageRecord


class Stamp(NamedTuple):
    """The state of a file in which it was taken."""

    size: int
    mtime_ns: int


@dataclass(eq=False)
class FileJob:
    """A file some of whose images are on their way.

    Args:
        name: its path below the folder that is watched.
        stamp: the state in which it was taken.
        waiting: how many of its images are not settled yet.
        is_last_try: whether images of it that cannot be read are skipped for good.
        failed: whether images of it could not be read, and will be tried again.
    """

    name: str
    stamp: Stamp
    waiting: int
    is_last_try: bool
    failed: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Arrival:
    """A picture that is to be scored.

    Args:
        id: names it for all time: the same picture under the same name has the same id.
        record: the picture; its id is the name that people know it by.
        sha256: of its content; empty for a frame of a camera.
        arrived_s: when it was complete, as `time.time()` counts.
        job: the file that it comes from, in a folder.
        is_remembered: whether it may come again, so that its id is kept.
        time_s: when a frame is shown in its video, once it is no record of one any more.
    """

    id: str
    record: ImageRecord
    sha256: str = ""
    arrived_s: float = 0.0
    job: FileJob | None = field(default=None)
    is_remembered: bool = True
    time_s: float | None = None


def picture_id(*parts: str) -> str:
    """32 hex digits that stand for a picture: the same for the same parts, such as its name and the hash of its content."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Source(Protocol):
    """Where pictures come from. A thread of its own finds them."""

    @property
    def dropped(self) -> int:
        """How many pictures were not taken in time and are lost; only those of a camera are."""

    @property
    def has_ended(self) -> bool:
        """Whether no more pictures will come."""

    def start(self) -> None:
        """Begin to find pictures."""

    def get(self, timeout_s: float) -> Arrival | None:
        """Return the next picture; None if none came in time.

        Raises:
            SpadeError: if the source cannot go on.
        """

    def unreadable(self, arrival: Arrival, *, changed: bool) -> bool:
        """Say that a picture could not be read, or has changed meanwhile; returns whether that is final."""

    def settled(self, arrival: Arrival) -> None:
        """Say that a picture was scored or skipped, and that this is on disk."""

    def stop(self) -> None:
        """Find no more pictures, and wait for the thread to end."""
