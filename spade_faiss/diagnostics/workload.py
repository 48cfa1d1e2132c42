"""Defines the workload that a recipe is recommended for.

The command line reads it at its start, so that nothing heavy may be imported here.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from spade_faiss.core.declaring import ALL, int_or_all, setting
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import DEFAULT_BACKBONE
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.schema import check_at_least, check_choice, is_finite

DEVICES = ("cpu", "cuda")
# The measured shapes of features that stand for those of a backbone.
SHAPES = {"wide_resnet50_2": "wrn50", "efficientnet_lite0": "lite0"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How many images a recipe has to search, on what machine.

    Raises:
        InputError: for a setting out of range.
    """

    images: int = setting(MISSING, "normal images in the bank", metavar="N")
    k: int | str = setting(5, "nearest normals whose maps are searched, or all", metavar="K", kind=int_or_all)
    memory: str | int = setting("8GiB", "memory that the process may take", metavar="SIZE", kind=str)
    device: str = setting("cpu", "where it runs: cpu or cuda")
    backbone: str = setting(DEFAULT_BACKBONE, "the backbone whose shapes are searched: " + " or ".join(SHAPES))
    aligned: bool = setting(False, "the images show the same things at the same places")
    max_bytes: float | None = setting(
        None,
        "the most bytes that a normal image may take in the bank and its index; a smaller store is named where it needs one",
        metavar="BYTES",
        kind=float,
    )

    def __post_init__(self) -> None:
        check_at_least("images", self.images, 1)
        if self.k != ALL:
            check_at_least("k", self.k, 1)
        check_choice("device", self.device, DEVICES)
        check_choice("backbone", self.backbone, tuple(SHAPES))
        parse_bytes(self.memory)
        if self.max_bytes is not None and (not is_finite(self.max_bytes) or self.max_bytes <= 0):
            raise InputError(f"max_bytes={self.max_bytes!r} must be a number above 0")
        if self.k != ALL and int(self.k) > self.images:
            raise InputError(f"k={self.k} is larger than images={self.images}: an image has at most that many nearest normals")
