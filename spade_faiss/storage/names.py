"""Which objects below a URL belong to a bank: the same names as in a folder. A listing may have been made by anybody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
SHARDS = "features"

# A name of a bank's file or folder, as `core.files` has it.
_NAME = "[0-9A-Za-z][0-9A-Za-z._-]{0,127}"
_BELOW = f"(?:products/{_NAME}/)?"
# What is read whole, and replaced as a whole: manifests and what is chosen or computed of a bank.
_DOCUMENT = re.compile(
    rf"{re.escape(MANIFEST)}|tuning\.json|{_BELOW}indexes/{_NAME}/(?:index|gallery)\.json|{_BELOW}calibration/{_NAME}\.json"
)
# What is written once, under a name that nobody else chooses.
_FILE = re.compile(
    rf"{SHARDS}/{_NAME}\.h5|network/{_NAME}|codes[0-9A-Za-z-]*\.h5|{_BELOW}indexes/{_NAME}/(?:{_NAME}\.faiss|gallery/{_NAME}\.h5)"
)
# Below the URL: the empty objects that say since when an object has been named by nobody, and what is tried out.
MARKS = ".leftovers"
PROBES = ".conditions"


def is_document(name: str) -> bool:
    """Whether an object is a manifest, a calibration or a record of a bank."""
    return _DOCUMENT.fullmatch(name) is not None and len(name) < 1024


def is_file(name: str) -> bool:
    """Whether an object is a file that a manifest of a bank names, or was written to be named by one."""
    return _FILE.fullmatch(name) is not None and len(name) < 1024


def named_files(documents: Mapping[str, Path]) -> set[str]:
    """Return the names of all files that the documents of a bank name.

    Args:
        documents: name -> the copy of it.

    Raises:
        ValueError: if one cannot be read: what it names is not known then.
    """
    found: set[str] = set()
    for name, path in documents.items():
        folder = PurePosixPath(name).parent
        for file in _entries(json.loads(path.read_bytes())):
            # Where a file lies follows from its kind; a name that is right in another folder does no harm.
            found |= {str(folder / place / file) for place in ("", "gallery", SHARDS, "network")}
    return found


def _entries(value: Any) -> Iterable[str]:
    """The names of all records of files in a document, see `core.files.FileEntry`."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            if isinstance(file := each.get("file"), str):
                yield file
            pending += each.values()
        elif isinstance(each, list):
            pending += each
