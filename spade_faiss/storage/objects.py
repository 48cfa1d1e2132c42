"""Objects at a URL: what storage has to do for a bank, pictures and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spade_faiss.storage.url import Url


def ignore(_: int) -> None:
    """Take note of nothing."""


class Taken(Exception):
    """There is an object of that name already, or another version of it than the one that was to be replaced."""


class NoConditions(Exception):
    """The storage cannot write on a condition."""


@dataclass(frozen=True)
class Stored:
    """An object: its name below the URL, its size, its version, and when it was written by the clock of the storage.

    Attributes:
        name: the name.
        bytes: the size.
        version: what changes when it is replaced, such as an ETag; empty where the storage has none. What is written on a
            condition takes the version that comes with the content: some storage lists a part of it.
        modified_s: the seconds since 1970.
    """

    name: str
    bytes: int
    version: str
    modified_s: float


class ObjectStore(Protocol):
    """What lies at a URL. Every method raises StorageError where the storage cannot be reached, or refuses."""

    url: Url

    def list(self) -> list[Stored]:
        """Return all objects below the URL, sorted by name."""

    def find(self, name: str) -> Stored | None:
        """Return what is known of an object; None if there is none."""

    def read(self, name: str, most: int) -> tuple[bytes, str]:
        """Return the content of an object, `most` bytes and one more at most, and the version that `replace` takes.

        Raises:
            FileNotFoundError: if there is none.
        """

    def download(self, name: str, path: Path, advance: Callable[[int], object] = ignore) -> None:
        """Write an object to a file, and say how many bytes have come; raises what `read` raises."""

    def create(self, name: str, content: bytes | Path) -> str:
        """Store an object if there is none of that name; return its version.

        Raises:
            Taken: if there is one.
            NoConditions: if the storage cannot tell.
        """

    def replace(self, name: str, content: bytes, version: str) -> str:
        """Replace an object if it is still of a version that `read`, `create` or `replace` returned; return the new one.

        It raises what `create` raises.
        """

    def put(self, name: str, content: bytes | Path) -> None:
        """Store an object, or replace it whatever it is."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that there are not are passed over."""
