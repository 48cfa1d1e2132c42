"""Measures what others do with the very same features. It is optional, and the package never imports it.

- `published` is the loop of SPADE-pytorch, written out by us. Its seconds are extrapolated from its first blocks, and what it
  finds there is compared with exact search.
- `rebuilt` makes an `IndexFlatL2` anew for every image and level.
- `patchcore` is anomalib's PatchCore, in an environment of its own: --patchcore-python says which Python. Its layers are the
  two coarser levels; it gets these maps in place of those of its backbone, so that nothing but the method differs. With
  `picked_by: "kernel"`, this project's greedy k-center picks its coreset, from its own vectors: where anomalib takes hours.

Variants that compare the same place only are recipes, not peers: `location` with radius=0, and `history` for all normal images.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gallery import galleries, pair
from benchmarks.loops import MEASURED_CHUNKS, published, rebuilt
from benchmarks.process import peak_bytes
from benchmarks.sweep.pixel_level import MEMORY, arrays_of
from benchmarks.sweep.points import PeerPoint
from benchmarks.sweep.sets import PixelSet, Places, pixel_set
from benchmarks.sweep.store import Raw
from spade_faiss import Bank, Detector
from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.core.settings import Method, Run
from spade_faiss.scoring.fusion import score_maps
from spade_faiss.search.coreset import k_center
from spade_faiss.search.distances import import_faiss

PYTHON = "SPADE_FAISS_PATCHCORE_PYTHON"
_SIGMA = 4.0
_SAME = 1e-3
# Even the first blocks of an image take seconds.
_PUBLISHED_IMAGES = 2
# Without this, the C library does not return the memory that PatchCore frees, and the system may kill the process.
_PATCHCORE_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
_PATCHCORE_MEMORY = 8 << 30


def measure(point: PeerPoint, places: Places) -> Raw:
    """Measure a peer.

    Raises:
        InputError: for an unknown one.
        DependencyError: for `patchcore` without its environment.
    """
    import_faiss().omp_set_num_threads(point.threads)
    chosen = pixel_set(point.set, places, normals=point.normals).part(point.images)
    if point.peer == "patchcore":
        return _patchcore(point, chosen, places)
    if point.peer not in ("published", "rebuilt"):
        raise InputError(f"peer {point.peer!r} is not one of published, rebuilt, patchcore")
    bank = Bank.open(chosen.bank)
    k_image = min(5, len(bank))
    detector = Detector.open(chosen.bank, method=Method(k_image=k_image, k_gallery=point.k), run=Run(memory=MEMORY))
    facts: dict[str, Any] = {"train_s": 0.0, "add_s": 0.0, "bytes": 0, "bank_bytes": bank.bytes_on_disk, "normals": len(bank)}
    if point.peer == "published":
        return _published(point, chosen, detector, facts)
    scores = detector.score_features(chosen.tests)
    rows, levels = galleries(bank, scores, point.k), bank.layout.levels
    taken = []
    start = time.perf_counter()
    for place in range(len(chosen.tests)):
        one = chosen.tests[place : place + 1]
        begun = time.perf_counter()
        found = [rebuilt(*pair(bank, level, one, rows[place]))[0] for level in levels]
        dist = [np.sqrt(D).reshape(1, level.height, level.width) for D, level in zip(found, levels, strict=True)]
        scores.maps[place] = score_maps(dist, bank.layout.input_size, _SIGMA)[0]
        taken.append(time.perf_counter() - begun)
        for level, values in zip(levels, dist, strict=True):
            scores.level_dist[level.name][place] = values[0]
    if chosen.tests.valid is not None:
        np.multiply(scores.maps, chosen.tests.valid, out=scores.maps)
    facts |= {"all_s": time.perf_counter() - start, "batch": 1, "peak_bytes": peak_bytes()}
    return Raw(point, {**arrays_of(chosen, scores, bank), "latency_s": np.array(taken)}, facts)


def _published(point: PeerPoint, chosen: PixelSet, detector: Detector, facts: dict[str, Any]) -> Raw:
    bank, tests = detector.bank, chosen.tests[: min(_PUBLISHED_IMAGES, len(chosen.tests))]
    rows = galleries(bank, detector.score_features(tests), point.k)
    taken, off = [], 0.0
    for place, of_image in enumerate(rows):
        total = 0.0
        for level in bank.layout.levels:
            xq, xb = pair(bank, level, tests[place : place + 1], of_image)
            nearest, extrapolated = published(xq, xb, MEASURED_CHUNKS)
            total += extrapolated
            first = np.sqrt(rebuilt(xq, xb[: 100 * MEASURED_CHUNKS])[0][:, 0])
            off = max(off, float(np.abs(nearest - first).max() / max(float(first.max()), 1e-12)))
        taken.append(total)
    if off > _SAME:
        raise RuntimeError(f"the published loop found other distances, by {off}")
    facts |= {"batch": 1, "extrapolated": True, "off_exact": off, "peak_bytes": peak_bytes()}
    return Raw(point, {"latency_s": np.array(taken)}, facts)


def _patchcore(point: PeerPoint, chosen: PixelSet, places: Places) -> Raw:
    python = os.environ.get(PYTHON)
    if not python:
        raise DependencyError(
            f"anomalib is not in this environment; make one for it and say where: --patchcore-python PYTHON "
            f"(python -m venv peer && peer/bin/pip install anomalib), or set {PYTHON}"
        )
    bank = Bank.open(chosen.bank)
    names = [level.name for level in bank.layout.levels][1:]
    with tempfile.TemporaryDirectory(dir=places.scratch) as folder:
        given, taken = Path(folder) / "given.npz", Path(folder) / "taken.npz"
        arrays: dict[str, Any] = {}
        for name in names:
            arrays[f"normal {name}"] = np.stack([bank.level_map(name, row) for row in range(len(bank))])
            arrays[f"test {name}"] = np.asarray(chosen.tests.levels[name], np.float16)
        np.savez(given, **arrays)
        script = Path(__file__).with_name("patchcore_child.py")
        settings = {"ratio": 0.01, "picked_by": "anomalib", **point.settings}
        command = [python, str(script), str(given), str(taken), str(settings["ratio"]), str(point.threads)]
        begun, picking_s = time.perf_counter(), 0.0
        if settings["picked_by"] == "kernel":
            picked = Path(folder) / "picked.npy"
            command.append(str(picked))
            _run_patchcore(command, folder)
            vectors = np.load(picked)
            start = time.perf_counter()
            picks, _ = k_center(vectors, int(settings["ratio"] * len(vectors)))
            picking_s = time.perf_counter() - start
            np.save(picked, picks)
        _run_patchcore(command, folder)
        wall_s = time.perf_counter() - begun
        with np.load(taken) as found:
            results = {name: found[name] for name in found}
    facts = {name: results.pop(name).item() for name in ("train_s", "all_s", "peak_bytes", "memory_bytes", "version")}
    facts["train_s"] += picking_s
    facts |= {"add_s": 0.0, "bytes": facts["memory_bytes"], "batch": 1, "wall_s": wall_s, "normals": len(bank)}
    measured: dict[str, Any] = {
        "latency_s": results["latency_s"],
        "map_score": results["score"],
        "image_score": results["score"],
    }
    if chosen.defective is not None:
        measured["defective"] = chosen.defective
    if chosen.masks is not None and chosen.valid is not None:
        measured |= {"maps": results["maps"], "masks": chosen.masks, "valid": chosen.valid}
    return Raw(point, measured, facts)


def _run_patchcore(command: list[str], folder: str) -> None:
    limited = ["prlimit", f"--data={_PATCHCORE_MEMORY}", *command]
    # Its output is shown only if it fails: progress bars are of no use here.
    done = subprocess.run(
        limited, check=False, env={**os.environ, **_PATCHCORE_ENVIRONMENT}, cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"patchcore ended with {done.returncode}: {done.stderr[-500:]}")
