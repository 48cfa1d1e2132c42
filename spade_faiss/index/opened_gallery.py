"""Opens a gallery index: its files are mapped, and what they hold is checked when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.arrays import map_arrays
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import check_file
from spade_faiss.core.types import Arrays
from spade_faiss.features.batch import Level
from spade_faiss.index.built_index import IndexFolder
from spade_faiss.index.gallery_files import SHARDS, by_level, encode_images, naming, read_trained
from spade_faiss.index.gallery_manifest import (
    EncodedShard,
    GalleryIndexManifest,
    indexed_levels,
)
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.levels import index_name
from spade_faiss.search.protocol import Pack, ResolvedRecipe, resolve_recipe
from spade_faiss.search.recipe import Recipe


@dataclass(frozen=True, eq=False)
class OpenedGallery:
    """A gallery index that was opened.

    Args:
        bank: the bank.
        resolved: the recipe, and its search method and settings.
        levels: the levels that it holds, by their names in it.
        trained: name of a level -> what was trained.
        files: sha256 of a shard -> the path and the checksum of the file that holds the encodings of its images.
        command: builds it anew.
        shards: the shards that it holds.
    """

    bank: Snapshot
    resolved: ResolvedRecipe
    levels: dict[str, Level]
    trained: dict[str, Arrays]
    files: dict[str, tuple[Path, str]]
    command: str
    shards: tuple[EncodedShard, ...]

    def read(self, level_name: str, number: int, position: int) -> Arrays | None:
        """Read the encoding of an image at the level of a name; None if its shard is not in the index.

        Raises:
            BankError: for a file that does not hold what the search method encodes.
        """
        shard = self.bank.manifest.shards[number]
        if (file := self.files.get(shard.sha256)) is None:
            return None
        mapped, encoded = map_arrays(*file), {}
        for name, stack in mapped.arrays.items():
            of, _, key = name.rpartition("/")
            if of != level_name:
                continue
            if stack.shape[:1] != (shard.count,):
                raise BankError(
                    f"{file[0]} is damaged: {name} is of shape {stack.shape}, expected {shard.count} images; "
                    f"rebuild it with: {self.command}"
                )
            encoded[key] = np.empty(stack.shape[1:], stack.dtype)
            mapped.read(name, position, encoded[key])
        if (check := self.resolved.method.check_encoded) is not None:
            with naming(file[0], level_name, self.command):
                check(self.levels[level_name], encoded, self.trained[level_name], self.resolved.build)
        return encoded

    def read_packs(self, level_name: str) -> list[Pack]:
        """Read what is packed at the level of a name, a pack for each file.

        Raises:
            BankError: for a file that does not hold what the search method packs.
        """
        bank, found = self.bank, []
        rows_of = {shard.sha256: bank.rows_of_shard(number) for number, shard in enumerate(bank.manifest.shards)}
        # Shards that are gone from the bank were compacted: none of their images is searched here.
        rows_of |= {shard.sha256: np.full(shard.count, -1, np.int64) for shard in self.shards if shard.sha256 not in rows_of}
        for file in dict.fromkeys(self.files.values()):
            mapped = map_arrays(*file)
            mapped.check_length()
            shards = str(mapped.attributes.get(SHARDS)).split("\n")
            arrays = by_level(mapped.arrays).get(level_name, {})
            if not set(shards) <= set(rows_of):
                raise BankError(
                    f"{file[0]} is damaged: it is of shards that the index does not hold; rebuild it with: {self.command}"
                )
            rows = np.concatenate([rows_of[sha256] for sha256 in shards])
            if (check := self.resolved.method.check_packed) is not None:
                with naming(file[0], level_name, self.command):
                    check(self.levels[level_name], arrays, self.trained[level_name], len(rows))
            found.append(Pack(rows, arrays))
        return found


def open_gallery(bank: Snapshot, recipe: Recipe, levels: Sequence[Level] = ()) -> OpenedGallery:
    """Open the gallery index of a bank, and check its files.

    Args:
        bank: the bank.
        recipe: the recipe.
        levels: the levels that will be searched; empty for each of the bank's levels.

    Raises:
        BankError: if it was not built, is damaged, was built with other settings, or does not hold one of the levels.
    """
    folder = IndexFolder(GalleryIndexManifest, bank, recipe.name)
    asked = [index_name(level, bank.layout.levels) for level in levels or bank.layout.levels]
    manifest = folder.read_for(recipe.with_levels([] if set(asked) <= set(indexed_levels(bank, ())) else asked))
    held = indexed_levels(bank, manifest.levels)
    if missing := [name for name in asked if name not in held]:
        command = folder.command(levels=[*held, *missing])
        raise BankError(f"index {folder.path} holds {', '.join(held)}, and not {missing[0]}; build it with: {command}")
    folder.check_shards(manifest)
    for entry in manifest.files:
        path = folder.files / entry.file
        check_file(path, entry, str(path), folder.manifest.name, f"rebuild it with: {folder.command(rebuild=True)}")
    folder.check_content(manifest.trained_file)  # all searches depend on it, and it is small
    resolved = resolve_recipe(recipe)
    path, rebuild = folder.files / manifest.trained_file.file, folder.command(rebuild=True)
    trained = read_trained(path, manifest.trained_file.sha256, held, resolved, rebuild)
    files = {shard.sha256: (folder.files / shard.file.file, shard.file.sha256) for shard in manifest.shards}
    return OpenedGallery(bank, resolved, held, trained, files, rebuild, manifest.shards)


def check_encodings(bank: Snapshot, recipe: Recipe) -> None:
    """Check the encodings of all images of a bank that its gallery index holds, at the levels that the recipe names.

    Raises:
        BankError: as `open_gallery` and `OpenedGallery.read`.
    """
    opened = open_gallery(bank, recipe, tuple(indexed_levels(bank, recipe.build.levels).values()))
    if opened.resolved.method.pack is not None:
        for name in opened.levels:
            opened.read_packs(name)
        return
    for number, shard in enumerate(bank.manifest.shards):
        for name in opened.levels:
            for position in range(shard.count):
                opened.read(name, number, position)


class EncodedLevel:
    """What a gallery index holds of one level, as `search.protocol.Encoded` describes it.

    Images that were added to the bank since the build are encoded when they are asked for, or, if images are packed, when the
    packs are.
    """

    def __init__(self, opened: OpenedGallery, level: Level, blocks: Blocks) -> None:
        self._opened = opened
        self._name = index_name(level, opened.bank.layout.levels)
        self._blocks = blocks
        self.trained = opened.trained.get(self._name, {})

    def __call__(self, row: int) -> Arrays:
        """Return the encoding of the map in a bank row."""
        bank, resolved = self._opened.bank, self._opened.resolved
        number, position = bank.locate(row)
        if (encoded := self._opened.read(self._name, number, position)) is not None:
            return encoded
        assert resolved.method.encode is not None
        return resolved.method.encode(self._blocks(row), self.trained, resolved.build)

    def packs(self) -> list[Pack]:
        """Return a pack for each file, and one for each shard of the bank that is in none."""
        bank, found = self._opened.bank, self._opened.read_packs(self._name)
        for number, shard in enumerate(bank.manifest.shards):
            rows = bank.rows_of_shard(number)
            if shard.sha256 not in self._opened.files and len(live := rows[rows >= 0]):
                found.append(Pack(live, self._pack(live.tolist())))
        return found

    def _pack(self, rows: list[int]) -> Arrays:
        resolved = self._opened.resolved
        packed = encode_images(resolved, {self._name: self._blocks}, {self._name: self.trained}, rows)
        return by_level(packed)[self._name]
