"""What a method keeps beside the bank: one file of what was learned, one file for each shard. Built once, resumed, mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from spade_faiss.arrays import Arrays, map_arrays, write_arrays
from spade_faiss.bank import Bank
from spade_faiss.config import from_mapping
from spade_faiss.errors import BankError, InputError
from spade_faiss.features import FloatArray, Level
from spade_faiss.files import FileEntry, atomic_path, check_file, hash_file
from spade_faiss.gallery import Chosen, find_method
from spade_faiss.gallery.blocks import Blocks
from spade_faiss.image_index import index_folder
from spade_faiss.recipe import Recipe, Settings

FORMAT = "spade_faiss gallery index"
SCHEMA = 1

_DESCRIPTION = "gallery.json"
_FOLDER = "gallery"
_TRAINED = "trained.h5"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is kept says of itself: the state of the bank it covers, how it was built, its files and their checksums."""

    format: str
    schema: int
    recipe: str
    gallery: str
    settings: Settings
    generation: int
    count: int
    shards: tuple[str, ...]
    trained: FileEntry
    files: tuple[FileEntry, ...]
    build_s: float
    faiss: str

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return self.trained.bytes + sum(file.bytes for file in self.files)


def build_gallery(bank: Bank, recipe: Recipe, *, rebuild: bool = False, progress: bool = False) -> Description:
    """Train on a sample of the bank and encode all its images. What is there already and fits is kept: a build that was
    interrupted goes on, and after images were added only theirs are encoded, with what was learned before.

    Args:
        bank: the bank, not empty.
        recipe: one whose method keeps something.
        rebuild: learn anew and encode everything again.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        InputError: for an empty bank, settings that do not fit it, or a full disk.
    """
    if len(bank) == 0:
        raise InputError(f"the bank {bank.path} is empty; extract images first")
    start = time.perf_counter()
    chosen = find_method(recipe)
    folder = index_folder(bank, recipe) / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if rebuild:
        for path in (folder.parent / _DESCRIPTION, *folder.glob("*.h5")):
            path.unlink(missing_ok=True)
    how = _hash(
        {"schema": SCHEMA, "gallery": recipe.build.gallery, "settings": asdict(chosen.build), "layout": asdict(bank.layout)}
    )
    levels = {level.name: _blocks(bank, level) for level in bank.layout.levels}

    trained_file = folder / _TRAINED
    known = _known(folder.parent)
    trained_entry = _entry_of(trained_file, how, known)
    if trained_entry is None:
        assert chosen.method.train is not None
        arrays = {
            f"{name}/{key}": array
            for name, blocks in levels.items()
            for key, array in chosen.method.train(blocks, chosen.build).items()
        }
        # Files made with other settings do not belong to the recipe any more: the old description must not name them.
        (folder.parent / _DESCRIPTION).unlink(missing_ok=True)
        trained_entry = FileEntry.of(trained_file, write_arrays(trained_file, arrays, attributes={"made_of": how}, strings={}))
    trained = _by_level(map_arrays(trained_file, trained_entry.sha256).arrays)
    files = []
    with tqdm(total=len(bank), desc="index maps", unit="img", disable=None if progress else True) as bar:
        row = 0
        for number, shard in enumerate(bank.manifest.shards):
            path = folder / _shard_file(number)
            of = _hash({"trained": trained_entry.sha256, "shard": shard.sha256})
            entry = _entry_of(path, of, known)
            if entry is None:
                arrays = _encode(chosen, levels, trained, range(row, row + shard.count), bar)
                entry = FileEntry.of(path, write_arrays(path, arrays, attributes={"made_of": of}, strings={}))
            else:
                bar.update(shard.count)
            files.append(entry)
            row += shard.count
    import faiss

    description = Description(
        format=FORMAT,
        schema=SCHEMA,
        recipe=recipe.name,
        gallery=recipe.build.gallery,
        settings=asdict(chosen.build),
        generation=bank.generation,
        count=len(bank),
        shards=tuple(shard.sha256 for shard in bank.manifest.shards),
        trained=trained_entry,
        files=tuple(files),
        build_s=time.perf_counter() - start,
        faiss=faiss.__version__,
    )
    with atomic_path(folder.parent / _DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(asdict(description), indent=1) + "\n", encoding="utf-8")
    return description


class KeptLevel:
    """What is kept of one level; an image that was added since the build is encoded when it is met. See `gallery.Kept`."""

    def __init__(self, opened: _Opened, level: Level, blocks: Blocks) -> None:
        self._opened = opened
        self._name = level.name
        self._blocks = blocks
        self.trained = opened.trained.get(level.name, {})

    def __call__(self, row: int) -> Arrays:
        """What is kept of a bank row's map."""
        shard, position = self._opened.bank.locate(row)
        if shard < len(self._opened.files):
            mapped = map_arrays(*self._opened.files[shard])
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
    bank: Bank
    chosen: Chosen
    trained: dict[str, Arrays]
    files: list[tuple[Path, str]]


def open_gallery(bank: Bank, recipe: Recipe) -> _Opened:
    """What was built for a bank and recipe, checked.

    Raises:
        BankError: if it was not built, is damaged, or belongs to another bank or to other settings.
    """
    folder = index_folder(bank, recipe)
    command = f"spade-faiss index {bank.path} --recipe {recipe.name}"
    if not (folder / _DESCRIPTION).is_file():
        raise BankError(f"the bank {bank.path} has no index {recipe.name!r} of its maps; build it with: {command}")
    description = read_description(folder, command)
    chosen = find_method(recipe)
    for name, found, wanted in (
        ("gallery", description.gallery, recipe.build.gallery),
        ("settings", description.settings, asdict(chosen.build)),
    ):
        if found != wanted:
            raise BankError(f"index {folder} was built with {name} {found}, the recipe says {wanted}; run: {command}")
    held = tuple(shard.sha256 for shard in bank.manifest.shards)
    if held[: len(description.shards)] != description.shards or len(description.files) != len(description.shards):
        raise BankError(f"index {folder} was built from other shards than the bank now holds; run: {command}")
    names = [description.trained.file, *(entry.file for entry in description.files)]
    count = sum(shard.count for shard in bank.manifest.shards[: len(description.shards)])
    if names != [_TRAINED, *map(_shard_file, range(len(description.files)))] or description.count != count:
        raise BankError(
            f"{folder / _DESCRIPTION} says count={description.count} and files {names}, its shards hold {count} images; "
            f"rebuild the index with: {command} --rebuild"
        )
    for entry in (description.trained, *description.files):
        path = folder / _FOLDER / entry.file
        check_file(path, entry, str(path), _DESCRIPTION, f"rebuild it with: {command} --rebuild")
    return _Opened(
        bank,
        chosen,
        _by_level(map_arrays(folder / _FOLDER / description.trained.file, description.trained.sha256).arrays),
        [(folder / _FOLDER / entry.file, entry.sha256) for entry in description.files],
    )


def read_description(folder: Path, command: str) -> Description:
    """What is kept in an index's folder says of itself.

    Raises:
        BankError: if it is damaged, or of another version.
    """
    path = folder / _DESCRIPTION
    try:
        description = from_mapping(Description, json.loads(path.read_bytes()), str(path))
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is damaged ({error}); rebuild the index with: {command}") from error
    if (description.format, description.schema) != (FORMAT, SCHEMA):
        raise BankError(f"{path} has schema {description.schema}, this version reads {SCHEMA}; rebuild it with: {command}")
    return description


def built_galleries(bank: Bank) -> list[Description]:
    """What everything that was built over the bank's maps says of itself."""
    folders = sorted(path.parent for path in (bank.path / "indexes").glob(f"*/{_DESCRIPTION}"))
    return [read_description(folder, f"spade-faiss index {bank.path} --recipe {folder.name}") for folder in folders]


def _encode(chosen: Chosen, levels: dict[str, Blocks], trained: dict[str, Arrays], rows: range, bar: Any) -> Arrays:
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


def _blocks(bank: Bank, level: Level) -> Blocks:
    def read(row: int) -> FloatArray:
        return bank.level_map(level.name, row).reshape(-1, level.channels).astype(np.float32, copy=False)

    return Blocks(level, len(bank), read, release=lambda row: bank.release_map(level.name, row))


def _by_level(arrays: Arrays) -> dict[str, Arrays]:
    by_level: dict[str, Arrays] = {}
    for name, array in arrays.items():
        level, key = name.rsplit("/", 1)
        by_level.setdefault(level, {})[key] = array
    return by_level


def _shard_file(number: int) -> str:
    return f"{number:06d}.h5"


def _known(folder: Path) -> dict[str, str]:
    """The checksums of the files that an index's description names; none where it cannot be read."""
    try:
        description = read_description(folder, "")
    except (BankError, OSError):
        return {}
    return {entry.file: entry.sha256 for entry in (description.trained, *description.files)}


def _entry_of(path: Path, made_of: str, known: dict[str, str]) -> FileEntry | None:
    """The entry of a file that is there, is the one that was written, and was made of that; else None."""
    if not path.is_file():
        return None
    digest = hash_file(path)
    if known.get(path.name, digest) != digest:
        _log.warning("%s is damaged (it has changed since it was written) and is made again", path)
        return None
    try:
        with h5py.File(path) as file:
            if file.attrs.get("made_of") != made_of:
                return None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        _log.warning("%s is damaged (%s) and is made again", path, error)
        return None
    return FileEntry.of(path, digest)


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
