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


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data` as JSON, atomically; numbers that JSON does not know (NaN, infinities) become null.

    Args:
        path: the file to make or replace; its folder exists.
        data: mappings, sequences, NumPy arrays and scalars, text, numbers, booleans and None, nested at will.

    Raises:
        InputError: if a value is of another type, or a key is not text; the message says where.
    """
    text = json.dumps(_plain(data, "data"), indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (from a file name that is no valid UTF-8) becomes \udcXX, which is how JSON writes it too.
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


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
