"""Verification: whether all files that a bank and its indexes name exist, and are those that were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.codes import codes_path
from spade_faiss.bank.network import NETWORK
from spade_faiss.bank.places import SHARDS
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.copies import copy_of, named
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, hash_file
from spade_faiss.core.inside import is_regular
from spade_faiss.core.process import fork_safe
from spade_faiss.core.progress import progress_bar
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.features.layout import LARGEST, within_range
from spade_faiss.index.build import views_of
from spade_faiss.index.built_index import IndexFolder, M, index_folders
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.image_index import ImageIndexManifest, check_entries, load_index
from spade_faiss.index.opened_gallery import check_encodings
from spade_faiss.search.recipe import Build, Recipe


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` looked at, and the problems that it found; no problem means that nothing is wrong."""

    images: int
    shards: int
    indexes: int
    bytes: int
    problems: tuple[str, ...]


@fork_safe
def verify(bank: str | Path, *, deep: bool = False, progress: bool = False) -> Verified:
    """Read every file of a bank and of its indexes, and compare its checksum.

    Args:
        bank: the bank's folder.
        deep: also check that the features have the right shapes and are finite, that no id occurs twice, and that the indexes
            hold what belongs to the bank's images.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        NotFoundError: if there is no bank.
        BankError: if its manifest is damaged, so that nothing else can be checked.
    """
    opened = Bank.open(bank, check=False)
    entries = opened.manifest.shards
    problems = list(_codes_problems(opened))
    with progress_bar(opened.bytes_on_disk, "verify", progress, unit="B") as bar:
        for index, entry in enumerate(entries):
            problems += _shard_problems(opened, index, deep)
            bar.update(entry.bytes)
    is_whole = not problems
    if deep and is_whole:
        problems += _id_problems(opened)
    indexes = 0
    for view in views_of(opened):
        images, galleries = index_folders(ImageIndexManifest, view), index_folders(GalleryIndexManifest, view)
        for image in images:
            problems += _index_problems(image, partial(_check_image_index, image, view, deep and is_whole))
        for gallery in galleries:
            problems += _index_problems(gallery, partial(_check_gallery, gallery, view, deep and is_whole))
        problems += _calibration_problems(view)
        indexes += len(images) + len(galleries)
    problems += _network_problems(opened)
    return Verified(
        images=_count_images(opened),
        shards=len(entries),
        indexes=indexes,
        bytes=opened.bytes_on_disk,
        problems=tuple(problems),
    )


def _codes_problems(bank: Bank) -> Iterator[str]:
    """Say whether what decodes the maps is missing or damaged."""
    if (entry := bank.manifest.codes) is None:
        return
    try:
        path = codes_path(bank.path, entry)
    except BankError as error:
        yield str(error)
        return
    if problem := _file_problem(path, entry, f"the codes {path}", "restore it from a backup, or make the bank anew"):
        yield problem
        return
    try:
        _ = bank.codes
    except BankError as error:
        yield str(error)


def _count_images(bank: Bank) -> int:
    """The number of pictures; that of their entries where damage hides which belong to one."""
    try:
        return len(bank.pictures)
    except BankError:
        return len(bank)


def _shard_problems(bank: Bank, index: int, deep: bool) -> Iterator[str]:
    """Say what is wrong with a shard's file, or, if nothing is and `deep` is given, with its features."""
    entry = bank.manifest.shards[index]
    path = bank.path / SHARDS / entry.file
    if problem := _file_problem(path, entry, f"shard {path}", "restore it from a backup or extract its images again"):
        yield problem
    elif deep:
        yield from _feature_problems(bank, index)


def _file_problem(path: Path, entry: FileEntry, name: str, remedy: str) -> str:
    """Say what is wrong with a file that is written once, all of which is read; empty if nothing is."""
    if (copy := copy_of(path)) is not None:
        found = copy.stored_sha256(path)
        if found == entry.sha256:
            return ""
        wrong = f"has sha256 {found}, the manifest says {entry.sha256}" if found else "is missing"
        return f"{named(name)} {wrong}; {remedy}"
    if not is_regular(path):
        return f"{name} is missing; {remedy}"
    if (size := path.lstat().st_size) != entry.bytes:
        return f"{name} is of {size} bytes, the manifest says {entry.bytes}; {remedy}"
    if (found := hash_file(path)) != entry.sha256:
        return f"{name} has sha256 {found}, the manifest says {entry.sha256}; {remedy}"
    return ""


def _feature_problems(bank: Bank, index: int) -> Iterator[str]:
    """Say what is wrong inside a shard whose checksum is right."""
    everything, name = bank.with_removed(), bank.manifest.shards[index].file
    try:
        if not within_range(everything.stored_embeddings(index)):
            yield f"shard {name} holds embeddings that are not finite, or beyond {LARGEST:g}; extract its images again"
        rows = everything.rows_of_shard(index).tolist()
        everything.check_texts(index)
        for level in bank.layout.levels:
            if not all(within_range(everything.level_map(level.name, row)) for row in rows):
                yield (
                    f"shard {name} holds maps of level {level.name!r} that are not finite, or beyond {LARGEST:g}; "
                    f"extract its images again"
                )
            for row in rows:
                everything.release_maps(level.name, [row])
    except BankError as error:
        yield str(error)


def _id_problems(bank: Bank) -> Iterator[str]:
    """Say whether ids occur more than once, removed ones included, and whether tiles lie where none can be."""
    try:
        _ = bank.with_removed().ids
        _ = bank.with_removed().tile_places
    except BankError as error:
        yield str(error)


def _index_problems(folder: IndexFolder[M], check_files: Callable[[M], object]) -> Iterator[str]:
    """Say what is wrong with an index; the first problem ends the check."""
    try:
        manifest = folder.read()
        folder.check_shards(manifest)
        remedy = f"rebuild it with: {folder.command(rebuild=True)}"
        for entry in manifest.files if copy_of(folder.path) is not None else ():
            path = folder.files / entry.file
            if problem := _file_problem(path, entry, f"the index {path}", remedy):
                yield problem
                return
        check_files(manifest)
    except (BankError, InputError) as error:
        yield str(error)


def _check_image_index(
    folder: IndexFolder[ImageIndexManifest], bank: Snapshot, deep: bool, manifest: ImageIndexManifest
) -> None:
    index = load_index(folder, manifest, bank.layout.embedding_dim)
    if deep:
        check_entries(bank, index, manifest.shards, folder, most=None)


def _check_gallery(
    folder: IndexFolder[GalleryIndexManifest], bank: Snapshot, deep: bool, manifest: GalleryIndexManifest
) -> None:
    for entry in manifest.files:
        folder.check_content(entry)
    if deep:
        build = Build(gallery=manifest.gallery, settings=manifest.settings, levels=manifest.levels)
        check_encodings(bank.with_removed(), Recipe(name=manifest.recipe, build=build))


def _network_problems(bank: Bank) -> Iterator[str]:
    """Say which file of the network that the bank carries is damaged."""
    network = bank.manifest.network
    for entry in () if network is None else (network.graph, network.probe):
        path = bank.path / NETWORK / entry.file
        remedy = "restore it from a backup, or use the bank with --engine torch"
        if problem := _file_problem(path, entry, f"the network {path}", remedy):
            yield problem


def _calibration_problems(bank: Snapshot) -> Iterator[str]:
    """Say which calibration is damaged."""
    try:
        stored_calibrations(bank)
    except BankError as error:
        yield str(error)
