"""The record of an image: what is known of it before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spade_faiss.core.settings import LabeledSet


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image file that was found.

    Args:
        id: its POSIX path below the root under which it was found; of a page, with its number, as `scan.tif#2`; of a frame of
            a video, with its time, as `clip.mp4#t=12.480`.
        path: where the file is; of a page or a frame, with its number or time.
        kind: the normal kind or the kind of defect, in a labeled set; None elsewhere.
        mask: the file that marks its defective pixels, in a labeled set that has masks.
        normal_kind: what the normal kind is called.
    """

    id: str
    path: Path
    kind: str | None = None
    mask: Path | None = None
    normal_kind: str = LabeledSet.normal_kind

    @property
    def defective(self) -> bool | None:
        """Whether the image shows a defect; None where it is not labeled."""
        return None if self.kind is None else self.kind != self.normal_kind
