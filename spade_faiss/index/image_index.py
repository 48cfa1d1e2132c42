"""The FAISS index over image embeddings: built from a bank, kept beside it, searched for the nearest normals."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.device import CPU, Device
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, atomic_path, hash_file
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.index.gpu import to_cards
from spade_faiss.index.staleness import (
    IndexedShard,
    check_covers,
    check_listed,
    index_folder,
    too_many_tombstones,
    why_learn_anew,
)
from spade_faiss.search.distances import direct_sq_dist, import_faiss, rounding_of, scan, sort_by_distance, sq_norms
from spade_faiss.search.recipe import Recipe

FORMAT = "spade_faiss image index"
SCHEMA = 3

_MANIFEST = "index.json"
# Candidates beyond k: a matrix product's rounding may swap near neighbors, a direct evaluation puts them right. Where it may
# have swapped more than these, the flat rows are searched without it.
_SPARE = 8
_TRAIN_ROWS = 100_000
_SEED = 1234

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageIndexManifest:
    """What an index file says of itself: the shards it covers, how it was built, and its checksum.

    `build` counts the files that were written in its place. It learned from the first `trained` of its `shards`.
    """

    recipe: str
    factory: str
    generation: int
    build: int
    trained: int
    shards: tuple[IndexedShard, ...]
    file: FileEntry
    faiss: str

    def __post_init__(self) -> None:
        check_listed(self.shards)
        if self.file.file != _name(self.build):
            raise InputError(f"build {self.build} names the file {self.file.file!r}")

    @property
    def count(self) -> int:
        """Its entries."""
        return sum(shard.count for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return self.file.bytes


class ImageIndex:
    """Nearest normals by embedding. Images that the built index does not cover are searched flat beside it."""

    def __init__(
        self, bank: Snapshot, index: Any, shards: Sequence[IndexedShard], query: str = "", device: Device = CPU
    ) -> None:
        faiss = import_faiss()
        self._bank = bank
        self._index = index
        place = {shard.sha256: number for number, shard in enumerate(bank.manifest.shards)}
        covered = {shard.sha256 for shard in shards}
        # (ntotal,), the bank row of each entry; -1 for images that were removed, or whose shard is gone.
        entries = [
            bank.rows_of_shard(place[shard.sha256]) if shard.sha256 in place else np.full(shard.count, -1) for shard in shards
        ]
        self._row_of_entry: IntArray = np.concatenate([np.empty(0, np.int64), *entries])
        self._beside = [number for number, shard in enumerate(bank.manifest.shards) if shard.sha256 not in covered]
        self._tail = faiss.IndexFlatL2(bank.layout.embedding_dim)
        rows = [bank.rows_of_shard(number) for number in self._beside]
        # (tail,), the bank row of each image that is searched flat; ascending.
        self._tail_rows: IntArray = np.concatenate([np.empty(0, np.int64), *(of[of >= 0] for of in rows)])
        # L2 does not depend on the origin, rounding does: near the data it is smaller.
        self._center = np.zeros(bank.layout.embedding_dim, np.float32)
        for xb in self._tail_blocks():
            if self._tail.ntotal == 0:
                self._center = xb.mean(axis=0)
            self._tail.add(xb - self._center)
        if query:
            try:
                faiss.ParameterSpace().set_index_parameters(index, query)
            except RuntimeError as error:
                raise InputError(f"FAISS does not take the query parameters {query!r} for this index: {error}") from error
        self._index, self._tail = to_cards(self._index, device), to_cards(self._tail, device)

    @classmethod
    def open(cls, bank: Snapshot, recipe: Recipe, device: Device = CPU) -> ImageIndex:
        """The recipe's index over a bank; a flat one is made on the spot, any other must have been built.

        Raises:
            BankError: if the index was not built, is damaged, or belongs to another bank or recipe.
        """
        if not recipe.needs_image_index:
            return cls(bank, import_faiss().IndexFlatL2(bank.layout.embedding_dim), (), recipe.query.image, device)
        folder = index_folder(bank, recipe)
        command = f"spade-faiss index {bank.path} --recipe {recipe.name}"
        if not (folder / _MANIFEST).is_file():
            raise BankError(f"the bank {bank.path} has no index {recipe.name!r}; build it with: {command}")
        while True:
            manifest = _read(folder, command)
            if manifest.factory != recipe.build.image:
                raise BankError(
                    f"index {folder} was built as {manifest.factory!r}, the recipe says {recipe.build.image!r}; run: {command}"
                )
            try:
                index = _load(folder, manifest, command)
            except BankError:
                if _read(folder, command) == manifest:  # else another process has just built it again
                    raise
            else:
                break
        check_covers(bank, manifest.shards, folder, command)
        return cls(bank, index, manifest.shards, recipe.query.image, device)

    @property
    def covered(self) -> int:
        """Images that the built index covers; the others are searched flat."""
        return len(self._bank) - len(self._tail_rows)

    def search(self, xq: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Squared distances (n, k), ascending, and bank rows (n, k) of the nearest normals; equal distances by ascending row.

        Args:
            xq: (n, d) float32.
            k: at most the number of images in the bank.

        Raises:
            InputError: if an approximate index returned fewer than k.
        """
        candidates = self._candidates(xq, k)
        if self._tail.ntotal == 0:
            return self._nearest(xq, candidates, k)
        centered = xq - self._center
        found, I = self._tail.search(centered, min(k + _SPARE, self._tail.ntotal))
        D, rows = self._nearest(xq, np.concatenate([candidates, np.where(I < 0, -1, self._tail_rows[I])], axis=1), k)
        if I.shape[1] < self._tail.ntotal:
            rounding = rounding_of(sq_norms(centered), D[:, -1], xq.shape[1])
            (doubtful,) = np.nonzero(D[:, -1] >= found[:, -1] - rounding)
            if len(doubtful):
                every = np.concatenate([candidates[doubtful], self._scan_tail(xq[doubtful], k)], axis=1)
                D[doubtful], rows[doubtful] = self._nearest(xq[doubtful], every, k)
        return D, rows

    def _candidates(self, xq: FloatArray, k: int) -> IntArray:
        """(n, m), the rows that the built index finds nearest, at least k of images that are there, if it can; -1 is no row."""
        found, wanted = np.empty((len(xq), 0), np.int64), k + _SPARE
        while self._index.ntotal and found.shape[1] < self._index.ntotal:
            try:
                _, entries = self._index.search(xq, min(wanted, self._index.ntotal))
            except RuntimeError as error:
                raise InputError(f"FAISS could not search with the recipe's query parameters: {error}") from error
            found = np.where(entries < 0, -1, self._row_of_entry[entries])
            # What was removed since takes places; entries that FAISS did not fill will not be filled by asking for more.
            lost = np.sum((entries >= 0) & (found < 0), axis=1)
            if np.all(np.sum(found >= 0, axis=1) >= np.minimum(k + _SPARE, self.covered)) or not lost.any():
                break
            wanted *= 2
        return found

    def _nearest(self, xq: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The k nearest of each line's candidate rows, by direct distances; -1 is no row."""
        if (np.sum(candidates >= 0, axis=1) < k).any():
            raise InputError(f"the image index returned fewer than k={k} neighbors; raise its query parameters (recipe: query)")
        rows, positions = np.unique(candidates, return_inverse=True)
        xb = self._bank.embedding(np.maximum(rows, 0))
        D = direct_sq_dist(xq, xb, positions.reshape(candidates.shape))
        D, I = sort_by_distance(np.where(candidates < 0, np.float32(np.inf), D), candidates)
        return D[:, :k], I[:, :k]

    def _scan_tail(self, xq: FloatArray, k: int) -> IntArray:
        """The k nearest rows of every block of the tail, block after block, by direct distances."""
        nearest, start = [], 0
        for xb in self._tail_blocks():
            nearest.append(self._tail_rows[start + scan(xq, xb, min(k, len(xb)))[1]])
            start += len(xb)
        return np.concatenate(nearest, axis=1)

    def _tail_blocks(self) -> Iterator[FloatArray]:
        """The embeddings that are searched flat, shard by shard."""
        for number in self._beside:
            if len(xb := self._bank.embeddings_of_shard(number)):
                yield xb


def check_factory(recipe: Recipe, embedding_dim: int) -> None:
    """Raise InputError if FAISS cannot make the recipe's index, before long work that would end in it."""
    faiss = import_faiss()
    try:
        faiss.index_factory(embedding_dim, recipe.build.image, faiss.METRIC_L2)
    except RuntimeError as error:
        raise InputError(f"FAISS could not make {recipe.build.image!r} for d={embedding_dim}: {error}") from error


def build_image_index(
    bank: Bank, recipe: Recipe, *, rebuild: bool = False, progress: bool = False
) -> tuple[ImageIndexManifest, str]:
    """Bring the recipe's index up to date with a bank: add what it does not cover, or build it where there is none, it was
    built otherwise, or what it learned does not fit any more.

    Returns:
        What it says of itself, and what was done, in words.

    Raises:
        InputError: for an empty bank, a factory string that FAISS does not know, or too few images to train it.
    """
    faiss = import_faiss()
    if len(bank) == 0:
        raise InputError(f"the bank {bank.path} is empty; extract images first")
    folder = index_folder(bank, recipe)
    command = f"spade-faiss index {bank.path} --recipe {recipe.name}"
    before = _known(folder, command)
    index, why = (None, "asked for") if rebuild else _to_add_to(bank, recipe, before, command)
    covered: list[IndexedShard] = list(before.shards) if before and index is not None else []
    names = {shard.sha256 for shard in covered}
    missing = [number for number, shard in enumerate(bank.manifest.shards) if shard.sha256 not in names]
    if before and index is not None and not missing:
        return before, "is up to date"
    everything = bank.with_removed()
    done = f"added {sum(bank.manifest.shards[number].count for number in missing)} images to it"
    trained = before.trained if before and index is not None else 0
    try:
        if index is None:
            done = f"built anew: {why}" if before else "built"
            index = faiss.index_factory(bank.layout.embedding_dim, recipe.build.image, faiss.METRIC_L2)
            if not index.is_trained:
                rows = np.random.default_rng(_SEED).permutation(len(bank))[:_TRAIN_ROWS]
                index.train(bank.embedding(np.sort(rows)))
                trained = len(bank.manifest.shards)
        count = sum(bank.manifest.shards[number].count for number in missing)
        with tqdm(total=count, desc="index", unit="img", disable=None if progress else True) as bar:
            for number in missing:
                xb = everything.embeddings_of_shard(number)
                index.add(xb)
                bar.update(len(xb))
    except RuntimeError as error:
        raise InputError(
            f"FAISS could not make {recipe.build.image!r} for {len(bank)} embeddings of d={bank.layout.embedding_dim}: {error}"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    build = before.build + 1 if before else 0
    file = folder / _name(build)
    with atomic_path(file) as temporary:
        with temporary.open("wb") as opened:  # by ourselves: FAISS does not notice that the end of a file found no room
            faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))
        digest = hash_file(temporary)
    shards = [bank.manifest.shards[number] for number in missing]
    manifest = ImageIndexManifest(
        recipe=recipe.name,
        factory=recipe.build.image,
        generation=bank.generation,
        build=build,
        trained=trained,
        shards=(*covered, *(IndexedShard(sha256=shard.sha256, count=shard.count) for shard in shards)),
        file=FileEntry.of(file, digest),
        faiss=faiss.__version__,
    )
    write_signed(folder / _MANIFEST, FORMAT, SCHEMA, asdict(manifest))
    for path in folder.glob("*.faiss"):
        if path != file:
            path.unlink()
    return manifest, done


def built_indexes(bank: Snapshot, recipe: str = "*") -> list[ImageIndexManifest]:
    """What every index that was built beside the bank, or that of one recipe, says of itself."""
    folders = sorted(path.parent for path in (bank.path / "indexes").glob(f"{recipe}/{_MANIFEST}"))
    return [_read(folder, f"spade-faiss index {bank.path} --recipe {folder.name}") for folder in folders]


def check_index(bank: Snapshot, manifest: ImageIndexManifest) -> None:
    """Raise BankError if the file of an index is not the one that was written."""
    folder = bank.path / "indexes" / manifest.recipe
    _load(folder, manifest, f"spade-faiss index {bank.path} --recipe {manifest.recipe} --rebuild")


def _name(build: int) -> str:
    return f"image-{build:06d}.faiss"


def _to_add_to(bank: Snapshot, recipe: Recipe, before: ImageIndexManifest | None, command: str) -> tuple[Any, str]:
    """The index that is there, if it can be added to, and if not, why."""
    if before is None:
        return None, ""
    if before.factory != recipe.build.image:
        return None, f"it was {before.factory!r}, the recipe says {recipe.build.image!r}"
    if why := too_many_tombstones(bank, before.shards) or why_learn_anew(bank, before.shards, before.trained):
        return None, why
    try:
        return _load(index_folder(bank, recipe), before, command), ""
    except BankError as error:
        return None, str(error)


def _load(folder: Path, manifest: ImageIndexManifest, command: str) -> Any:
    """The FAISS index that a manifest names. FAISS trusts what it reads: only the file that was written is opened."""
    file = folder / manifest.file.file
    if not file.is_file() or (found := hash_file(file)) != manifest.file.sha256:
        state = f"has sha256 {found}, expected {manifest.file.sha256}" if file.is_file() else "is missing"
        raise BankError(f"{file} {state}; rebuild it with: {command}")
    index = import_faiss().read_index(str(file))
    if index.ntotal != manifest.count:
        raise BankError(f"{file} holds {index.ntotal} entries, its manifest says {manifest.count}; run: {command}")
    return index


def _known(folder: Path, command: str) -> ImageIndexManifest | None:
    """What is there says of itself; None where there is nothing to be read."""
    try:
        return _read(folder, command) if (folder / _MANIFEST).is_file() else None
    except BankError as error:
        _log.warning("%s", error)
        return None


def _read(folder: Path, command: str) -> ImageIndexManifest:
    return read_signed(folder / _MANIFEST, ImageIndexManifest, FORMAT, SCHEMA, f"rebuild the index with: {command}")
