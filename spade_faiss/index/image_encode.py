"""Encoding the embeddings of a bank elsewhere: an inverted file is trained once, filled in parts, and the parts are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import FileEntry, atomic_path, hash_file
from spade_faiss.core.progress import progress_bar
from spade_faiss.index.encoding import Encode
from spade_faiss.index.faiss_file import read_index
from spade_faiss.search.distances import import_faiss

# A part has about so many embeddings: it carries all centroids, and has to pay for them.
_PART_ROWS = 100_000
_TRAINED = "image-trained.faiss"


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """A part: its number, and the numbers of its shards."""

    number: int
    shards: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ImageEncoding:
    """What parts are filled with.

    Args:
        bank: the bank as if nothing had been removed, so that images can be restored.
        factory: the FAISS factory string.
        folder: where the files of the parts are, and that of the trained index.
        trained: the file of the trained index, which is empty.
    """

    bank: Snapshot
    factory: str
    folder: Path
    trained: FileEntry

    @classmethod
    def of(cls, index: Any, bank: Snapshot, factory: str, folder: Path) -> ImageEncoding:
        """Write a trained index that is empty to a folder."""
        entry = write_index(index, folder / _TRAINED)
        return cls(bank=bank.with_removed(), factory=factory, folder=folder, trained=entry)

    def open(self) -> ImageEncoder:
        """Open the trained index."""
        return ImageEncoder(self)


class ImageEncoder:
    """Fills a trained index with the embeddings of a part.

    Args:
        encoding: what with.

    Raises:
        BankError: if the trained index is missing, damaged or another one.
    """

    def __init__(self, encoding: ImageEncoding) -> None:
        self._encoding = encoding
        self._index = read_part(encoding, encoding.trained)

    def encode(self, job: ImageJob) -> FileEntry:
        """Write the index of a part, atomically."""
        self._index.reset()
        for number in job.shards:
            self._index.add(self._encoding.bank.embeddings_of_shard(number))
        return write_index(self._index, self._encoding.folder / _part_name(job))


def can_merge(index: Any) -> bool:
    """Whether an index is the same when it is filled in parts: an inverted file whose lists are in memory."""
    faiss = import_faiss()
    found = faiss.downcast_index(index)
    if type(found) not in (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer):
        return False  # a graph, for instance, is of all vectors
    return isinstance(faiss.downcast_InvertedLists(found.invlists), faiss.ArrayInvertedLists)


def image_jobs(bank: Snapshot, shards: Sequence[int]) -> list[ImageJob]:
    """Cut shards into parts, in their order."""
    groups, rows = list[list[int]](), 0
    for number in shards:
        if not groups or rows >= _PART_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(number)
        rows += bank.manifest.shards[number].count
    return [ImageJob(number=number, shards=tuple(group)) for number, group in enumerate(groups)]


def add_parts(index: Any, encoding: ImageEncoding, jobs: Sequence[ImageJob], encode: Encode, progress: bool) -> None:
    """Fill a trained index that is empty with parts that are encoded elsewhere; it holds then what `add` puts into it.

    Args:
        index: the index; see `can_merge`.
        encoding: what parts are filled with; its files, and those of the parts, are removed at the end.
        jobs: the parts.
        encode: makes their files.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        BankError: for a file that is not the one that was written.
    """
    made: dict[int, FileEntry] = {}
    shards, following = encoding.bank.manifest.shards, 0
    counts = [sum(shards[number].count for number in job.shards) for job in jobs]
    try:
        with progress_bar(sum(counts), "index", progress) as bar:
            for number, entry in encode(encoding, jobs):
                made[number] = entry
                while following in made:  # in the order of the bank
                    part = made.pop(following)
                    index.merge_from(read_part(encoding, part), index.ntotal)
                    (encoding.folder / part.file).unlink()
                    bar.update(counts[following])
                    following += 1
    finally:
        for name in (_TRAINED, *map(_part_name, jobs)):
            (encoding.folder / name).unlink(missing_ok=True)


def read_part(encoding: ImageEncoding, entry: FileEntry) -> Any:
    """Read the index of a part, or the trained one."""
    path = encoding.folder / entry.file
    if not path.is_file() or hash_file(path) != entry.sha256:
        raise BankError(f"{path} is missing, or is not the file that was written; run the command again")
    return read_index(path, encoding.bank.layout.embedding_dim, encoding.factory)


def write_index(index: Any, path: Path) -> FileEntry:
    """Write a FAISS index, atomically."""
    faiss = import_faiss()
    with atomic_path(path) as temporary:
        # Written by us: FAISS does not notice if there is no room for the end of a file.
        with temporary.open("wb") as opened:
            faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))
        digest = hash_file(temporary)
    return FileEntry.of(path, digest)


def _part_name(job: ImageJob) -> str:
    """What a killed build leaves, the next one sweeps, as files of other builds."""
    return f"image-part-{job.number:06d}.faiss"
