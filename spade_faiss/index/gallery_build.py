"""Builds the gallery index: what a search method trains on a bank's maps, and encodes of each, is stored beside the bank."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

from spade_faiss.bank.shards import ShardEntry
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.arrays import map_arrays, write_arrays
from spade_faiss.core.copies import copy_of, fetched
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import FileEntry, hash_file
from spade_faiss.core.hints import index_command
from spade_faiss.core.inside import is_regular
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.signed_json import hash_json
from spade_faiss.index.built_index import REBUILD_ASKED_FOR, UP_TO_DATE, IndexFolder, check_not_empty, outcome
from spade_faiss.index.encoding import Encode, encode_here
from spade_faiss.index.gallery_encode import EncodeJob, GalleryEncoding
from spade_faiss.index.gallery_files import SHARDS, read_trained
from spade_faiss.index.gallery_manifest import (
    EncodedShard,
    GalleryIndexManifest,
    encoded_name,
    indexed_levels,
    level_names,
    trained_name,
)
from spade_faiss.index.staleness import why_train_anew
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.levels import open_checked_blocks
from spade_faiss.search.protocol import check_own_rois, resolve_recipe
from spade_faiss.search.recipe import Recipe

# The attribute of a file that says what it was made of: an interrupted build goes on with the files that were made of the same.
_MADE_OF = "made_of"
# How many vectors of a level are packed together, about.
_PACKED_VECTORS = 1 << 22

_log = logging.getLogger(__name__)


def build_gallery(
    bank: Snapshot,
    recipe: Recipe,
    *,
    rebuild: bool = False,
    progress: bool = False,
    encode: Encode = encode_here,
) -> tuple[GalleryIndexManifest, str]:
    """Bring a recipe's gallery index up to date with a bank: train on a sample of its maps, and encode all of them.

    What is there already and fits is kept: an interrupted build goes on, and if images were added, only they are encoded, with
    what was trained before. The index is built anew if it was built with other settings or for other levels, or if its training
    does not fit the bank any more. It keeps its levels if the recipe names none; a new one has those that
    the bank is usually searched at.

    Args:
        bank: the bank, not empty.
        recipe: a recipe whose search method has a gallery index.
        rebuild: build it anew in any case.
        progress: show a bar on stderr if that is a terminal.
        encode: makes the files of encodings.

    Returns:
        Its manifest, and what was done, in words.

    Raises:
        InputError: for an empty bank, settings or levels that do not fit it, or a full disk.
    """
    check_not_empty(bank)
    if bank.layout.own_rois:
        check_own_rois(recipe)
    start = time.perf_counter()
    folder = IndexFolder(GalleryIndexManifest, bank, recipe.name)
    folder.files.mkdir(parents=True, exist_ok=True)
    before = folder.read_if_usable()
    # `index BANK --recipe NAME` adds images, whichever levels the index was built for.
    named = recipe.build.levels or (before.levels if before else bank.usual.method.levels)
    recipe = replace(recipe, build=replace(recipe.build, levels=level_names(bank, named)))
    why_anew = REBUILD_ASKED_FOR if rebuild else _why_anew(bank, recipe, before)
    kept = None if why_anew else before
    build = _Build(bank, recipe, folder.files, kept.build if kept else _next_build(folder, before, rebuild), kept)
    trained_file = build.train()
    shards, added = build.encode(trained_file, progress, encode)
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

    def __init__(self, bank: Snapshot, recipe: Recipe, folder: Path, number: int, kept: GalleryIndexManifest | None) -> None:
        self.number = number
        self.resolved = resolve_recipe(recipe)
        self._bank = bank
        self._recipe = recipe
        self._folder = folder
        self._levels = indexed_levels(bank, recipe.build.levels)
        self._rebuild = index_command(bank.path, recipe.name, rebuild=True)
        self._recorded = {entry.file: entry for entry in kept.files} if kept else {}
        self._groups = kept.groups if kept else []

    def train(self) -> FileEntry:
        """Return the file of what is trained, and make it if it is missing."""
        path = self._folder / trained_name(self.number)
        made_of = hash_json(
            {
                "schema": GalleryIndexManifest.SCHEMA,
                "gallery": self._recipe.build.gallery,
                "settings": asdict(self.resolved.build),
                "layout": self._bank.layout.named(),
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

    def encode(self, trained_file: FileEntry, progress: bool, encode: Encode) -> tuple[list[EncodedShard], int]:
        """Return the files of all shards, and the number of images that were encoded because their file was missing."""
        # All images, removed ones too, so that they can be restored.
        everything = self._bank.with_removed()
        encoding = GalleryEncoding(
            bank=everything, recipe=self._recipe, folder=self._folder, trained_file=trained_file, rebuild=self._rebuild
        )
        groups = self._grouped()
        entries: list[FileEntry | None] = []
        jobs: dict[int, EncodeJob] = {}
        for place, group in enumerate(groups):
            sha256 = [shard.sha256 for _, shard in group]
            together = {"shard": sha256[0]} if len(group) == 1 else {"shards": sha256}
            made_of = hash_json({"trained": trained_file.sha256, **together})
            file = encoded_name(self.number, sha256)
            entries.append(self._usable(self._folder / file, made_of))
            if entries[-1] is None:
                jobs[place] = EncodeJob(
                    shards=tuple(number for number, _ in group),
                    count=sum(shard.count for _, shard in group),
                    file=file,
                    attributes={_MADE_OF: made_of, SHARDS: "\n".join(sha256)},
                )
        added = sum(job.count for job in jobs.values())
        with progress_bar(len(everything), "index maps", progress) as bar:
            bar.update(len(everything) - added)
            places = list(jobs)
            for number, made in encode(encoding, list(jobs.values())) if jobs else ():
                entries[places[number]] = made
                bar.update(jobs[places[number]].count)
        found = [
            EncodedShard(sha256=shard.sha256, count=shard.count, file=entry)
            for group, entry in zip(groups, entries, strict=True)
            if entry is not None
            for _, shard in group
        ]
        return found, added

    def _grouped(self) -> list[list[tuple[int, ShardEntry]]]:
        """Return the bank's shards, with their numbers, by the file that holds their encodings.

        Images that are packed are searched faster in fewer, longer lists, but what one file holds is in memory when it is made.
        A file stays as it is as long as all of its shards are in the bank.
        """
        rest = {shard.sha256: (number, shard) for number, shard in enumerate(self._bank.manifest.shards)}
        if self.resolved.method.pack is None:
            return [[found] for found in rest.values()]
        groups = [[rest.pop(sha256) for sha256 in group] for group in self._groups if rest.keys() >= set(group)]
        most = _PACKED_VECTORS // max(level.locations for level in self._levels.values())
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
        recorded = self._recorded.get(path.name)
        if recorded is not None and copy_of(path) is not None:
            if path.name != trained_name(self.number):
                return recorded  # it need not be here: its checksum is compared when it is fetched
            fetched(path, recorded.sha256)
        if not is_regular(path):
            return None
        digest = hash_file(path)
        if recorded is not None and recorded.sha256 != digest:
            _log.warning("%s is damaged (it has changed since it was written) and is made again", path)
            return None
        try:
            if map_arrays(path, digest).attributes.get(_MADE_OF) != made_of:
                return None
            if path.name == trained_name(self.number):
                read_trained(path, digest, self._levels, self.resolved, self._rebuild)
        except BankError as error:
            _log.warning("%s; it is made again", error)
            return None
        return FileEntry.of(path, digest)


def _next_build(folder: IndexFolder[GalleryIndexManifest], before: GalleryIndexManifest | None, rebuild: bool) -> int:
    """Return the number of a build that begins, or that goes on where it was interrupted.

    A new number keeps the files of another build from being taken for its own.
    """
    if copy_of(folder.path) is not None:
        # A build of ours that was interrupted goes on: nobody else has its number.
        begun = [int(path.stem.removeprefix("trained-")) for path in folder.files.glob("trained-*[0-9].h5")]
        begun = [number for number in begun if before is None or number != before.build]
        return max(begun) if begun and not rebuild and before is None else folder.next_build(0)
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
        held, named = (", ".join(indexed_levels(bank, names)) for names in (before.levels, wanted))
        return f"it was built for {held}, asked for are {named}"
    return why_train_anew(bank, before.shards, before.trained)
