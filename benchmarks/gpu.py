"""The GPU's tables: what a card is expected to do (for docs/how-to/gpu.md), and the torch search beside faiss.knn.

Run `python -m benchmarks.gpu --out benchmarks/results` to measure the torch search on this machine's CPU. What is compared
runs in turn, in one process, with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import main_job
from benchmarks.features import SHAPES, Product
from spade_faiss import Level
from spade_faiss.core.memory import format_bytes
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.engines.products import GROUP
from spade_faiss.search.gpu_memory import Job, Machine, plan_gpu
from spade_faiss.search.protocol import Hits, resolve_recipe
from spade_faiss.search.recipe import load_recipe
from spade_faiss.search.workers import Workers

GiB = 1 << 30
REPEATS = 5
TESTS = 2

# A card reaches six tenths of the float32 speed and eight tenths of the bandwidths of its data sheet; the disk and the memory
# are those of a machine that such a card may stand in.
MACHINES = (
    Machine(
        name="8 GB",
        memory_bytes=8 * GiB,
        flops=0.6 * 15e12,
        memory_bytes_per_s=0.8 * 272e9,
        bus_bytes_per_s=0.8 * 16e9,
        disk_bytes_per_s=2e9,
        host_bytes=32 * GiB,
    ),
    Machine(
        name="24 GB",
        memory_bytes=24 * GiB,
        flops=0.6 * 82e12,
        memory_bytes_per_s=0.8 * 1008e9,
        bus_bytes_per_s=0.8 * 32e9,
        disk_bytes_per_s=3e9,
        host_bytes=64 * GiB,
    ),
    Machine(
        name="80 GB",
        memory_bytes=80 * GiB,
        flops=0.6 * 19.5e12,
        memory_bytes_per_s=0.8 * 2039e9,
        bus_bytes_per_s=0.8 * 32e9,
        disk_bytes_per_s=5e9,
        host_bytes=256 * GiB,
    ),
)
NORMALS = (10_000, 1_000_000, 10_000_000)
K = 50

ENGINES = {"faiss": {"engine": "faiss"}, "torch": {"engine": "torch"}, "bfloat16": {"engine": "torch", "product": "bfloat16"}}


def main() -> None:
    """Measure the torch search on this machine's CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figures = {"machine": main_job.machine(), "torch": [row for k in (5, 50) for row in measure(k)]}
    (arguments.out / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures["torch"], indent=1))


def plans() -> str:
    """Return a table with a row for each card and bank."""
    header = (
        "card",
        "normals",
        "step, queries x rows",
        "batch",
        "embeddings",
        "blocks cached",
        "blocks per batch",
        "MB moved per image",
        "MB read per image",
        "compute ms",
        "memory ms",
        "PCIe ms",
        "disk ms",
        "bound",
    )
    lines = [header, ("---",) * len(header)]
    shape = SHAPES["wrn50"]
    for machine in MACHINES:
        for normals in NORMALS:
            plan = plan_gpu(
                machine, Job(levels=shape.levels, embedding_dim=shape.embedding_dim, normals=normals, k_gallery=K), GROUP
            )
            lines.append(
                (
                    machine.name,
                    f"{normals:,}",
                    f"{plan.tile.queries} x {plan.tile.rows}",
                    str(plan.batch),
                    format_bytes(plan.index_bytes) if plan.index_bytes else "host",
                    f"{plan.cached:,} ({100 * plan.cached / normals:.1f} %)",
                    f"{plan.blocks:.0f}",
                    f"{plan.bus_bytes / 1e6:.0f}",
                    f"{plan.disk_bytes / 1e6:.0f}",
                    *(f"{1000 * plan.seconds[name]:.1f}" for name in ("compute", "memory", "PCIe", "disk")),
                    plan.bound,
                )
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(k: int) -> list[dict[str, Any]]:
    """Measure seconds an image at each level of wide_resnet50_2's shapes, and whether bfloat16 gives the same results."""
    import torch

    faiss = import_faiss()
    torch.set_num_threads(faiss.omp_get_max_threads())
    shape, workers, rows = SHAPES["wrn50"], Workers(), []
    product = Product(shape)
    normals, tests = product.normals(0, k), product.tests(TESTS)
    for level in shape.levels:
        blocks = normals.levels[level.name].reshape(k, -1, level.channels)
        xq = tests.levels[level.name].reshape(TESTS, -1, level.channels).astype(np.float32)
        found: dict[str, Hits] = {}
        rows.append(_measure_level(level, blocks, xq, workers, found))
        exact, rounded = found["torch"], found["bfloat16"]
        there = exact.sq_dist > 0
        rows[-1] |= {
            "k": k,
            "of_faiss": float(np.abs(found["faiss"].sq_dist / np.maximum(exact.sq_dist, 1e-12) - 1)[there].max()),
            "bfloat16_same": bool(np.array_equal(rounded.sq_dist, exact.sq_dist) and np.array_equal(rounded.row, exact.row)),
        }
    return rows


def _measure_level(level: Level, stored: Any, xq: Any, workers: Workers, found: dict[str, Hits]) -> dict[str, Any]:
    faiss = import_faiss()
    k = len(stored)
    gathered = stored.reshape(-1, level.channels).astype(np.float32)
    blocks = Blocks(level, ArraySource(stored))
    neighbors = np.tile(np.arange(k), (len(xq), 1))
    tasks: dict[str, Callable[[], object]] = {"knn": lambda: [faiss.knn(q, gathered, 1) for q in xq]}
    for name, settings in ENGINES.items():
        chosen = resolve_recipe(load_recipe("exact").with_query(settings))
        search = chosen.method.open(blocks, workers, chosen.build, chosen.query, None)

        def task(name: str = name, search: Any = search) -> None:
            found[name] = search(xq, neighbors, 1)

        tasks[name] = task
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(REPEATS + 1):
        for name, task_of in tasks.items():
            start = time.perf_counter()
            task_of()
            spent[name].append((time.perf_counter() - start) / len(xq))
    return {"level": level.name, "s_per_image": {name: statistics.median(runs[1:]) for name, runs in spent.items()}}


if __name__ == "__main__":
    main()
