"""URLs in place of folders: `s3://bucket/parts.bank`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import shorten

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
# What `Path` makes of a URL.
_BROKEN = re.compile(r"[a-z][a-z0-9+-]+:/[^/]")
# What obstore reaches, with writes that depend on a condition; all others are read by fsspec.
CLOUDS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")


@dataclass(frozen=True)
class Url:
    """A place in object storage, or in another file system that has URLs.

    Args:
        scheme: how it is reached, such as `s3`.
        path: the bucket, and what its names begin with there; without a slash at either end.
    """

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def holds(self, other: Url) -> bool:
        """Whether another URL is the same place, or one below it."""
        return self.scheme == other.scheme and f"{other.path}/".startswith(f"{self.path}/")

    @property
    def name(self) -> str:
        """The last part, as the name of a folder; `bank` where no folder is called so."""
        last = self.path.rpartition("/")[2]
        return last if _NAME.fullmatch(last) else "bank"


def is_url(place: object) -> bool:
    """Tell whether a folder was given as a URL. `file://` is a folder of this machine.

    Raises:
        InputError: for a `Path` that was made of a URL: it has lost one of its slashes.
    """
    if isinstance(place, os.PathLike):
        text = os.fspath(place)
        if isinstance(text, str) and _BROKEN.match(text) and not os.path.exists(text):  # noqa: PTH110
            raise InputError(f"{text!r} was a URL before Path() took a slash of it; give the URL as text")
        return False
    return isinstance(place, str) and (found := _URL.fullmatch(place)) is not None and found[1] != "file"


def parse_url(text: str) -> Url:
    """Read a URL.

    Raises:
        InputError: for a URL without a place, with a user and a password, or with `..` in it.
    """
    found = _URL.fullmatch(text)
    if found is None:
        raise InputError(f"{shorten(text)} is no URL; give one such as s3://bucket/parts.bank")
    scheme, path = found[1], found[2].rstrip("/")
    if scheme not in CLOUDS:  # hdfs:///data/parts.bank: there, a place may have no host
        path = path.lstrip("/")
    if "@" in path.split("/", 1)[0]:
        raise InputError(
            f"a {scheme}:// URL must not hold a user or a password: it is shown in results and messages; give these in the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    parts = path.split("/")
    if not parts[0] or any(part in ("", ".", "..") for part in parts) or "?" in path or "#" in path or not path.isprintable():
        raise InputError(f"{shorten(text)} names no place; give a URL such as s3://bucket/parts.bank")
    return Url(scheme, path)


def check_no_url(name: str, place: object) -> None:
    """Raise InputError for a URL where only a folder or a file of this machine is taken."""
    if is_url(place):
        raise InputError(f"{name}={place} is a URL, and a folder or a file of this machine is needed here")


def local_path(place: str | os.PathLike[str]) -> Path:
    """Return the folder or file of this machine that a place is which is no URL; `file://` is taken off."""
    text = os.fspath(place)
    return Path(text.removeprefix("file://")) if text.startswith("file:///") else Path(place)
