"""Regions of interest that differ from picture to picture: a folder with a mask for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.folders import name_some
from spade_faiss.features.frames import Frame
from spade_faiss.features.mask_files import MASK_NAMES, MaskFolder
from spade_faiss.features.pages import split_page
from spade_faiss.features.roi_files import read_roi


class RoiFolder:
    """The regions of interest of pictures, each from a mask that lies in a folder as the picture lies in its own.

    Args:
        folder: the folder of the masks.

    Raises:
        NotFoundError: if there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise NotFoundError(f"there is no folder of masks at {folder}; each picture needs one, {MASK_NAMES}")
        self._masks = MaskFolder(self._folder.resolve())

    def check(self, records: Sequence[ImageRecord]) -> None:
        """Raise InputError unless every picture has one mask: what is to be inspected of the others is not known."""
        if frames := [record.id for record in records if isinstance(record, Frame)]:
            raise InputError(f"{name_some(frames)} are pictures from memory, which have no masks; score them as files")
        if missing := [record.id for record in records if self.mask_of(record) is None]:
            raise InputError(
                f"{len(missing)} of {len(records)} pictures have no mask in {self._folder}: {name_some(missing)}; give each "
                f"of them one, {MASK_NAMES}"
            )

    def preprocess(self, record: ImageRecord, preprocess: Preprocess) -> Preprocess:
        """How a picture becomes an input, with the region of interest of its own.

        Raises:
            InputError: as `read_roi`, and for a picture without a mask.
        """
        self.check([record])
        path = self.mask_of(record)
        assert path is not None
        return replace(preprocess, roi=read_roi(path), own_rois=False)

    def mask_of(self, record: ImageRecord) -> Path | None:
        """Where the mask of a picture is, of a page with its number; None if it has none."""
        file, page = split_page(Path(record.id))
        mask = self._masks(file)
        return mask if mask is None or page is None else mask.with_name(f"{mask.name}#{page}")


def find_rois(preprocess: Preprocess, folder: str | Path | None) -> RoiFolder | None:
    """The regions of pictures that each have one of their own; None for a bank whose pictures do not.

    Args:
        preprocess: that of the bank.
        folder: the folder of masks that was given; None if none was.

    Raises:
        InputError: if the bank needs such a folder and there is none, or the other way round.
        NotFoundError: if there is no such folder.
    """
    if preprocess.own_rois and folder is None:
        raise InputError(
            "each picture of this bank has a region of interest of its own; give the folder of the masks: --roi MASKS/"
        )
    if not preprocess.own_rois and folder is not None:
        held = "no region of interest" if preprocess.roi is None else "one region of interest for all pictures"
        raise InputError(f"roi={str(folder)!r} is for banks that were made with a folder of masks; this one has {held}")
    return RoiFolder(folder) if folder is not None else None
