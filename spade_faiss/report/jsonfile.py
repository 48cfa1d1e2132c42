"""`report.json`: every number of a report, for programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import write_bytes
from spade_faiss.core.text import is_hidden


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data` as JSON, atomically; numbers that JSON does not know (NaN, infinities) become null.

    Args:
        path: the file to make or replace; its folder exists.
        data: mappings, sequences, NumPy arrays and scalars, text, numbers, booleans and None, nested at will.

    Raises:
        InputError: if a value is of another type, or a key is not text; the message says where.
    """
    write_bytes(path, (json_text(data, indent=2) + "\n").encode("utf-8"))


def json_text(data: Mapping[str, Any], *, indent: int | None = None) -> str:
    """`data` as JSON text that a terminal may show: what is invisible is escaped, and reads back as what it was.

    Raises:
        InputError: as `write_json`.
    """
    text = json.dumps(_plain(data, "data"), indent=indent, ensure_ascii=False, allow_nan=False)
    if text.isascii() and "\x7f" not in text:
        return text
    # JSON itself escapes only those below U+0020, in strings; outside of strings there are none but its own lines.
    return "".join(_escape(character) if character != "\n" and is_hidden(character) else character for character in text)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where}: key {key!r} is of type {type(key).__name__}, expected text")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise InputError(f"{where} is of type {type(value).__name__}, which JSON cannot hold")
