"""Encoding parts of a bank for an index, a file for each part: here, or wherever else the bank is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from spade_faiss.core.files import FileEntry

Job = TypeVar("Job")
Asked = TypeVar("Asked", contravariant=True)


class Encoder(Protocol[Asked]):
    """Has open what it takes to encode."""

    def encode(self, job: Asked) -> FileEntry:
        """Write the file of a part, atomically."""


class Encoding(Protocol[Asked]):
    """What parts of a bank are encoded with; it can be pickled, and opened by another process that has the bank's folder."""

    def open(self) -> Encoder[Asked]:
        """Open the bank, and what was trained."""


class Encode(Protocol):
    """Makes the files of some parts, in any order; yields each with its part's number."""

    def __call__(self, encoding: Encoding[Job], jobs: Sequence[Job]) -> Iterator[tuple[int, FileEntry]]:
        """Make the files."""


def encode_here(encoding: Encoding[Job], jobs: Sequence[Job]) -> Iterator[tuple[int, FileEntry]]:
    """Make the files in this process, see `Encode`."""
    encoder = encoding.open()
    for number, job in enumerate(jobs):
        yield number, encoder.encode(job)
