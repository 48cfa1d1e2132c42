"""The FAISS index over image embeddings: built from a bank, kept beside it, searched for the nearest normals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spade_faiss.bank import Bank
from spade_faiss.config import from_mapping
from spade_faiss.device import CPU, Device
from spade_faiss.errors import BankError, InputError
from spade_faiss.features import FloatArray
from spade_faiss.files import atomic_path, hash_file
from spade_faiss.gpu_index import to_cards
from spade_faiss.knn import IntArray, direct_sq_dist, import_faiss, rounding_of, scan, sort_by_distance, sq_norms
from spade_faiss.recipe import Recipe

FORMAT = "spade_faiss image index"
SCHEMA = 2

_DESCRIPTION = "index.json"
_FILE = "image.faiss"
# Candidates beyond k: a matrix product's rounding may swap near neighbours, a direct evaluation puts them right. Where it may
# have swapped more than these, the flat rows are searched without it.
_SPARE = 8
_TRAIN_ROWS = 100_000
_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an index file says of itself: the state of the bank it covers, how it was built, and its checksum."""

    format: str
    schema: int
    recipe: str
    factory: str
    generation: int
    count: int
    shards: tuple[str, ...]
    bytes: int
    sha256: str
    faiss: str


class ImageIndex:
    """Nearest normals by embedding. Rows that the built index does not cover are searched flat beside it."""

    def __init__(self, bank: Bank, index: Any, covered: int, query: str = "", device: Device = CPU) -> None:
        faiss = import_faiss()
        self._bank = bank
        self._index = index
        self._covered = covered
        self._tail = faiss.IndexFlatL2(bank.layout.embedding_dim)
        # L2 does not depend on the origin, rounding does: near the data it is smaller.
        self._centre = np.zeros(bank.layout.embedding_dim, np.float32)
        for xb in _blocks(bank, covered):
            if self._tail.ntotal == 0:
                self._centre = xb.mean(axis=0)
            self._tail.add(xb - self._centre)
        if query:
            try:
                faiss.ParameterSpace().set_index_parameters(index, query)
            except RuntimeError as error:
                raise InputError(f"FAISS does not take the query parameters {query!r} for this index: {error}") from error
        self._index, self._tail = to_cards(self._index, device), to_cards(self._tail, device)

    @classmethod
    def open(cls, bank: Bank, recipe: Recipe, device: Device = CPU) -> ImageIndex:
        """The recipe's index over a bank; a flat one is made on the spot, any other must have been built.

        Raises:
            BankError: if the index was not built, is damaged, or belongs to another bank or recipe.
        """
        faiss = import_faiss()
        if not recipe.needs_image_index:
            return cls(bank, faiss.IndexFlatL2(bank.layout.embedding_dim), 0, recipe.query.image, device)
        folder = index_folder(bank, recipe)
        command = f"spade-faiss index {bank.path} --recipe {recipe.name}"
        if not (folder / _DESCRIPTION).is_file():
            raise BankError(f"the bank {bank.path} has no index {recipe.name!r}; build it with: {command}")
        description = _read_description(folder, command)
        if description.factory != recipe.build.image:
            raise BankError(
                f"index {folder} was built as {description.factory!r}, the recipe says {recipe.build.image!r}; run: {command}"
            )
        held = tuple(shard.sha256 for shard in bank.manifest.shards)
        if held[: len(description.shards)] != description.shards:
            raise BankError(f"index {folder} was built from other shards than the bank now holds; run: {command}")
        if description.count != (count := sum(shard.count for shard in bank.manifest.shards[: len(description.shards)])):
            raise BankError(f"{folder / _DESCRIPTION} says count={description.count}, its shards hold {count}; run: {command}")
        file = folder / _FILE
        # FAISS trusts what it reads: a file is opened only when it is the one that was written.
        if not file.is_file() or (found := hash_file(file)) != description.sha256:
            state = f"has sha256 {found}, expected {description.sha256}" if file.is_file() else "is missing"
            raise BankError(f"{file} {state}; rebuild it with: {command}")
        return cls(bank, faiss.read_index(str(file)), description.count, recipe.query.image, device)

    @property
    def covered(self) -> int:
        """Rows that the built index covers; those after it are searched flat."""
        return self._covered

    def search(self, xq: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Squared distances (n, k), ascending, and bank rows (n, k) of the nearest normals; equal distances by ascending row.

        Args:
            xq: (n, d) float32.
            k: at most the number of images in the bank.

        Raises:
            InputError: if an approximate index returned fewer than k.
        """
        candidates = np.empty((len(xq), 0), np.int64)
        if self._index.ntotal:
            try:
                _, candidates = self._index.search(xq, min(k + _SPARE, self._index.ntotal))
            except RuntimeError as error:
                raise InputError(f"FAISS could not search with the recipe's query parameters: {error}") from error
        if self._tail.ntotal == 0:
            return self._nearest(xq, candidates, k)
        centred = xq - self._centre
        found, I = self._tail.search(centred, min(k + _SPARE, self._tail.ntotal))
        D, rows = self._nearest(xq, np.concatenate([candidates, np.where(I < 0, -1, I + self._covered)], axis=1), k)
        if I.shape[1] < self._tail.ntotal:
            rounding = rounding_of(sq_norms(centred), D[:, -1], xq.shape[1])
            (doubtful,) = np.nonzero(D[:, -1] >= found[:, -1] - rounding)
            if len(doubtful):
                every = np.concatenate([candidates[doubtful], self._scan_tail(xq[doubtful], k)], axis=1)
                D[doubtful], rows[doubtful] = self._nearest(xq[doubtful], every, k)
        return D, rows

    def _nearest(self, xq: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The k nearest of each line's candidate rows, by direct distances; -1 is no row."""
        if (np.sum(candidates >= 0, axis=1) < k).any():
            raise InputError(
                f"the image index returned fewer than k={k} neighbours; raise its query parameters (recipe: query)"
            )
        rows, positions = np.unique(candidates, return_inverse=True)
        xb = self._bank.embedding(np.maximum(rows, 0))
        D = direct_sq_dist(xq, xb, positions.reshape(candidates.shape))
        D, I = sort_by_distance(np.where(candidates < 0, np.float32(np.inf), D), candidates)
        return D[:, :k], I[:, :k]

    def _scan_tail(self, xq: FloatArray, k: int) -> IntArray:
        """The k nearest rows of every block of the tail, block after block, by direct distances."""
        nearest, start = [], self._covered
        for xb in _blocks(self._bank, self._covered):
            nearest.append(start + scan(xq, xb, min(k, len(xb)))[1])
            start += len(xb)
        return np.concatenate(nearest, axis=1)


def check_factory(recipe: Recipe, embedding_dim: int) -> None:
    """Raise InputError if FAISS cannot make the recipe's index, before long work that would end in it."""
    faiss = import_faiss()
    try:
        faiss.index_factory(embedding_dim, recipe.build.image, faiss.METRIC_L2)
    except RuntimeError as error:
        raise InputError(f"FAISS could not make {recipe.build.image!r} for d={embedding_dim}: {error}") from error


def build_image_index(bank: Bank, recipe: Recipe, *, progress: bool = False) -> Description:
    """Train, fill and store the recipe's index for all images of a bank.

    Raises:
        InputError: for an empty bank, a factory string that FAISS does not know, or too few images to train it.
    """
    faiss = import_faiss()
    if len(bank) == 0:
        raise InputError(f"the bank {bank.path} is empty; extract images first")
    try:
        index = faiss.index_factory(bank.layout.embedding_dim, recipe.build.image, faiss.METRIC_L2)
        if not index.is_trained:
            rows = np.random.default_rng(_SEED).permutation(len(bank))[:_TRAIN_ROWS]
            index.train(bank.embedding(np.sort(rows)))
        with tqdm(total=len(bank), desc="index", unit="img", disable=None if progress else True) as bar:
            for xb in _blocks(bank, 0):
                index.add(xb)
                bar.update(len(xb))
    except RuntimeError as error:
        raise InputError(
            f"FAISS could not make {recipe.build.image!r} for {len(bank)} embeddings of d={bank.layout.embedding_dim}: {error}"
        ) from error
    folder = index_folder(bank, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / _FILE) as temporary:
        faiss.write_index(index, str(temporary))
        digest = hash_file(temporary)
    description = Description(
        format=FORMAT,
        schema=SCHEMA,
        recipe=recipe.name,
        factory=recipe.build.image,
        generation=bank.generation,
        count=len(bank),
        shards=tuple(shard.sha256 for shard in bank.manifest.shards),
        bytes=(folder / _FILE).stat().st_size,
        sha256=digest,
        faiss=faiss.__version__,
    )
    with atomic_path(folder / _DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(asdict(description), indent=1) + "\n", encoding="utf-8")
    return description


def index_folder(bank: Bank, recipe: Recipe) -> Path:
    """Where a bank keeps the indexes of a recipe."""
    return bank.path / "indexes" / recipe.name


def built_indexes(bank: Bank) -> list[Description]:
    """What every index that was built beside the bank says of itself."""
    folders = sorted(path.parent for path in (bank.path / "indexes").glob(f"*/{_DESCRIPTION}"))
    return [_read_description(folder, f"spade-faiss index {bank.path} --recipe {folder.name}") for folder in folders]


def _read_description(folder: Path, command: str) -> Description:
    path = folder / _DESCRIPTION
    try:
        description = from_mapping(Description, json.loads(path.read_bytes()), str(path))
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is damaged ({error}); rebuild the index with: {command}") from error
    if (description.format, description.schema) != (FORMAT, SCHEMA):
        raise BankError(f"{path} has schema {description.schema}, this version reads {SCHEMA}; rebuild it with: {command}")
    return description


def _blocks(bank: Bank, start: int) -> Iterator[FloatArray]:
    """The bank's embeddings from row `start` on, block by block."""
    seen = 0
    for xb in bank.embedding_blocks():
        rest = xb[max(0, start - seen) :]
        seen += len(xb)
        if len(rest):
            yield rest
