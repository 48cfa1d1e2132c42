"""JSON files that describe what lies beside them: each names its format and schema, and carries a checksum of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spade_faiss.core.errors import BankError
from spade_faiss.core.files import write_bytes


def write_signed(path: Path, format: str, schema: int, content: dict[str, Any]) -> None:
    """Make or replace a description, atomically."""
    whole = {"format": format, "schema": schema, **content}
    whole["sha256"] = hash_json(whole)
    write_bytes(path, (json.dumps(whole, indent=1) + "\n").encode())


def read_signed(path: Path, format: str, schemas: tuple[int, ...], remedy: str) -> tuple[int, dict[str, Any]]:
    """The schema and content of a description.

    Args:
        path: the file.
        format: that it must have.
        schemas: that can be read, the newest last.
        remedy: what to do about a damaged or foreign one; ends the message.

    Raises:
        BankError: if it is damaged, or of another format or schema.
    """
    try:
        content = json.loads(path.read_bytes())
        found, schema = content.pop("format"), content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BankError(f"{path} is damaged ({error}); {remedy}") from error
    if found != format:
        raise BankError(f"{path} is damaged: it is of format {found!r}, expected {format!r}; {remedy}")
    if schema not in schemas or isinstance(schema, bool):
        known = " and ".join(map(str, schemas))
        raise BankError(f"{path} has schema {schema!r}, this version reads {known}; {_other_version(schema, schemas, remedy)}")
    digest = content.pop("sha256", None)
    if digest != (expected := hash_json({"format": found, "schema": schema, **content})):
        raise BankError(f"{path} is damaged: its sha256 is {expected}, it says {digest}; {remedy}")
    return schema, content


def hash_json(content: dict[str, Any]) -> str:
    """The sha256 of what a mapping says, whatever its layout as text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _other_version(schema: object, schemas: tuple[int, ...], remedy: str) -> str:
    newer = isinstance(schema, int) and schema > schemas[-1]
    return f"it was written by a newer spade_faiss: install that, or {remedy}" if newer else remedy
