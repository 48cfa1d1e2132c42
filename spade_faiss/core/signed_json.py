"""Signed JSON: manifests that name their format and schema and carry a checksum of their own content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from spade_faiss.core.copies import copy_of
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, write_bytes
from spade_faiss.core.inside import read_regular
from spade_faiss.core.schema import cut, from_mapping, shorten

T = TypeVar("T")

# What is read takes up to twenty times as much memory as the file is long, and more where it is nothing but lists in lists. The
# manifest of a bank holds two for each shard, and is read a few times by a command.
_MOST_BYTES = 8 << 20
_MOST_CONTAINERS = 1 << 15
# How much is said about a value: it may be as long as the file.
_MOST_CHARACTERS = 1000


def write_signed(
    path: Path, format: str, schema: int, content: dict[str, Any], files: Iterable[tuple[Path, FileEntry]] = ()
) -> None:
    """Create or replace a signed JSON file, atomically; of a bank at a URL, there, and only if nobody else has replaced it.

    Args:
        path: the file.
        format: the format that it names.
        schema: the schema of that.
        content: what it holds.
        files: the files that it names, which are at the URL before it is.

    Raises:
        BusyError: if somebody else has replaced it at the URL since it was read.
        StorageError: if the URL cannot be reached.
        InputError: for content that is longer than `read_signed` reads, or holds more lists and mappings.
    """
    signed = {"format": format, "schema": schema, **content}
    signed["sha256"] = hash_json(signed)
    data = (json.dumps(signed, indent=1) + "\n").encode()
    if len(data) > _MOST_BYTES or _containers(data) > _MOST_CONTAINERS:
        raise InputError(
            f"{path} would take {len(data)} bytes and {_containers(data)} lists and mappings, at most {_MOST_BYTES} and "
            f"{_MOST_CONTAINERS} are read; compact the bank"
        )
    if (copy := copy_of(path)) is not None:
        copy.commit(path, data, files)
    else:
        write_bytes(path, data)


def read_signed(
    path: Path, cls: type[T], format: str, schema: int, remedy: str, wrong: Callable[[T, dict[str, Any]], str] | None = None
) -> T:
    """Read a signed JSON file into a dataclass.

    Args:
        path: the file.
        cls: the dataclass that its content is checked against.
        format: the format that the file must name.
        schema: the schema that this version reads.
        remedy: what the user can do about a file that cannot be used; it ends the message.
        wrong: says what is wrong with what was read, given what the file says in its own words; empty if nothing is.

    Raises:
        BankError: if the file is damaged, is too long, a link or no file, or is of another format or schema.
        AccessError: if the operating system does not open it.
    """
    data = read_regular(path, _MOST_BYTES, remedy)
    if (containers := _containers(data)) > _MOST_CONTAINERS:
        raise BankError(f"{path} is damaged: it holds {containers} lists and mappings, more than {_MOST_CONTAINERS}; {remedy}")
    try:
        content = json.loads(data, parse_constant=_refuse, parse_float=_finite)
        found_format, found_schema = content.pop("format"), content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BankError(f"{path} is damaged ({error}); {remedy}") from error
    if found_format != format:
        raise BankError(f"{path} is damaged: it is of format {shorten(found_format)}, expected {format!r}; {remedy}")
    if found_schema != schema or isinstance(found_schema, bool):
        is_newer = isinstance(found_schema, int) and found_schema > schema
        advice = f"it was written by a newer spade_faiss: install that, or {remedy}" if is_newer else remedy
        raise BankError(f"{path} has schema {shorten(found_schema)}, this version reads {schema}; {advice}")
    recorded = content.pop("sha256", None)
    try:
        digest = hash_json({"format": format, "schema": schema, **content})
    except RecursionError as error:
        raise BankError(f"{path} is damaged (it is nested too deep); {remedy}") from error
    if recorded != digest:
        raise BankError(f"{path} is damaged: its content has sha256 {digest}, it records {shorten(recorded)}; {remedy}")
    try:
        found = from_mapping(cls, content, str(path))
    except InputError as error:
        raise BankError(f"{cut(str(error), _MOST_CHARACTERS)}; {remedy}") from error
    except (OverflowError, RecursionError) as error:
        raise BankError(f"{path} is damaged: it holds a value out of range ({error}); {remedy}") from error
    if wrong is not None and (said := wrong(found, content)):
        raise BankError(f"{path} is damaged: {said}; {remedy}")
    return found


def hash_json(content: dict[str, Any]) -> str:
    """Return the sha256 of a mapping, which does not depend on the order of keys or on white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _containers(data: bytes) -> int:
    """Return how many lists and mappings JSON holds; brackets in texts are counted, too."""
    return data.count(b"[") + data.count(b"{")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(text: str) -> float:
    raise ValueError(f"it holds {text[:80]}, which is not finite")
