"""Folders that are copies of what lies at a URL: which ones this process has, and what messages call them.

The rest of the package works on folders. Where one is a copy, its files are fetched when they are opened, and what is committed
goes to the URL first; `storage` does both. Without a URL nothing is registered here, and nothing is asked of anybody.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol


class Use:
    """The use of a file: it ends when nothing refers to this any more."""


class Entry(Protocol):
    """The record of a file, see `core.files.FileEntry`."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str:
        """Its checksum."""


class Copy(Protocol):
    """The copy of a bank, see `storage.copy`."""

    def refresh(self, *, whole: bool) -> None:
        """Bring the manifest up to date; with `whole`, those of indexes and all calibrations, too."""

    def fetch(self, path: Path, sha256: str, user: object | None = None) -> None:
        """Have a file of the copy on disk, with this checksum, as long as `user` lives, or the process if it is None."""

    def commit(self, path: Path, data: bytes, files: Iterable[tuple[Path, Entry]]) -> None:
        """Store the files that a manifest names, and then the manifest, if nobody else has replaced it since it was read."""

    def check_new(self) -> None:
        """Raise InputError unless a bank can be created at the URL."""

    def sweep(self) -> None:
        """Delete what no manifest has named for long."""

    def store(self, path: Path, entry: Entry) -> None:
        """Store a file that a manifest will name later."""

    def stored_sha256(self, path: Path) -> str:
        """The checksum of what lies at the URL, all of which is read; empty if there is nothing."""

    def is_kept(self, path: Path) -> bool:
        """Whether a file on disk is one that lies at the URL, and not one that nobody has committed."""


# By the folder. One process has few: the banks, pictures and results at URLs that it has opened.
_COPIES: dict[str, tuple[str, Copy | None]] = {}
# What lets go of mapped files that nobody uses at the moment.
_RELEASES: dict[Callable[[], None], None] = {}


def register(folder: Path, url: str, copy: Copy | None = None) -> None:
    """Remember that a folder is a copy of what lies at a URL; messages call it by that."""
    _COPIES[str(folder)] = (url, copy)


def copy_of(path: Path) -> Copy | None:
    """Return the copy that a file or a folder is part of; None for one that is no copy."""
    if not _COPIES:
        return None
    text = os.path.abspath(path)  # noqa: PTH100  # without following links
    for folder, (_, copy) in _COPIES.items():
        if copy is not None and (text == folder or text.startswith(folder + os.sep)):
            return copy
    return None


def url_of(path: Path) -> tuple[Path, str] | None:
    """Return the copy that a path is in, and the URL that it is a copy of; None for a path in no copy."""
    for folder, (url, _) in _COPIES.items():
        if path.is_relative_to(folder):
            return Path(folder), url
    return None


def named(text: str) -> str:
    """Return a text with the URLs of copies in place of their folders."""
    for folder, (url, _) in _COPIES.items():
        text = text.replace(folder, url)
    return text


def fetched(path: Path, sha256: str, user: object | None = None) -> Path:
    """Return the path of a file that is about to be opened; in a copy, it is there then and has this checksum.

    Raises:
        BankError: if what lies at the URL has another checksum.
        StorageError: if it cannot be fetched.
    """
    if (copy := copy_of(path)) is not None:
        copy.fetch(path, sha256, user)
    return path


def let_go_by(release: Callable[[], None]) -> None:
    """Remember what lets go of files that are mapped and not in use."""
    _RELEASES[release] = None


def let_go() -> None:
    """Let go of files that are mapped and not in use, so that they may leave the disk."""
    for release in list(_RELEASES):
        release()
