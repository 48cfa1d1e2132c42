"""Stores points: raw arrays and facts about them, in HDF5 files that are written beside their places and renamed into them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from benchmarks.sweep.points import Point, as_mapping, point_id, point_of
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path

FORMAT, SCHEMA = "spade_faiss benchmark point", 1
_PACKED = 1024  # arrays of at least so many bytes are compressed


@dataclass(frozen=True, eq=False)
class Raw:
    """The results of a point.

    Args:
        point: what was measured.
        arrays: neighbors, distances, scores, maps, and every single time that was taken.
        facts: everything else: build times, bytes, the machine, versions.
    """

    point: Point
    arrays: Mapping[str, npt.NDArray[Any]]
    facts: Mapping[str, Any]


def path_of(folder: Path, point: Point) -> Path:
    """Return the path of a point's file."""
    return folder / f"{point_id(point)}.h5"


def write(folder: Path, raw: Raw) -> Path:
    """Write a point's file, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, raw.point)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update({"format": FORMAT, "schema": SCHEMA})
        file.attrs["point"], file.attrs["facts"] = json.dumps(as_mapping(raw.point)), json.dumps(raw.facts)
        for name, array in raw.arrays.items():
            packed = {"compression": "gzip", "compression_opts": 2, "shuffle": True} if array.nbytes >= _PACKED else {}
            file.create_dataset(name, data=array, **packed)
    return path


def read(path: Path) -> Raw:
    """Read a point's file.

    Raises:
        InputError: for a file that does not hold a point.
    """
    try:
        with h5py.File(path) as file:
            if (file.attrs.get("format"), file.attrs.get("schema")) != (FORMAT, SCHEMA):
                raise InputError(f"{path} holds no point of schema {SCHEMA}; measure it again: delete it and run the sweep")
            point = point_of(json.loads(file.attrs["point"]), str(path))
            return Raw(point, {name: np.asarray(data) for name, data in file.items()}, json.loads(file.attrs["facts"]))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_all(folder: Path) -> list[Raw]:
    """Read every point of a folder, without those that are being written."""
    return [read(path) for path in sorted(folder.glob("*.h5"))]
