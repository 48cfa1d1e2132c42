"""Pictures of a bank's normal images, read from their files."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError, SpadeError
from spade_faiss.core.inside import open_regular
from spade_faiss.core.once import Once
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.pages import file_of, part_digest
from spade_faiss.features.pictures import Picture, load_views
from spade_faiss.features.views import view_id
from spade_faiss.report.inputs import Shown
from spade_faiss.report.pictures import shrink

# A larger file is no picture that a report shows: its bank may have named it to keep the process busy.
_MOST_BYTES = 512 << 20
_READ_BYTES = 1 << 20


class NormalPictures:
    """Reads each picture once, as the backbone saw it, see `pictures.shrink`; a file that is not the one that the bank was made
    from is missing.

    A bank may come from anybody, and may name any file of this machine. So a file is decoded only if its content is that which
    the bank was made from: whoever knows its checksum knows the picture.
    """

    def __init__(self, bank: Snapshot) -> None:
        self._bank = bank
        self._read: dict[tuple[str, str], Once[Shown]] = {}

    def __call__(self, name: str, row: int | None = None) -> Shown:
        """The picture of the normal image `name`, or what the entry in a row shows of it."""
        entry = name if row is None or self._bank.is_tiled else self._bank.ids[row]
        # Many threads may ask, and several of them for the same one.
        return self._read.setdefault((name, entry), Once(partial(_load, self._bank, name, entry)))()


def _load(bank: Snapshot, name: str, entry: str) -> Shown:
    path, source = bank.image_path(name), bank.manifest.source
    if path is None:
        return Shown(None, "the bank does not know its file")
    if source is None:
        return Shown(None, "the features came from another extractor")
    if (recorded := bank.sha256_of.get(name)) is None:
        return Shown(None, f"the bank knows no checksum of {path}")
    try:
        found = part_digest(_hash_picture(file_of(path)), path)
    except FileNotFoundError:
        return Shown(None, f"{path} is gone")
    except (SpadeError, OSError, ValueError) as error:
        return Shown(None, str(error))
    if found != recorded:
        return Shown(None, f"{path} has changed since the bank took it")
    augmentation = None if entry == name else bank.manifest.augment
    try:
        loaded, views = load_views(ImageRecord(name, path), source.preprocess, augmentation)
    except InputError as error:
        return Shown(None, str(error))
    if loaded.sha256 != recorded:
        return Shown(None, f"{path} has changed since the bank took it")
    shown = {name: _inspected(bank, name, loaded.picture), **{view_id(name, view.name): view.picture for view in views}}
    if entry not in shown:
        return Shown(None, f"the bank does not say how {entry} was made of {path}")
    return Shown(shrink(shown[entry]))


def _inspected(bank: Snapshot, name: str, picture: Picture) -> Picture:
    """What the backbone saw of a picture: where it has a region of interest of its own, nothing outside of that."""
    source = bank.manifest.source
    if source is None or not source.preprocess.own_rois:
        return picture
    color = np.rint(255 * np.array(source.preprocess.mean)).astype(np.uint8)
    inspected = bank.inspected(bank.ids.index(name))
    return np.where(inspected[..., np.newaxis], picture, color)


def _hash_picture(path: Path) -> str:
    """Return the sha256 of a file, which may be a link, read without waiting and only as far as it is long.

    Raises:
        FileNotFoundError: if there is none.
        BankError: if it is no file.
        InputError: if it is larger than any picture.
    """
    descriptor, digest = open_regular(path, follow_links=True), hashlib.sha256()
    try:
        if (rest := os.fstat(descriptor).st_size) > _MOST_BYTES:
            raise InputError(f"{path} is of {rest} bytes, more than the {_MOST_BYTES} that a report reads of a picture")
        while rest and (part := os.read(descriptor, min(rest, _READ_BYTES))):
            digest.update(part)
            rest -= len(part)
    finally:
        os.close(descriptor)
    return digest.hexdigest()
