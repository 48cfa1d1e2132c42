"""Reads the measurements that come with the package, and picks those that tell most about a workload.

`measured.json` is made by `python -m benchmarks.pages` from the committed results. A row of the image level says what an index
over n embeddings cost and lost, a row of the pixel level what a search of the neighbors' maps did. Costs are those of the next
larger size that was measured, never a formula's; beyond the largest, there is no answer unless it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from spade_faiss.core.errors import InputError

SCHEMA = 1
# These recipes compare a location with those near the same place only, which is another definition of a score: it suits images
# that are aligned.
ALIGNED = ("location", "history")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """Measured rows that stand for a workload.

    Args:
        rows: what was measured.
        factor: by how much their times are to be multiplied; above 1 beyond what was measured.
        note: how far they are from the workload, in a sentence; empty if they are what was asked for.
    """

    rows: Sequence[Row]
    factor: float = 1.0
    note: str = ""


def load_measured() -> dict[str, Any]:
    """Read the measurements that come with the package.

    Raises:
        InputError: if they are of another schema.
    """
    measured: dict[str, Any] = json.loads(files("spade_faiss.diagnostics").joinpath("measured.json").read_bytes())
    if measured.get("schema") != SCHEMA:
        raise InputError(f"measured.json is of schema {measured.get('schema')}, expected {SCHEMA}; install the package again")
    return measured


def select_image_rows(rows: Sequence[Row], images: int, k: int, *, extrapolate: bool) -> Selection:
    """Pick the image-level rows of the next larger measured k and number of images.

    Raises:
        InputError: if fewer images were measured and `extrapolate` is False.
    """
    larger = [value for value in sorted({row["k"] for row in rows}) if value >= k]
    at_k = larger[0] if larger else max(row["k"] for row in rows)
    most = f"the most that was measured, N={{n:,}} at K={at_k}; measure more (benchmarks/sweeps/image.yaml)"
    beyond = "times grow in proportion, recall is assumed to stay"
    return _of_size([row for row in rows if row["k"] == at_k], images, most, beyond, extrapolate=extrapolate)


def select_pixel_rows(rows: Sequence[Row], k: int, shapes: str, *, extrapolate: bool) -> Selection:
    """Pick the pixel-level rows of a backbone's shapes at the next larger measured K.

    Raises:
        InputError: if only smaller K were measured and `extrapolate` is False.
    """
    of_shapes = [row for row in rows if row["set"] == shapes]
    # At some K, only one recipe was measured: nothing can be compared there.
    ks = sorted({row["k"] for row in of_shapes if len({other["recipe"] for other in of_shapes if other["k"] == row["k"]}) > 1})
    at_k = next((value for value in ks if value >= k), ks[-1])
    chosen = [row for row in of_shapes if row["k"] == at_k]
    if at_k == k:
        return Selection(chosen)
    if at_k > k:
        return Selection(chosen, note=f"K={k} lies between what was measured; taken is what K={at_k} costs and loses")
    beyond = k / at_k
    if not extrapolate:
        raise InputError(
            f"k={k} is {beyond:.1f} times the largest measured, K={at_k}; measure it (benchmarks/sweeps/pixel.yaml), "
            f"or take the risk with: --extrapolate"
        )
    note = f"EXTRAPOLATED {beyond:.1f} times beyond K={at_k}: times grow in proportion, losses stay as they are"
    return Selection(chosen, beyond, note)


def select_whole_rows(rows: Sequence[Row], images: int, shapes: str, *, extrapolate: bool) -> Selection:
    """Pick the rows that searched all normals of a bank of a backbone's shapes, at the next larger measured number of images.

    Raises:
        InputError: if the shapes were not measured, or only with fewer images and `extrapolate` is False.
    """
    of_shapes = [row for row in rows if row["set"] == shapes]
    if not of_shapes:
        raise InputError(f"k=all was not measured for {shapes}, only for {', '.join(sorted({row['set'] for row in rows}))}")
    most = "the most whose maps were all searched, N={n:,}; measure more (benchmarks/whole_bank.py)"
    return _of_size(of_shapes, images, most, "times and memory grow in proportion", extrapolate=extrapolate)


def _of_size(rows: Sequence[Row], images: int, most: str, beyond: str, *, extrapolate: bool) -> Selection:
    """Pick the rows of the next larger measured number of images; `most` and `beyond` are for what is said of larger ones."""
    sizes = sorted({row["n"] for row in rows})
    n = next((size for size in sizes if size >= images), sizes[-1])
    chosen = [row for row in rows if row["n"] == n]
    if n == images:
        return Selection(chosen)
    if n > images:
        return Selection(chosen, note=f"N={images:,} lies between what was measured; taken is what N={n:,} costs and loses")
    factor = images / n
    if not extrapolate:
        raise InputError(
            f"images={images:,} is {factor:.1f} times as many as {most.format(n=n)}, or take the risk with: --extrapolate"
        )
    return Selection(chosen, factor, f"EXTRAPOLATED {factor:.1f} times beyond N={n:,}: {beyond}")


def worst_losses_of_whole(rows: Sequence[Row]) -> dict[str, float]:
    """Return the most that each recipe, by its name, may have lost on any real set whose maps were all searched."""
    worst: dict[str, float] = {}
    for row in _rows_of_real_sets(rows):
        worst[name_of(row)] = max(worst.get(name_of(row), 0.0), row["lost"])
    return worst


def worst_losses(rows: Sequence[Row], k: int) -> dict[str, float]:
    """Return the most that each recipe, by its name, may have lost on any real set, at the measured K that is nearest."""
    real = _rows_of_real_sets(rows)
    if not real:
        return {}
    nearest = min({row["k"] for row in real}, key=lambda value: abs(value - k))
    worst: dict[str, float] = {}
    for row in real:
        if row["k"] == nearest:
            worst[name_of(row)] = max(worst.get(name_of(row), 0.0), row["lost"])
    return worst


def sets_of(rows: Sequence[Row], name: str) -> list[str]:
    """Return the real sets on which a recipe was measured."""
    return sorted({row["set"] for row in _rows_of_real_sets(rows) if name_of(row) == name})


def name_of(pixel: Row) -> str:
    """Name the recipe of a pixel-level row, with its settings."""
    return " ".join([pixel["recipe"], *(f"{name}={value}" for name, value in {**pixel["build"], **pixel["query"]}.items())])


def _rows_of_real_sets(rows: Sequence[Row]) -> list[Row]:
    """The rows of real sets. Recipes that compare places count on aligned images alone, since they are asked for there."""
    return [row for row in rows if row["lost"] is not None and (row["recipe"] not in ALIGNED or row.get("aligned", True))]


def by_kernel(pixel: Row, kernel: Sequence[Row]) -> Row:
    """Return a pixel-level row as it would be by the compiled kernel, if it is exact search and both were measured."""
    for row in kernel:
        if pixel["recipe"] == "exact" and (row["set"], row["k"]) == (pixel["set"], pixel["k"]):
            return {
                **pixel,
                "pixel_ms": pixel["pixel_ms"] / row["times"],
                "times": row["times"],
                "simd_level": row["simd_level"],
            }
    return pixel
