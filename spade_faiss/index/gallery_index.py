"""The gallery index: what a search method trained on a bank's maps and encoded of each, built beside the bank and mapped."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.shards import ShardEntry
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.arrays import Mapped, map_arrays, write_arrays
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, check_file, hash_file
from spade_faiss.core.hints import index_command
from spade_faiss.core.inside import is_regular
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.schema import shorten
from spade_faiss.core.signed_json import hash_json
from spade_faiss.core.types import Arrays
from spade_faiss.features.batch import Level
from spade_faiss.index.built_index import REBUILD_ASKED_FOR, UP_TO_DATE, BuiltIndex, IndexFolder, check_not_empty, outcome
from spade_faiss.index.staleness import IndexedShard, why_train_anew
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.levels import index_name, open_checked_blocks, searched_levels
from spade_faiss.search.protocol import Pack, ResolvedRecipe, resolve_recipe
from spade_faiss.search.recipe import Recipe, Settings

# The attribute of a file that says what it was made of: an interrupted build goes on with the files that were made of the same.
_MADE_OF = "made_of"
# The attribute of a file of encodings that lists the checksums of its shards, in the order of their images.
_SHARDS = "shards"
# How many vectors of a level are packed together, about.
_PACKED_VECTORS = 1 << 22

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedShard(IndexedShard):
    """A shard whose images were encoded, removed ones included, and the file that holds their encodings.

    Shards whose images are packed together have one file.
    """

    file: FileEntry


@dataclass(frozen=True, kw_only=True)
class GalleryIndexManifest(BuiltIndex):
    """The manifest of a gallery index.

    Args:
        gallery: the name of the search method.
        settings: its build settings, with the defaults written out.
        levels: the levels that it holds, by `search.levels.index_name`; empty for each of the bank's levels.
        trained_file: the record of the file that holds what was trained.
        build_s: the seconds that the last build took.
    """

    FORMAT: ClassVar[str] = "spade_faiss gallery index"
    SCHEMA: ClassVar[int] = 2
    MANIFEST: ClassVar[str] = "gallery.json"
    FOLDER: ClassVar[str] = "gallery"
    SUFFIX: ClassVar[str] = ".h5"
    SUBJECT: ClassVar[str] = "maps"

    shards: tuple[EncodedShard, ...]
    gallery: str
    settings: Settings
    trained_file: FileEntry
    build_s: float
    levels: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The records of all files."""
        return (self.trained_file, *dict.fromkeys(shard.file for shard in self.shards))

    @property
    def groups(self) -> list[list[str]]:
        """The checksums of the shards of each file of encodings."""
        groups: dict[str, list[str]] = {}
        for shard in self.shards:
            groups.setdefault(shard.file.file, []).append(shard.sha256)
        return list(groups.values())

    def file_names(self) -> list[str]:
        """Return the names that the files of this build must have."""
        return [_trained_name(self.build), *(_encoded_name(self.build, group) for group in self.groups)]

    @staticmethod
    def settings_of(recipe: Recipe) -> Mapping[str, object]:
        """Return the settings that a recipe asks for."""
        return {"gallery": recipe.build.gallery, "settings": asdict(resolve_recipe(recipe).build)}


def build_gallery(
    bank: Bank, recipe: Recipe, *, rebuild: bool = False, progress: bool = False
) -> tuple[GalleryIndexManifest, str]:
    """Bring a recipe's gallery index up to date with a bank: train on a sample of its maps, and encode all of them.

    What is there already and fits is kept: an interrupted build goes on, and if images were added, only they are encoded, with
    what was trained before. The index is built anew if it was built with other settings or for other levels, or if its training
    does not fit the bank any more. It keeps its levels if the recipe names none.

    Args:
        bank: the bank, not empty.
        recipe: a recipe whose search method has a gallery index.
        rebuild: build it anew in any case.
        progress: show a bar on stderr if that is a terminal.

    Returns:
        Its manifest, and what was done, in words.

    Raises:
        InputError: for an empty bank, settings or levels that do not fit it, or a full disk.
    """
    check_not_empty(bank)
    start = time.perf_counter()
    folder = IndexFolder(GalleryIndexManifest, bank, recipe.name)
    folder.files.mkdir(parents=True, exist_ok=True)
    before = folder.read_if_usable()
    # `index BANK --recipe NAME` adds images, whichever levels the index was built for.
    named = recipe.build.levels or (before.levels if before else ())
    recipe = replace(recipe, build=replace(recipe.build, levels=_level_names(bank, named)))
    why_anew = REBUILD_ASKED_FOR if rebuild else _why_anew(bank, recipe, before)
    kept = None if why_anew else before
    build = _Build(bank, recipe, folder.files, kept.build if kept else _next_build(folder, before, rebuild), kept)
    trained_file = build.train()
    shards, added = build.encode(trained_file, progress)
    # The shards of the training stand first, so that `trained` can count them; those that are gone from the bank are left out.
    first = {shard.sha256 for shard in (kept.shards[: kept.trained] if kept else shards)}
    shards.sort(key=lambda shard: shard.sha256 not in first)
    if kept and not added and trained_file.sha256 == kept.trained_file.sha256 and len(shards) == len(kept.shards):
        return kept, UP_TO_DATE
    manifest = GalleryIndexManifest(
        recipe=recipe.name,
        generation=bank.generation,
        build=build.number,
        trained=sum(shard.sha256 in first for shard in shards),
        shards=tuple(shards),
        faiss=import_faiss().__version__,
        gallery=recipe.build.gallery,
        settings=asdict(build.resolved.build),
        levels=recipe.build.levels,
        trained_file=trained_file,
        build_s=time.perf_counter() - start,
    )
    folder.write(manifest)
    if not bank.readers():  # they map the files of the build that they opened
        folder.sweep(manifest)
    return manifest, outcome(before, why_anew, added)


class _Build:
    """One build: makes the files that are missing, and keeps those that were made of the same.

    Args:
        bank: the bank.
        recipe: the recipe.
        folder: where the files are.
        number: the number of the build, which is part of their names.
        kept: the index that is added to; None for a build that begins.
    """

    def __init__(self, bank: Bank, recipe: Recipe, folder: Path, number: int, kept: GalleryIndexManifest | None) -> None:
        self.number = number
        self.resolved = resolve_recipe(recipe)
        self._bank = bank
        self._recipe = recipe
        self._folder = folder
        self._levels = _indexed_levels(bank, recipe.build.levels)
        self._rebuild = index_command(bank.path, recipe.name, rebuild=True)
        self._recorded = {entry.file: entry.sha256 for entry in kept.files} if kept else {}
        self._groups = kept.groups if kept else []

    def train(self) -> FileEntry:
        """Return the file of what is trained, and make it if it is missing."""
        path = self._folder / _trained_name(self.number)
        made_of = hash_json(
            {
                "schema": GalleryIndexManifest.SCHEMA,
                "gallery": self._recipe.build.gallery,
                "settings": asdict(self.resolved.build),
                "layout": asdict(self._bank.layout),
                # Only where they are not the bank's own: indexes from before levels could be chosen are still good.
                **({"levels": self._recipe.build.levels} if self._recipe.build.levels else {}),
            }
        )
        if (entry := self._usable(path, made_of)) is not None:
            return entry
        train = self.resolved.method.train
        assert train is not None
        arrays = {
            f"{name}/{key}": array
            for name, level in self._levels.items()
            for key, array in train(open_checked_blocks(self._bank, level), self.resolved.build).items()
        }
        return FileEntry.of(path, write_arrays(path, arrays, attributes={_MADE_OF: made_of}))

    def encode(self, trained_file: FileEntry, progress: bool) -> tuple[list[EncodedShard], int]:
        """Return the files of all shards, and the number of images that were encoded because their file was missing."""
        trained = _read_trained(
            self._folder / trained_file.file, trained_file.sha256, self._levels, self.resolved, self._rebuild
        )
        # All images, removed ones too, so that they can be restored.
        everything = self._bank.with_removed()
        blocks = {name: open_checked_blocks(everything, level) for name, level in self._levels.items()}
        shards, added = [], 0
        with progress_bar(len(everything), "index maps", progress) as bar:
            for group in self._grouped():
                sha256 = [shard.sha256 for _, shard in group]
                path, count = self._folder / _encoded_name(self.number, sha256), sum(shard.count for _, shard in group)
                together = {"shard": sha256[0]} if len(group) == 1 else {"shards": sha256}
                made_of = hash_json({"trained": trained_file.sha256, **together})
                if (entry := self._usable(path, made_of)) is None:
                    rows = np.concatenate([everything.rows_of_shard(number) for number, _ in group]).tolist()
                    arrays = _encode(self.resolved, blocks, trained, rows, bar)
                    attributes = {_MADE_OF: made_of, _SHARDS: "\n".join(sha256)}
                    entry = FileEntry.of(path, write_arrays(path, arrays, attributes=attributes))
                    added += count
                else:
                    bar.update(count)
                shards += [EncodedShard(sha256=shard.sha256, count=shard.count, file=entry) for _, shard in group]
        return shards, added

    def _grouped(self) -> list[list[tuple[int, ShardEntry]]]:
        """Return the bank's shards, with their numbers, by the file that holds their encodings.

        Images that are packed are searched faster in fewer, longer lists, but what one file holds is in memory when it is made.
        A file stays as it is as long as all of its shards are in the bank.
        """
        rest = {shard.sha256: (number, shard) for number, shard in enumerate(self._bank.manifest.shards)}
        if self.resolved.method.pack is None:
            return [[found] for found in rest.values()]
        groups = [[rest.pop(sha256) for sha256 in group] for group in self._groups if rest.keys() >= set(group)]
        most = _PACKED_VECTORS // max(level.height * level.width for level in self._levels.values())
        begun = 0
        for found in rest.values():
            if not begun or begun + found[1].count > most:
                groups.append([])
                begun = 0
            groups[-1].append(found)
            begun += found[1].count
        return groups

    def _usable(self, path: Path, made_of: str) -> FileEntry | None:
        """Return the record of a file that exists, is undamaged, and was made of the same; None otherwise."""
        if not is_regular(path):
            return None
        digest = hash_file(path)
        if self._recorded.get(path.name, digest) != digest:
            _log.warning("%s is damaged (it has changed since it was written) and is made again", path)
            return None
        try:
            if map_arrays(path, digest).attributes.get(_MADE_OF) != made_of:
                return None
            if path.name == _trained_name(self.number):
                _read_trained(path, digest, self._levels, self.resolved, self._rebuild)
        except BankError as error:
            _log.warning("%s; it is made again", error)
            return None
        return FileEntry.of(path, digest)


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
            with _naming(file[0], level_name, self.command):
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
            shards = str(mapped.attributes.get(_SHARDS)).split("\n")
            arrays = _by_level(mapped.arrays).get(level_name, {})
            if not set(shards) <= set(rows_of):
                raise BankError(
                    f"{file[0]} is damaged: it is of shards that the index does not hold; rebuild it with: {self.command}"
                )
            rows = np.concatenate([rows_of[sha256] for sha256 in shards])
            if (check := self.resolved.method.check_packed) is not None:
                with _naming(file[0], level_name, self.command):
                    check(self.levels[level_name], arrays, self.trained[level_name], len(rows))
            found.append(Pack(rows, arrays, partial(_place, mapped, level_name)))
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
    manifest = folder.read_for(recipe.with_levels([] if set(asked) <= set(_indexed_levels(bank, ())) else asked))
    held = _indexed_levels(bank, manifest.levels)
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
    trained = _read_trained(path, manifest.trained_file.sha256, held, resolved, rebuild)
    files = {shard.sha256: (folder.files / shard.file.file, shard.file.sha256) for shard in manifest.shards}
    return OpenedGallery(bank, resolved, held, trained, files, rebuild, manifest.shards)


def check_encodings(bank: Snapshot, recipe: Recipe) -> None:
    """Check the encodings of all images of a bank that its gallery index holds.

    Raises:
        BankError: as `open_gallery` and `OpenedGallery.read`.
    """
    opened = open_gallery(bank, recipe)
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
        packed = _encode(resolved, {self._name: self._blocks}, {self._name: self.trained}, rows)
        return _by_level(packed)[self._name]


def _place(mapped: Mapped, level: str, name: str) -> tuple[Path, int]:
    return mapped.place(f"{level}/{name}")


def _trained_name(build: int) -> str:
    return f"trained-{build:03d}.h5"


def _encoded_name(build: int, shards: Sequence[str]) -> str:
    """The name of the file with the encodings of shards that have these checksums."""
    return f"{build:03d}-{(shards[0] if len(shards) == 1 else hash_json({'shards': sorted(shards)}))[:16]}.h5"


def _indexed_levels(bank: Snapshot, names: Sequence[str]) -> dict[str, Level]:
    """The levels that an index of these `levels` holds, by their names in it."""
    levels = bank.layout.levels
    return {index_name(level, levels): level for level in searched_levels(levels, "mean", names)}


def _level_names(bank: Snapshot, names: Sequence[str]) -> tuple[str, ...]:
    """The `levels` of an index's manifest, for levels that were named in any way."""
    levels = tuple(_indexed_levels(bank, names))
    return () if levels == tuple(_indexed_levels(bank, ())) else levels


def _next_build(folder: IndexFolder[GalleryIndexManifest], before: GalleryIndexManifest | None, rebuild: bool) -> int:
    """Return the number of a build that begins, or that goes on where it was interrupted.

    A new number keeps the files of another build from being taken for its own.
    """
    if before is not None:
        return before.build + 1
    builds = [int(path.stem[-3:]) for path in folder.files.glob("trained-[0-9][0-9][0-9].h5")]
    is_unreadable = is_regular(folder.manifest)
    return max(builds, default=-1) + 1 if rebuild or is_unreadable else max(builds, default=0)


def _why_anew(bank: Snapshot, recipe: Recipe, before: GalleryIndexManifest | None) -> str | None:
    """Say why the index that is there cannot be added to; None if it can, or if there is none."""
    if before is None:
        return None
    if difference := before.difference(recipe):
        return f"it {difference}"
    if before.levels != (wanted := recipe.build.levels):
        held, named = (", ".join(_indexed_levels(bank, names)) for names in (before.levels, wanted))
        return f"it was built for {held}, asked for are {named}"
    return why_train_anew(bank, before.shards, before.trained)


def _encode(
    resolved: ResolvedRecipe, blocks: dict[str, Blocks], trained: dict[str, Arrays], rows: Sequence[int], bar: Any = None
) -> Arrays:
    """Encode the images of a shard; each array is stacked over them, or all are packed."""
    assert resolved.method.encode is not None
    stacks: Arrays = {}
    for position, row in enumerate(rows):
        for name, of_level in blocks.items():
            for key, array in resolved.method.encode(of_level(row), trained.get(name, {}), resolved.build).items():
                stack = stacks.setdefault(f"{name}/{key}", np.empty((len(rows), *array.shape), array.dtype))
                stack[position] = array
            of_level.release(row)
        if bar is not None:
            bar.update()
    if (pack := resolved.method.pack) is None:
        return stacks
    return {
        f"{name}/{key}": array
        for name, stacked in _by_level(stacks).items()
        for key, array in pack(stacked, trained[name], resolved.build).items()
    }


def _by_level(arrays: Arrays) -> dict[str, Arrays]:
    """Sort arrays named `level/key` by their level."""
    by_level: dict[str, Arrays] = {}
    for name, array in arrays.items():
        level, _, key = name.rpartition("/")
        by_level.setdefault(level, {})[key] = array
    return by_level


def _read_trained(
    path: Path, sha256: str, levels: Mapping[str, Level], resolved: ResolvedRecipe, command: str
) -> dict[str, Arrays]:
    """Read what was trained, by level. `command` builds it anew.

    Raises:
        BankError: if it is not what the recipe's search method trains on these levels.
    """
    by_level: dict[str, Arrays] = {name: {} for name in levels}
    for name, array in map_arrays(path, sha256).arrays.items():
        level_name, _, key = name.rpartition("/")
        if level_name not in by_level:
            raise BankError(f"{path} is damaged: it holds {shorten(name)}, which is of no level; rebuild it with: {command}")
        by_level[level_name][key] = array
    if (check := resolved.method.check_trained) is not None:
        for name, level in levels.items():
            with _naming(path, name, command):
                check(level, by_level[name], resolved.build)
    return by_level


@contextmanager
def _naming(path: Path, level_name: str, command: str) -> Iterator[None]:
    """Turn what a search method says about arrays into an error that names their file."""
    try:
        yield
    except InputError as error:
        raise BankError(f"{path} is damaged: level {level_name!r}: {error}; rebuild it with: {command}") from error
