"""Encoding the shards of a bank for a gallery index, a file for each group: here, or wherever else the bank is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.arrays import write_arrays
from spade_faiss.core.files import FileEntry
from spade_faiss.index.gallery_files import encode_images, read_trained
from spade_faiss.index.gallery_manifest import indexed_levels
from spade_faiss.search.levels import open_checked_blocks
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """A group of shards whose encodings are one file.

    Args:
        shards: their numbers.
        count: how many images they hold.
        file: the name of the file.
        attributes: what the file says of itself.
    """

    shards: tuple[int, ...]
    count: int
    file: str
    attributes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class GalleryEncoding:
    """What the shards of a bank are encoded with.

    Args:
        bank: the bank as if nothing had been removed, so that images can be restored.
        recipe: the recipe, with the levels that it indexes.
        folder: where the files are.
        trained_file: what was trained.
        rebuild: the command that builds the index anew.
    """

    bank: Snapshot
    recipe: Recipe
    folder: Path
    trained_file: FileEntry
    rebuild: str

    def open(self) -> GroupEncoder:
        """Open the bank's maps and what was trained."""
        return GroupEncoder(self)


class GroupEncoder:
    """Encodes groups of shards.

    Args:
        encoding: what with.
    """

    def __init__(self, encoding: GalleryEncoding) -> None:
        levels = indexed_levels(encoding.bank, encoding.recipe.build.levels)
        self._encoding = encoding
        self._resolved = resolve_recipe(encoding.recipe)
        trained = encoding.trained_file
        self._trained = read_trained(encoding.folder / trained.file, trained.sha256, levels, self._resolved, encoding.rebuild)
        self._blocks = {name: open_checked_blocks(encoding.bank, level) for name, level in levels.items()}

    def encode(self, job: EncodeJob) -> FileEntry:
        """Write the file of a group, atomically.

        Raises:
            InputError: for a full disk.
            BankError: for maps that hold values that cannot be compared.
        """
        path, bank = self._encoding.folder / job.file, self._encoding.bank
        rows = np.concatenate([bank.rows_of_shard(number) for number in job.shards]).tolist()
        arrays = encode_images(self._resolved, self._blocks, self._trained, rows)
        return FileEntry.of(path, write_arrays(path, arrays, attributes=job.attributes))
