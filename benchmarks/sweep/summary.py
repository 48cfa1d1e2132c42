"""Summarizes rows for `spade_faiss.diagnostics.recommend`: only what a recipe of the engine can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.sweep.rows import Row
from benchmarks.sweep.sets import NORMALIZED
from benchmarks.sweep.tables import of_kind
from spade_faiss.diagnostics.measurements import SCHEMA

_IMAGE = ("n", "k", "factory", "query", "p50_ms", "memory_bytes_per_image", "disk_bytes_per_image")
_PIXEL = ("set", "recipe", "build", "query", "k", "pixel_ms", "peak_bytes", "bank_bytes_per_image", "disk_bytes_per_image")
_DIFFERENCES = ("image_auroc_difference", "pixel_auroc_difference", "aupro_difference")
# As many candidates beyond k are compared again by true distances as in `index.image_index`.
_SPARE = 8
_SHAPES = ("lite0", "wrn50")
# Real sets that show the same thing at the same place.
_ALIGNED = ("mvtec_bottle",)


def can_recipe(row: Row) -> bool:
    """Whether the engine can do what an image-level row did."""
    return row["rerank"] in (0, row["k"] + _SPARE) and "Refine" not in row["factory"]


def summary_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the measurements that come with the package.

    A recipe compares some candidates beyond k again, so that an index that was measured without can only be better in it.
    Pixel-level rows of generated features say what recipes cost with a backbone's shapes, those of real sets what they lose.
    """
    found = rows[0]["machine"]
    image = []
    for row in of_kind(rows, "image", threads=2):
        if can_recipe(row):
            image.append({**{name: row[name] for name in _IMAGE}, "recall": row["recall_k"]})
    pixel = []
    for row in of_kind(rows, "pixel", threads=2, side=0):
        real = "image_auroc_difference" in row
        if (real and not row["set"].endswith(NORMALIZED)) or (row["set"] in _SHAPES and row["normals"] == 200):
            lost = max([0.0, *(-row[name]["low"] for name in _DIFFERENCES if name in row)]) if real else None
            pixel.append({**{name: row.get(name) for name in _PIXEL}, "lost": lost, "aligned": row["set"] in _ALIGNED})
    machine = f"{found['cpu']}, {found['cores']} cores, faiss-cpu {found['faiss-cpu']}, {found['date']}"
    return {"schema": SCHEMA, "device": "cpu", "machine": machine, "image": image, "pixel": pixel}
