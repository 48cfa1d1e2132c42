"""What a method keeps beside the bank: one file of what was learned, one file for each shard. Built once, resumed, mapped."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.arrays import map_arrays, write_arrays
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, check_file, hash_file
from spade_faiss.core.signed_json import hash_json, read_signed, write_signed
from spade_faiss.core.types import Arrays
from spade_faiss.features.batch import Level
from spade_faiss.index.staleness import IndexedShard, check_covers, check_listed, index_folder, why_learn_anew
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.levels import open_blocks
from spade_faiss.search.protocol import ResolvedRecipe, resolve_recipe
from spade_faiss.search.recipe import Recipe, Settings

FORMAT = "spade_faiss gallery index"
SCHEMA = 2

_MANIFEST = "gallery.json"
_FOLDER = "gallery"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedShard(IndexedShard):
    """A shard whose images were encoded, all of them, and the file that holds what is kept of them."""

    file: FileEntry


@dataclass(frozen=True, kw_only=True)
class GalleryIndexManifest:
    """What is kept says of itself: the shards it covers, how it was built, its files and their checksums.

    `build` counts how often it was learned; it was learned from the first `trained` of its `shards`.
    """

    recipe: str
    gallery: str
    settings: Settings
    generation: int
    build: int
    trained: int
    trained_file: FileEntry
    shards: tuple[EncodedShard, ...]
    build_s: float
    faiss: str

    def __post_init__(self) -> None:
        check_listed(self.shards)
        if [file.file for file in self.files] != [_trained_name(self.build), *(_name(self.build, of) for of in self.shards)]:
            raise InputError(f"build {self.build} names the files {[file.file for file in self.files]}")

    @property
    def count(self) -> int:
        """Images that were encoded."""
        return sum(shard.count for shard in self.shards)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files."""
        return (self.trained_file, *(shard.file for shard in self.shards))

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


def build_gallery(
    bank: Bank, recipe: Recipe, *, rebuild: bool = False, progress: bool = False
) -> tuple[GalleryIndexManifest, str]:
    """Train on a sample of the bank and encode all its images. What is there already and fits is kept: a build that was
    interrupted goes on, and after images were added only theirs are encoded, with what was learned before.

    Args:
        bank: the bank, not empty.
        recipe: one whose method keeps something.
        rebuild: learn anew and encode everything again.
        progress: show a bar on stderr if that is a terminal.

    Returns:
        What is kept says of itself, and what was done, in words.

    Raises:
        InputError: for an empty bank, settings that do not fit it, or a full disk.
    """
    if len(bank) == 0:
        raise InputError(f"the bank {bank.path} is empty; extract images first")
    start = time.perf_counter()
    chosen = resolve_recipe(recipe)
    folder = index_folder(bank, recipe) / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    before = _known(bank, folder.parent)
    why = "asked for" if rebuild else _why_anew(bank, recipe, chosen, before)
    keep = None if why else before
    build = keep.build if keep else _next_build(folder, before, rebuild)
    held = {entry.file: entry.sha256 for entry in keep.files} if keep else {}

    trained_entry = _trained_entry(bank, recipe, chosen, folder / _trained_name(build), held)
    trained = _by_level(map_arrays(folder / trained_entry.file, trained_entry.sha256).arrays)
    kept, encoded = [], 0
    # All images of a shard, removed ones too: so that they may come back.
    everything = bank.with_removed()
    levels = {level.name: open_blocks(everything, level) for level in bank.layout.levels}
    with tqdm(total=len(everything), desc="index maps", unit="img", disable=None if progress else True) as bar:
        for number, shard in enumerate(bank.manifest.shards):
            path = folder / _name(build, IndexedShard(sha256=shard.sha256, count=shard.count))
            of = hash_json({"trained": trained_entry.sha256, "shard": shard.sha256})
            if (entry := _entry_of(path, of, held)) is None:
                arrays = _encode(chosen, levels, trained, everything.rows_of_shard(number).tolist(), bar)
                entry = FileEntry.of(path, write_arrays(path, arrays, attributes={"made_of": of}))
                encoded += shard.count
            else:
                bar.update(shard.count)
            kept.append(EncodedShard(sha256=shard.sha256, count=shard.count, file=entry))
    # What it was learned from stands first, so that `trained` can count it; shards that are gone since are not among them.
    first = {shard.sha256 for shard in (keep.shards[: keep.trained] if keep else kept)}
    shards = tuple(sorted(kept, key=lambda shard: shard.sha256 not in first))
    if keep and not encoded and trained_entry.sha256 == keep.trained_file.sha256 and len(shards) == len(keep.shards):
        return keep, "is up to date"
    manifest = GalleryIndexManifest(
        recipe=recipe.name,
        gallery=recipe.build.gallery,
        settings=asdict(chosen.build),
        generation=bank.generation,
        build=build,
        trained=sum(shard.sha256 in first for shard in shards),
        trained_file=trained_entry,
        shards=shards,
        build_s=time.perf_counter() - start,
        faiss=import_faiss().__version__,
    )
    write_signed(folder.parent / _MANIFEST, FORMAT, SCHEMA, asdict(manifest))
    _sweep(bank, folder, {entry.file for entry in manifest.files})
    return manifest, f"added {encoded} images to it" if keep else f"built anew: {why}" if before else "built"


def _trained_name(build: int) -> str:
    return f"trained-{build:03d}.h5"


def _name(build: int, shard: IndexedShard) -> str:
    """The file of what is kept of a shard."""
    return f"{build:03d}-{shard.sha256[:16]}.h5"


def _next_build(folder: Path, before: GalleryIndexManifest | None, rebuild: bool) -> int:
    """The number of a build that begins, or goes on where it was interrupted: nothing of another one passes for its own."""
    if before is not None:
        return before.build + 1
    builds = [int(path.stem[-3:]) for path in folder.glob("trained-[0-9][0-9][0-9].h5")]
    unreadable = (folder.parent / _MANIFEST).exists()
    return max(builds, default=-1) + 1 if rebuild or unreadable else max(builds, default=0)


def _why_anew(bank: Snapshot, recipe: Recipe, chosen: ResolvedRecipe, before: GalleryIndexManifest | None) -> str | None:
    """Why what is kept is of no more use; None where it is, or where there is nothing."""
    if before is None:
        return None
    asked = recipe.build.gallery, asdict(chosen.build)
    if (before.gallery, before.settings) != asked:
        return f"it was {before.gallery} {before.settings}, the recipe says {asked[0]} {asked[1]}"
    return why_learn_anew(bank, before.shards, before.trained)


def _trained_entry(bank: Snapshot, recipe: Recipe, chosen: ResolvedRecipe, path: Path, held: dict[str, str]) -> FileEntry:
    """The file of what is learned; made where it is not there."""
    how = hash_json(
        {"schema": SCHEMA, "gallery": recipe.build.gallery, "settings": asdict(chosen.build), "layout": asdict(bank.layout)}
    )
    if (entry := _entry_of(path, how, held)) is not None:
        return entry
    assert chosen.method.train is not None
    arrays = {
        f"{level.name}/{key}": array
        for level in bank.layout.levels
        for key, array in chosen.method.train(open_blocks(bank, level), chosen.build).items()
    }
    return FileEntry.of(path, write_arrays(path, arrays, attributes={"made_of": how}))


def _sweep(bank: Bank, folder: Path, named: set[str]) -> None:
    """Delete files that are of no more use, unless somebody may still read them."""
    if not bank.readers():
        for path in folder.glob("*.h5"):
            if path.name not in named:
                path.unlink()


class EncodedLevel:
    """What is kept of one level; an image that was added since the build is encoded when it is met. See `gallery.Encoded`."""

    def __init__(self, opened: _Opened, level: Level, blocks: Blocks) -> None:
        self._opened = opened
        self._name = level.name
        self._blocks = blocks
        self.trained = opened.trained.get(level.name, {})

    def __call__(self, row: int) -> Arrays:
        """What is kept of a bank row's map."""
        number, position = self._opened.bank.locate(row)
        if (file := self._opened.files.get(self._opened.bank.manifest.shards[number].sha256)) is not None:
            mapped = map_arrays(*file)
            kept: Arrays = {}
            for name, stack in mapped.arrays.items():
                level, key = name.rsplit("/", 1)
                if level == self._name:
                    kept[key] = np.empty(stack.shape[1:], stack.dtype)
                    mapped.read(name, position, kept[key])
            return kept
        chosen = self._opened.chosen
        assert chosen.method.encode is not None
        return chosen.method.encode(self._blocks(row), self.trained, chosen.build)


@dataclass(frozen=True, eq=False)
class _Opened:
    bank: Snapshot
    chosen: ResolvedRecipe
    trained: dict[str, Arrays]
    files: dict[str, tuple[Path, str]]


def open_gallery(bank: Snapshot, recipe: Recipe) -> _Opened:
    """What was built for a bank and recipe, checked.

    Raises:
        BankError: if it was not built, is damaged, or belongs to another bank or to other settings.
    """
    folder = index_folder(bank, recipe)
    command = f"spade-faiss index {bank.path} --recipe {recipe.name}"
    if not (folder / _MANIFEST).is_file():
        raise BankError(f"the bank {bank.path} has no index {recipe.name!r} of its maps; build it with: {command}")
    manifest = _read(folder, command)
    chosen = resolve_recipe(recipe)
    for name, found, wanted in (
        ("gallery", manifest.gallery, recipe.build.gallery),
        ("settings", manifest.settings, asdict(chosen.build)),
    ):
        if found != wanted:
            raise BankError(f"index {folder} was built with {name} {found}, the recipe says {wanted}; run: {command}")
    check_covers(bank, manifest.shards, folder, command)
    for entry in manifest.files:
        path = folder / _FOLDER / entry.file
        check_file(path, entry, str(path), _MANIFEST, f"rebuild it with: {command} --rebuild")
    trained = folder / _FOLDER / manifest.trained_file.file
    if hash_file(trained) != manifest.trained_file.sha256:  # all searches rest on it, and it is small
        raise BankError(f"{trained} has changed since it was written; rebuild it with: {command} --rebuild")
    return _Opened(
        bank,
        chosen,
        _by_level(map_arrays(trained, manifest.trained_file.sha256).arrays),
        {shard.sha256: (folder / _FOLDER / shard.file.file, shard.file.sha256) for shard in manifest.shards},
    )


def built_galleries(bank: Snapshot, recipe: str = "*") -> list[GalleryIndexManifest]:
    """What everything that was built over the bank's maps, or for one recipe, says of itself."""
    folders = sorted(path.parent for path in (bank.path / "indexes").glob(f"{recipe}/{_MANIFEST}"))
    return [_read(folder, _command(bank, folder)) for folder in folders]


def check_gallery(bank: Snapshot, manifest: GalleryIndexManifest) -> None:
    """Raise BankError if a file that is kept is not the one that was written; all of them are read in full."""
    folder = bank.path / "indexes" / manifest.recipe / _FOLDER
    for entry in manifest.files:
        if not (path := folder / entry.file).is_file() or hash_file(path) != entry.sha256:
            command = f"spade-faiss index {bank.path} --recipe {manifest.recipe} --rebuild"
            raise BankError(f"{path} is missing or has changed since it was written; rebuild it with: {command}")


def _encode(
    chosen: ResolvedRecipe, levels: dict[str, Blocks], trained: dict[str, Arrays], rows: Sequence[int], bar: Any
) -> Arrays:
    """The encoded images of a shard, stacked."""
    assert chosen.method.encode is not None
    stacks: Arrays = {}
    for position, row in enumerate(rows):
        for name, blocks in levels.items():
            for key, array in chosen.method.encode(blocks(row), trained.get(name, {}), chosen.build).items():
                stack = stacks.setdefault(f"{name}/{key}", np.empty((len(rows), *array.shape), array.dtype))
                stack[position] = array
            blocks.release(row)
        bar.update()
    return stacks


def _by_level(arrays: Arrays) -> dict[str, Arrays]:
    by_level: dict[str, Arrays] = {}
    for name, array in arrays.items():
        level, key = name.rsplit("/", 1)
        by_level.setdefault(level, {})[key] = array
    return by_level


def _known(bank: Snapshot, folder: Path) -> GalleryIndexManifest | None:
    """What is there says of itself; None where there is nothing to be read."""
    try:
        return _read(folder, _command(bank, folder)) if (folder / _MANIFEST).is_file() else None
    except BankError as error:
        _log.warning("%s", error)
        return None


def _command(bank: Snapshot, folder: Path) -> str:
    return f"spade-faiss index {bank.path} --recipe {folder.name}"


def _read(folder: Path, command: str) -> GalleryIndexManifest:
    return read_signed(folder / _MANIFEST, GalleryIndexManifest, FORMAT, SCHEMA, f"rebuild the index with: {command}")


def _entry_of(path: Path, made_of: str, known: dict[str, str]) -> FileEntry | None:
    """The entry of a file that is there, is the one that was written, and was made of that; else None."""
    if not path.is_file():
        return None
    digest = hash_file(path)
    if known.get(path.name, digest) != digest:
        _log.warning("%s is damaged (it has changed since it was written) and is made again", path)
        return None
    try:
        if map_arrays(path, digest).attributes.get("made_of") != made_of:
            return None
    except BankError as error:
        _log.warning("%s; it is made again", error)
        return None
    return FileEntry.of(path, digest)
