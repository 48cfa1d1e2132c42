"""Finds the mask of an image in a labeled set, whatever the suffix and the ending of its name."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from spade_faiss.core.errors import InputError
from spade_faiss.core.once import once
from spade_faiss.features.folders import is_image, name_some

FOLDER = "ground_truth"
MASK_NAMES = "<stem>_mask.png (or _label, _gt, _seg, or the stem alone, with any suffix of an image)"

_ENDING = re.compile(r"[-_. ](mask|label|gt|ground[-_]?truth|seg|segmentation)s?$", re.IGNORECASE)


class MaskFolder:
    """Finds masks in a folder by the paths of their images; each of its folders is listed once.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._by_stem: dict[Path, dict[str, list[Path]]] = {}
        self._owner: dict[Path, Path] = {}

    def __call__(self, image: Path) -> Path | None:
        """The mask of an image, which lies below the folder as the image lies below its own; None if there is none.

        Args:
            image: the path of the image below its own folder.

        Raises:
            InputError: if two files could be its mask, or one file the masks of two images.
        """
        candidates = self._in(self._folder_of(image)).get(image.stem, [])
        if len(candidates) > 1:
            raise InputError(
                f"{len(candidates)} files could be the mask of {self._name(image)}: "
                f"{name_some([self._name(path) for path in candidates])}; keep one of them there"
            )
        if not candidates:
            return None
        mask = candidates[0]
        if (owner := self._owner.setdefault(mask, image)) != image:
            raise InputError(
                f"{self._name(mask)} could be the mask of {self._name(owner)} and of {self._name(image)}; give the images, "
                "and their masks, names that differ in more than the suffix"
            )
        return mask

    def describe(self, image: Path) -> str:
        """What lies where the mask of an image should be."""
        folder = self._folder_of(image)
        while not folder.is_dir():
            folder = folder.parent
        entries = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name[0] != ".")
        return f"{self._name(folder)} holds {name_some(entries) if entries else 'nothing'}"

    def _folder_of(self, image: Path) -> Path:
        return self._root / image.parent

    def _in(self, folder: Path) -> dict[str, list[Path]]:
        """The masks of a folder by the stems of the images that they could belong to."""
        if folder not in self._by_stem:
            found: defaultdict[str, list[Path]] = defaultdict(list)
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if is_image(path.name) and path.is_file():
                    for stem in _stems(path.stem):
                        found[stem].append(path)
            self._by_stem[folder] = found
        return self._by_stem[folder]

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self._root) if path.is_absolute() else str(path)


class MaskFinder(MaskFolder):
    """Finds masks in the `ground_truth` folder of a labeled set, by the paths of images below its `test` folder.

    Args:
        root: the folder of the set.
    """

    @once
    def exists(self) -> bool:
        """Whether the set has masks."""
        return (self._root / FOLDER).is_dir()

    def _folder_of(self, image: Path) -> Path:
        return self._root / FOLDER / image.relative_to(self._root / "test").parent


def _stems(stem: str) -> Sequence[str]:
    """The stems of images that a mask of this stem could belong to."""
    shorter = _ENDING.sub("", stem)
    return (stem, shorter) if shorter not in ("", stem) else (stem,)
