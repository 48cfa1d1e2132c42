"""Whether everything that a bank and its indexes name is there, and is what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.state import SHARDS
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import hash_file
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.index.gallery_index import built_galleries, check_gallery
from spade_faiss.index.image_index import built_indexes, check_index
from spade_faiss.index.staleness import check_covers


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` looked at, and what is wrong with it: nothing, if `problems` is empty."""

    images: int
    shards: int
    indexes: int
    bytes: int
    problems: tuple[str, ...]


def verify(bank: str | Path, *, deep: bool = False, progress: bool = False) -> Verified:
    """Read every file of a bank and of its indexes and compare its checksum.

    Args:
        bank: the bank's folder.
        deep: read the features, too: their shapes, that they are finite numbers, that no id is there twice.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        NotFoundError: if there is no bank.
        BankError: if its manifest is damaged: then nothing else can be told.
    """
    opened = Bank.open(bank, check=False)
    problems: list[str] = []
    entries = opened.manifest.shards
    with tqdm(total=opened.bytes_on_disk, desc="verify", unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for index, entry in enumerate(entries):
            path = opened.path / SHARDS / entry.file
            found = hash_file(path) if path.is_file() else "missing"
            if found != entry.sha256:
                state = "is missing" if found == "missing" else f"has sha256 {found}, the manifest says {entry.sha256}"
                problems.append(f"shard {path} {state}; restore it from a backup or extract its images again")
            elif deep:
                problems += _features(opened, index)
            bar.update(entry.bytes)
    if deep and not problems:
        problems += _ids(opened)
    indexes, of_indexes = 0, list(_indexes(opened))
    for problem in of_indexes:
        indexes += 1
        problems += [problem] if problem else []
    problems += _calibrations(opened)
    return Verified(
        images=len(opened), shards=len(entries), indexes=indexes, bytes=opened.bytes_on_disk, problems=tuple(problems)
    )


def _features(bank: Bank, index: int) -> Iterator[str]:
    """What is wrong inside of a shard whose checksum is right."""
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


def _ids(bank: Bank) -> Iterator[str]:
    """Ids that are there twice, removed ones too."""
    everything = bank.with_removed()
    try:
        if twice := len(everything) - len(set(everything.ids)):
            yield f"{twice} ids are there more than once, or not at all; extract a new bank"
    except BankError as error:
        yield str(error)


def _indexes(bank: Bank) -> Iterator[str]:
    """For each index, what is wrong with it; empty if nothing is."""
    for path in sorted((bank.path / "indexes").glob("*/*.json")):
        command = f"spade-faiss index {bank.path} --recipe {path.parent.name} --rebuild"
        try:
            for image in built_indexes(bank, path.parent.name) if path.name == "index.json" else []:
                check_covers(bank, image.shards, path.parent, command)
                check_index(bank, image)
            for gallery in built_galleries(bank, path.parent.name) if path.name == "gallery.json" else []:
                check_covers(bank, gallery.shards, path.parent, command)
                check_gallery(bank, gallery)
        except BankError as error:
            yield str(error)
        else:
            yield ""


def _calibrations(bank: Bank) -> Iterator[str]:
    """Which calibrations are damaged."""
    try:
        stored_calibrations(bank)
    except BankError as error:
        yield str(error)
