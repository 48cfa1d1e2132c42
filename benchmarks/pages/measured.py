"""What `spade-faiss recommend` knows: the measurements that the package carries, computed from committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.features import SHAPES
from benchmarks.pages import stores
from benchmarks.stores import SEARCHES
from benchmarks.sweep import page
from benchmarks.sweep.summary import summary_of
from benchmarks.whole_bank import RECIPES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ROOT / "spade_faiss" / "diagnostics" / "measured.json"


def measured() -> str:
    """The text of `measured.json`."""
    found = summary_of(page.load(RESULTS / "sweep" / page.ROWS))
    kernel = json.loads((RESULTS / "kernel.json").read_bytes())
    found["kernel"] = [
        {"set": row["set"], "k": row["k"], "times": round(row["times_that_of"]["faiss"], 2), "simd_level": kernel["simd_level"]}
        for row in kernel["speed"]
        if row["batch"] == 1 and row["set"] in SHAPES  # advice is about a backbone's shapes
    ]
    found["whole"] = list(_whole_rows(json.loads((RESULTS / "whole_bank.json").read_bytes())))
    found["stores"] = list(_store_rows(json.loads((RESULTS / "stores.json").read_bytes())))
    names = ("image", "pixel", "kernel", "whole", "stores")
    parts = {name: "[\n" + ",\n".join(map(json.dumps, found.pop(name))) + "\n]" for name in names}
    return json.dumps(found)[:-1] + "".join(f', "{name}": {lines}' for name, lines in parts.items()) + "}\n"


def _store_rows(figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a picture takes by each store, and the most that it loses on real sets, which were measured with one backbone."""
    quality = figures["quality"]["rows"]
    for store in stores.stores_of(quality):
        lost = max(stores.worst_loss(quality, search, store)[0] for search in SEARCHES)
        taken = max(row["bytes"] for row in quality if row["store"] == store)
        yield {"set": "lite0", "store": store, "bytes": round(taken), "lost": max(0.0, lost)}
    others = [row for row in figures.get("cost", {"rows": []})["rows"] if row["set"] != "lite0"]
    for name, store in dict.fromkeys((row["set"], row["store"]) for row in others):
        taken = max(row["bytes"] for row in others if (row["set"], row["store"]) == (name, store))
        yield {"set": name, "store": store, "bytes": round(taken), "lost": None}


def _whole_rows(figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What searching all normals costs, by recipe and number of normals; what a recipe loses, on the sets with masks."""
    for row in figures["growth"]["rows"]:
        for engine, recipe in RECIPES.items():
            if engine in row.get("ms", {}):
                yield {
                    "set": row["set"],
                    "recipe": recipe,
                    "build": {},
                    "query": {},
                    "n": row["normals"],
                    "pixel_ms": row["ms"][engine]["median"],
                    "peak_bytes": row["memory_bytes"][engine],
                    "bank_bytes_per_image": row["bank_bytes"] / row["normals"],
                    "disk_bytes_per_image": row["index_bytes"].get(engine, 0) / row["normals"],
                    "lost": row["lost"][engine] if row["set"] not in SHAPES else None,
                }
