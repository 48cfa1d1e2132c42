"""The FAISS index of image embeddings: it is built beside a bank, and searched for the nearest normal images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.device import CPU, Device
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry
from spade_faiss.core.hints import index_command
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.index.built_index import REBUILD_ASKED_FOR, UP_TO_DATE, BuiltIndex, IndexFolder, check_not_empty, outcome
from spade_faiss.index.encoding import Encode, encode_here
from spade_faiss.index.faiss_file import check_stored_factory, empty_index, read_index
from spade_faiss.index.gpu import CardIndex, to_card
from spade_faiss.index.image_encode import ImageEncoding, add_parts, can_merge, image_jobs, write_index
from spade_faiss.index.staleness import IndexedShard, too_many_tombstones, why_train_anew
from spade_faiss.search.distances import direct_sq_dist, import_faiss, rounding_of, scan, sort_by_distance, sq_norms
from spade_faiss.search.recipe import Recipe

# Candidates beyond k. A matrix product's rounding may swap near neighbors, and direct distances put them in order; where it may
# have swapped more than these, the rows that are searched flat are searched again without a matrix product.
_SPARE = 8
_TRAIN_ROWS = 100_000
# Entries of an index that are looked at when it is opened.
_SAMPLED = 64
_SEED = 1234
# FAISS allocates as much as a query parameter says: candidates for each thread, however few entries there are.
_MOST_ASKED = 1 << 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageIndexManifest(BuiltIndex):
    """The manifest of an image index.

    Args:
        factory: the FAISS factory string that it was built with.
        file: the record of its one file.
    """

    FORMAT: ClassVar[str] = "spade_faiss image index"
    SCHEMA: ClassVar[int] = 3
    MANIFEST: ClassVar[str] = "index.json"
    FOLDER: ClassVar[str] = ""
    SUFFIX: ClassVar[str] = ".faiss"
    SUBJECT: ClassVar[str] = "embeddings"

    factory: str
    file: FileEntry

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The records of all files."""
        return (self.file,)

    def file_names(self) -> list[str]:
        """Return the names that the files of this build must have."""
        return [_file_name(self.build)]

    @staticmethod
    def settings_of(recipe: Recipe) -> Mapping[str, object]:
        """Return the settings that a recipe asks for."""
        return {"factory": recipe.build.image}


class ImageIndex:
    """Finds the nearest normal images by their embeddings. Images that the built index does not hold are searched flat.

    Args:
        bank: the bank.
        index: the FAISS index.
        shards: the shards whose images it holds, in the order of its entries.
        query: a FAISS parameter string.
        device: where it is searched.
        built_bytes: the size of the index, as it was read.

    Raises:
        InputError: if FAISS does not take the parameter string for this index.
    """

    def __init__(
        self,
        bank: Snapshot,
        index: Any,
        shards: Sequence[IndexedShard],
        query: str = "",
        device: Device = CPU,
        built_bytes: int = 0,
    ) -> None:
        faiss = import_faiss()
        self._bank = bank
        self._index = index
        place = {shard.sha256: number for number, shard in enumerate(bank.manifest.shards)}
        indexed = {shard.sha256 for shard in shards}
        # (ntotal,), the bank row of each entry; -1 for tombstones.
        entries = [
            bank.rows_of_shard(place[shard.sha256]) if shard.sha256 in place else np.full(shard.count, -1) for shard in shards
        ]
        self._row_of_entry: IntArray = np.concatenate([np.empty(0, np.int64), *entries])
        self._flat_shards = [number for number, shard in enumerate(bank.manifest.shards) if shard.sha256 not in indexed]
        self._tail = faiss.IndexFlatL2(bank.layout.embedding_dim)
        rows = [bank.rows_of_shard(number) for number in self._flat_shards]
        # (tail,), the bank row of each image that is searched flat; ascending.
        self._tail_rows: IntArray = np.concatenate([np.empty(0, np.int64), *(of[of >= 0] for of in rows)])
        # L2 distances do not depend on the origin, but their rounding errors do: they are smaller near the data.
        self._center = np.zeros(bank.layout.embedding_dim, np.float32)
        for number in self._flat_shards:
            if len(xb := bank.embeddings_of_shard(number)):
                if self._tail.ntotal == 0:
                    self._center = xb.mean(axis=0)
                self._tail.add(xb - self._center)
                bank.release_embeddings(number)  # or they would be in memory twice
        if query:
            _check_query(query, index.ntotal)
            try:
                faiss.ParameterSpace().set_index_parameters(index, query)
            except RuntimeError as error:
                raise InputError(f"FAISS does not take the query parameters {query!r} for this index: {error}") from error
        self._index, self._tail = to_card(self._index, device), to_card(self._tail, device)
        self._built_bytes = built_bytes

    @classmethod
    def open(cls, bank: Snapshot, recipe: Recipe, device: Device = CPU) -> ImageIndex:
        """Open a recipe's index of a bank. A flat index is made on the spot; any other must have been built.

        Raises:
            BankError: if the index was not built, is damaged, or was built with other settings.
            InputError: if FAISS does not take the recipe's query parameters.
        """
        if not recipe.needs_image_index:
            return cls(bank, import_faiss().IndexFlatL2(bank.layout.embedding_dim), (), recipe.query.image, device)
        folder = IndexFolder(ImageIndexManifest, bank, recipe.name)
        while True:
            manifest = folder.read_for(recipe)
            try:
                index = load_index(folder, manifest, bank.layout.embedding_dim)
                check_entries(bank, index, manifest.shards, folder)
            except BankError:
                if folder.read() == manifest:  # otherwise another process has just built it again
                    raise
            else:
                break
        folder.check_shards(manifest)
        return cls(bank, index, manifest.shards, recipe.query.image, device, manifest.file.bytes)

    @property
    def indexed(self) -> int:
        """The number of the bank's images that the built index holds; the others are searched flat."""
        return len(self._bank) - len(self._tail_rows)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes of the host's memory: the built index, and the embeddings that are searched flat."""
        flat = len(self._tail_rows) * self._bank.layout.embedding_dim * np.dtype(np.float32).itemsize
        parts = ((self._index, self._built_bytes), (self._tail, flat))
        return sum(size for index, size in parts if not isinstance(index, CardIndex))

    def search(self, xq: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Search for the nearest normal images.

        Args:
            xq: the query embeddings, (n, d) float32.
            k: the number of neighbors; at most the number of images in the bank.

        Returns:
            Squared L2 distances, (n, k), ascending, and bank rows, (n, k); equal distances are ordered by row.

        Raises:
            InputError: if an approximate index found fewer than k neighbors.
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
        """Return the rows that the built index finds nearest, (n, m): at least k, if it holds as many; -1 is a tombstone."""
        found, wanted = np.empty((len(xq), 0), np.int64), k + _SPARE
        while self._index.ntotal and found.shape[1] < self._index.ntotal:
            try:
                _, entries = self._index.search(xq, min(wanted, self._index.ntotal))
            except RuntimeError as error:
                raise InputError(f"FAISS could not search with the recipe's query parameters: {error}") from error
            if entries.size and (entries.max() >= len(self._row_of_entry) or entries.min() < -1):
                raise BankError(
                    f"the image index of {self._bank.path} returned an entry that it does not hold; it is damaged: "
                    f"{index_command(self._bank.path, rebuild=True)}"
                )
            found = np.where(entries < 0, -1, self._row_of_entry[entries])
            # Tombstones take the places of rows: ask for more. Entries that FAISS did not fill would not be filled then.
            lost = np.sum((entries >= 0) & (found < 0), axis=1)
            if np.all(np.sum(found >= 0, axis=1) >= np.minimum(k + _SPARE, self.indexed)) or not lost.any():
                break
            wanted *= 2
        return found

    def _nearest(self, xq: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """Return distances and rows of the k nearest of each query's candidates, by direct distances; -1 is no candidate."""
        if (np.sum(candidates >= 0, axis=1) < k).any():
            raise InputError(f"the image index returned fewer than k={k} neighbors; raise its query parameters (recipe: query)")
        rows, positions = np.unique(candidates, return_inverse=True)
        xb = self._bank.embedding(np.maximum(rows, 0))
        D = direct_sq_dist(xq, xb, positions.reshape(candidates.shape))
        D, I = sort_by_distance(np.where(candidates < 0, np.float32(np.inf), D), candidates)
        return D[:, :k], I[:, :k]

    def _scan_tail(self, xq: FloatArray, k: int) -> IntArray:
        """Return the k nearest rows of each shard that is searched flat, by direct distances."""
        nearest, start = [], 0
        for number in self._flat_shards:
            if len(xb := self._bank.embeddings_of_shard(number)):
                nearest.append(self._tail_rows[start + scan(xq, xb, min(k, len(xb)))[1]])
                start += len(xb)
                self._bank.release_embeddings(number)
        return np.concatenate(nearest, axis=1)


def check_factory(recipe: Recipe, embedding_dim: int) -> None:
    """Raise InputError if FAISS cannot make the recipe's index; to be called before long work that would end in it."""
    try:
        empty_index(embedding_dim, recipe.build.image)
    except RuntimeError as error:
        raise InputError(f"FAISS could not make {recipe.build.image!r} for d={embedding_dim}: {error}") from error


def build_image_index(
    bank: Snapshot,
    recipe: Recipe,
    *,
    rebuild: bool = False,
    progress: bool = False,
    asked: bool = True,
    encode: Encode = encode_here,
) -> tuple[ImageIndexManifest, str]:
    """Bring a recipe's image index up to date with a bank.

    Missing images are added. The index is built anew if there is none, if it was built with other settings, if too many of its
    entries are tombstones, or if its training does not fit the bank any more.

    Args:
        bank: the bank, not empty.
        recipe: names the index and its factory string.
        rebuild: build it anew in any case.
        progress: show a bar on stderr if that is a terminal.
        asked: whether the factory string is the user's, and not what a bank says that its index was built with.
        encode: fills parts of a new inverted file elsewhere, where the bank is large enough; other indexes are filled here.

    Returns:
        Its manifest, and what was done, in words.

    Raises:
        InputError: for an empty bank, a factory string that FAISS does not know, too few images to train it, or a full disk;
            for a build that takes long and that nobody asked for.
    """
    check_not_empty(bank)
    faiss, folder = import_faiss(), IndexFolder(ImageIndexManifest, bank, recipe.name)
    before = folder.read_if_usable()
    index, why_anew = (None, REBUILD_ASKED_FOR) if rebuild else _index_to_add_to(bank, recipe, folder, before)
    kept = before if index is not None else None
    names = {shard.sha256 for shard in kept.shards} if kept else set()
    missing = [number for number, shard in enumerate(bank.manifest.shards) if shard.sha256 not in names]
    if kept and not missing:
        return kept, UP_TO_DATE
    trained = kept.trained if kept else 0
    try:
        if index is None:
            if not asked:
                remedy = f"to go on, run: {index_command(bank.path, 'FILE.yaml')}"
                check_stored_factory(recipe.build.image, bank.layout.embedding_dim, remedy)
            empty_index(bank.layout.embedding_dim, recipe.build.image)  # raises an error for a string that is not taken
            index = faiss.index_factory(bank.layout.embedding_dim, recipe.build.image, faiss.METRIC_L2)
            if not index.is_trained:
                _train(index, bank)
                trained = len(bank.manifest.shards)
        jobs = image_jobs(bank, missing)
        if encode is not encode_here and index.ntotal == 0 and len(jobs) > 1 and can_merge(index):
            folder.files.mkdir(parents=True, exist_ok=True)
            encoding = ImageEncoding.of(index, bank, recipe.build.image, folder.files)
            add_parts(index, encoding, jobs, encode, progress)
        else:
            _add_shards(index, bank, missing, progress)
    except RuntimeError as error:
        raise InputError(
            f"FAISS could not make {recipe.build.image!r} for {len(bank)} embeddings of d={bank.layout.embedding_dim}: {error}"
        ) from error
    build = folder.next_build(before.build + 1 if before else 0)
    folder.files.mkdir(parents=True, exist_ok=True)
    added = [bank.manifest.shards[number] for number in missing]
    manifest = ImageIndexManifest(
        recipe=recipe.name,
        generation=bank.generation,
        build=build,
        trained=trained,
        shards=(
            *(kept.shards if kept else ()),
            *(IndexedShard(sha256=shard.sha256, count=shard.count) for shard in added),
        ),
        faiss=faiss.__version__,
        factory=recipe.build.image,
        file=write_index(index, folder.files / _file_name(build)),
    )
    folder.write(manifest)
    folder.sweep(manifest)
    return manifest, outcome(before, why_anew, sum(shard.count for shard in added))


def load_index(folder: IndexFolder[ImageIndexManifest], manifest: ImageIndexManifest, d: int) -> Any:
    """Load the FAISS index that a manifest names.

    The checksum guards against accidents; the file is read as one that anybody may have made, see `read_index`.

    Args:
        folder: its place.
        manifest: its manifest.
        d: the length of the bank's embeddings.

    Raises:
        BankError: if the file is missing, is not the one that was written, is not of the manifest's factory string, or has
            another number of entries.
    """
    folder.check_content(manifest.file)
    path = folder.files / manifest.file.file
    try:
        index = read_index(path, d, manifest.factory)
    except (BankError, InputError) as error:
        raise BankError(f"{error}; rebuild it with: {folder.command(rebuild=True)}") from error
    if index.ntotal != manifest.count:
        raise BankError(
            f"{path} holds {index.ntotal} entries, its manifest says {manifest.count}; "
            f"rebuild it with: {folder.command(rebuild=True)}"
        )
    return index


def check_entries(
    bank: Snapshot,
    index: Any,
    shards: Sequence[IndexedShard],
    folder: IndexFolder[ImageIndexManifest],
    *,
    most: int | None = _SAMPLED,
) -> None:
    """Check on some entries that an HNSW index holds the bank's embeddings, and that its graph leads to them.

    A graph that was tampered with finds other neighbors than it should, and nothing else tells: distances are evaluated anew.

    Args:
        bank: the bank.
        index: the index.
        shards: the shards whose images it holds, in the order of its entries.
        folder: its place, for the message.
        most: how many entries to look at, drawn at random; None for all.

    Raises:
        BankError: if it holds another vector than the bank, or finds less than half of the entries by their own vectors.
    """
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexHNSWFlat):
        return
    everything = bank.with_removed()
    place = {shard.sha256: number for number, shard in enumerate(bank.manifest.shards)}
    rows = np.concatenate(
        [
            np.empty(0, np.int64),
            *(
                everything.rows_of_shard(place[shard.sha256]) if shard.sha256 in place else np.full(shard.count, -1)
                for shard in shards
            ),
        ]
    )
    if len(rows) != index.ntotal:
        raise BankError(
            f"index {folder.path} holds {index.ntotal} entries, its shards {len(rows)} images; "
            f"rebuild it with: {folder.command(rebuild=True)}"
        )
    entries = np.flatnonzero(rows >= 0)
    if most is not None:
        entries = np.sort(np.random.default_rng(_SEED).permutation(entries)[:most])
    vectors = faiss.downcast_index(index.storage)
    missed = 0
    for start in range(0, len(entries), _SAMPLED):
        some = entries[start : start + _SAMPLED]
        xb = everything.embedding(rows[some])
        if not np.array_equal(vectors.reconstruct_batch(some), xb):
            raise BankError(f"index {folder.path} holds other vectors than the bank; run: {folder.command(rebuild=True)}")
        D, _ = index.search(xb, 1)
        missed += int(np.sum(D[:, 0] != 0))
    if 2 * missed > len(entries):
        raise BankError(
            f"index {folder.path} does not find {missed} of {len(entries)} of its entries by their own vectors; "
            f"run: {folder.command(rebuild=True)}"
        )


def _check_query(query: str, ntotal: int) -> None:
    """Raise InputError if a FAISS parameter string asks for more than the index could ever use."""
    most = max(ntotal, _MOST_ASKED)
    for setting in query.replace(",", " ").split():
        name, _, text = setting.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= most:
            raise InputError(
                f"FAISS does not take the query parameters {query!r} for this index: {name} must be a number from 0 to {most}"
            )


def _file_name(build: int) -> str:
    return f"image-{build:06d}.faiss"


def _index_to_add_to(
    bank: Snapshot, recipe: Recipe, folder: IndexFolder[ImageIndexManifest], before: ImageIndexManifest | None
) -> tuple[Any, str | None]:
    """Load the index that is there, if it can be added to; return None, and why not, otherwise."""
    if before is None:
        return None, None
    if difference := before.difference(recipe):
        return None, f"it {difference}"
    if why := too_many_tombstones(bank, before.shards) or why_train_anew(bank, before.shards, before.trained):
        return None, why
    try:
        index = load_index(folder, before, bank.layout.embedding_dim)
        check_entries(bank, index, before.shards, folder)
    except BankError as error:
        _log.warning("%s", error)
        return None, f"its file {before.file.file} is missing or damaged"
    return index, None


def _train(index: Any, bank: Snapshot) -> None:
    rows = np.random.default_rng(_SEED).permutation(len(bank))[:_TRAIN_ROWS]
    index.train(bank.embedding(np.sort(rows)))


def _add_shards(index: Any, bank: Snapshot, shards: Sequence[int], progress: bool) -> None:
    """Add all images of some shards, removed ones too, so that they can be restored."""
    everything = bank.with_removed()
    with progress_bar(sum(bank.manifest.shards[number].count for number in shards), "index", progress) as bar:
        for number in shards:
            xb = everything.embeddings_of_shard(number)
            index.add(xb)
            bar.update(len(xb))
