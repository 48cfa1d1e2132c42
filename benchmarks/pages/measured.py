"""What `spade-faiss recommend` knows: the measurements that the package carries, computed from committed results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.features import SHAPES
from benchmarks.sweep import page
from benchmarks.sweep.summary import summary_of

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
    parts = {name: "[\n" + ",\n".join(map(json.dumps, found.pop(name))) + "\n]" for name in ("image", "pixel", "kernel")}
    return json.dumps(found)[:-1] + "".join(f', "{name}": {lines}' for name, lines in parts.items()) + "}\n"
