"""The codes of a bank: the file that holds its bases and scales. Only this module names what is in it."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from spade_faiss.core.arrays import map_arrays, write_arrays
from spade_faiss.core.copies import copy_of
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, check_file
from spade_faiss.core.inside import check_inside
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Arrays
from spade_faiss.features.code_losses import LevelLoss
from spade_faiss.features.codes import Codes, LevelCodes, check_codes
from spade_faiss.features.layout import Layout

CODES = "codes.h5"
# At a URL, several writers may learn codes at the same time, of whom one is the first to commit.
_NAME = re.compile(r"codes(-[0-9a-f]{8})?\.h5")
SCHEMA = 1

_REMEDY = "restore it from a backup, or make the bank anew"
_OPEN_CODES = 16


@dataclass(frozen=True, kw_only=True)
class CodesEntry(FileEntry):
    """A manifest's record of how its maps become codes.

    Args:
        pictures: the number of pictures that the codes were learned from, the first ones of the bank.
        losses: what the codes lose at each level, measured between some of them; empty if that was one picture.
    """

    pictures: int
    losses: tuple[LevelLoss, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("pictures", self.pictures, 1)


def write_codes(folder: Path, codes: Codes, pictures: int, losses: tuple[LevelLoss, ...]) -> CodesEntry:
    """Write the codes of the bank in `folder`; no state of the bank may have others.

    Raises:
        InputError: if the disk has no room for them.
    """
    arrays: Arrays = {}
    for name, of_level in codes.levels.items():
        arrays |= {f"level/{name}/{part}": array for part, array in vars(of_level).items() if array is not None}
    own = "" if copy_of(folder) is None else f"-{secrets.token_hex(4)}"
    path = check_inside(folder, CODES.replace(".", f"{own}."))
    digest = write_arrays(path, arrays, attributes={"schema": SCHEMA})
    return CodesEntry(**vars(FileEntry.of(path, digest)), pictures=pictures, losses=losses)


def codes_path(folder: Path, entry: CodesEntry) -> Path:
    """Return the path of the file of the codes; raise BankError if they are said to be in another file of the bank."""
    if not _NAME.fullmatch(entry.file):
        raise BankError(f"the bank {folder} is damaged: its codes are said to be in {entry.file}, not in {CODES}; {_REMEDY}")
    return check_inside(folder, entry.file)


def check_codes_file(folder: Path, entry: CodesEntry) -> None:
    """Raise BankError if the file of the codes is not the one that the manifest records; see `check_file`."""
    path = codes_path(folder, entry)
    check_file(path, entry, f"the codes {path}", "the manifest", _REMEDY)


@lru_cache(maxsize=_OPEN_CODES)
def read_codes(path: Path, sha256: str, layout: Layout) -> Codes:
    """Read the codes of a bank.

    Args:
        path: the file.
        sha256: its checksum, which is not compared; see `map_arrays`.
        layout: the layout of the bank.

    Raises:
        BankError: for a file that is missing or damaged, or cannot be the codes of a bank of this layout.
    """
    mapped = map_arrays(path, sha256)
    mapped.check_length()
    found = {name: np.array(array) for name, array in mapped.arrays.items()}
    try:
        levels = {}
        for level in layout.levels:
            center, basis, scale, bits = (
                found.pop(f"level/{level.name}/{part}", None) for part in ("center", "basis", "scale", "bits")
            )
            if center is None or scale is None:
                raise InputError(f"it has no codes of level {level.name!r}")
            levels[level.name] = LevelCodes(center=center, basis=basis, scale=scale, bits=bits)
            check_codes(levels[level.name], level)
        if found:
            raise InputError(f"it holds {min(found)}, which is of no level")
    except InputError as error:
        raise BankError(f"{path} is damaged: {error}; {_REMEDY}") from error
    return Codes(levels)
