"""Signed JSON: manifests that name their format and schema and carry a checksum of their own content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import write_bytes
from spade_faiss.core.schema import from_mapping

T = TypeVar("T")


def write_signed(path: Path, format: str, schema: int, content: dict[str, Any]) -> None:
    """Create or replace a signed JSON file, atomically."""
    signed = {"format": format, "schema": schema, **content}
    signed["sha256"] = hash_json(signed)
    write_bytes(path, (json.dumps(signed, indent=1) + "\n").encode())


def read_signed(path: Path, cls: type[T], format: str, schema: int, remedy: str) -> T:
    """Read a signed JSON file into a dataclass.

    Args:
        path: the file.
        cls: the dataclass that its content is checked against.
        format: the format that the file must name.
        schema: the schema that this version reads.
        remedy: what the user can do about a file that cannot be used; it ends the message.

    Raises:
        BankError: if the file is damaged, or is of another format or schema.
    """
    try:
        content = json.loads(path.read_bytes())
        found_format, found_schema = content.pop("format"), content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BankError(f"{path} is damaged ({error}); {remedy}") from error
    if found_format != format:
        raise BankError(f"{path} is damaged: it is of format {found_format!r}, expected {format!r}; {remedy}")
    if found_schema != schema or isinstance(found_schema, bool):
        is_newer = isinstance(found_schema, int) and found_schema > schema
        advice = f"it was written by a newer spade_faiss: install that, or {remedy}" if is_newer else remedy
        raise BankError(f"{path} has schema {found_schema!r}, this version reads {schema}; {advice}")
    recorded = content.pop("sha256", None)
    if recorded != (digest := hash_json({"format": format, "schema": schema, **content})):
        raise BankError(f"{path} is damaged: its content has sha256 {digest}, it records {recorded}; {remedy}")
    try:
        return from_mapping(cls, content, str(path))
    except InputError as error:
        raise BankError(f"{error}; {remedy}") from error


def hash_json(content: dict[str, Any]) -> str:
    """Return the sha256 of a mapping, which does not depend on the order of keys or on white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
