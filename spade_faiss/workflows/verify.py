"""Verification: whether all files that a bank and its indexes name exist, and are those that were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.state import SHARDS
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import hash_file
from spade_faiss.core.progress import progress_bar
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.index.built_index import IndexFolder, M, index_folders
from spade_faiss.index.gallery_index import GalleryIndexManifest
from spade_faiss.index.image_index import ImageIndexManifest, load_index


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` looked at, and the problems that it found; no problem means that nothing is wrong."""

    images: int
    shards: int
    indexes: int
    bytes: int
    problems: tuple[str, ...]


def verify(bank: str | Path, *, deep: bool = False, progress: bool = False) -> Verified:
    """Read every file of a bank and of its indexes, and compare its checksum.

    Args:
        bank: the bank's folder.
        deep: also check that the features have the right shapes and are finite, and that no id occurs twice.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        NotFoundError: if there is no bank.
        BankError: if its manifest is damaged, so that nothing else can be checked.
    """
    opened = Bank.open(bank, check=False)
    entries = opened.manifest.shards
    problems: list[str] = []
    with progress_bar(opened.bytes_on_disk, "verify", progress, unit="B") as bar:
        for index, entry in enumerate(entries):
            problems += _shard_problems(opened, index, deep)
            bar.update(entry.bytes)
    if deep and not problems:
        problems += _id_problems(opened)
    images, galleries = index_folders(ImageIndexManifest, opened), index_folders(GalleryIndexManifest, opened)
    for image in images:
        problems += _index_problems(image, partial(load_index, image))
    for gallery in galleries:
        problems += _index_problems(gallery, partial(_check_files, gallery))
    problems += _calibration_problems(opened)
    return Verified(
        images=len(opened),
        shards=len(entries),
        indexes=len(images) + len(galleries),
        bytes=opened.bytes_on_disk,
        problems=tuple(problems),
    )


def _shard_problems(bank: Bank, index: int, deep: bool) -> Iterator[str]:
    """Say what is wrong with a shard's file, or, if nothing is and `deep` is given, with its features."""
    entry = bank.manifest.shards[index]
    path = bank.path / SHARDS / entry.file
    if not path.is_file():
        yield f"shard {path} is missing; restore it from a backup or extract its images again"
    elif (found := hash_file(path)) != entry.sha256:
        yield (
            f"shard {path} has sha256 {found}, the manifest says {entry.sha256}; "
            f"restore it from a backup or extract its images again"
        )
    elif deep:
        yield from _feature_problems(bank, index)


def _feature_problems(bank: Bank, index: int) -> Iterator[str]:
    """Say what is wrong inside a shard whose checksum is right."""
    everything, name = bank.with_removed(), bank.manifest.shards[index].file
    try:
        if not np.isfinite(everything.embeddings_of_shard(index)).all():
            yield f"shard {name} holds embeddings that are not finite; extract its images again"
        rows = everything.rows_of_shard(index).tolist()
        everything.check_texts(index)
        for level in bank.layout.levels:
            if not all(np.isfinite(everything.level_map(level.name, row)).all() for row in rows):
                yield f"shard {name} holds maps of level {level.name!r} that are not finite; extract its images again"
            for row in rows:
                everything.release_map(level.name, row)
    except BankError as error:
        yield str(error)


def _id_problems(bank: Bank) -> Iterator[str]:
    """Say whether ids occur more than once, removed ones included."""
    everything = bank.with_removed()
    try:
        if repeated := len(everything) - len(set(everything.ids)):
            yield f"{repeated} ids occur more than once; extract a new bank"
    except BankError as error:
        yield str(error)


def _index_problems(folder: IndexFolder[M], check_files: Callable[[M], object]) -> Iterator[str]:
    """Say what is wrong with an index; the first problem ends the check."""
    try:
        manifest = folder.read()
        folder.check_shards(manifest)
        check_files(manifest)
    except BankError as error:
        yield str(error)


def _check_files(folder: IndexFolder[M], manifest: M) -> None:
    for entry in manifest.files:
        folder.check_content(entry)


def _calibration_problems(bank: Bank) -> Iterator[str]:
    """Say which calibration is damaged."""
    try:
        stored_calibrations(bank)
    except BankError as error:
        yield str(error)
