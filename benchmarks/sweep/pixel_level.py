"""Measures a pixel point: scores test images by a recipe over a bank, image by image and in batches."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gallery import IMAGES, PIXELS, off_oracle
from benchmarks.process import drop_from_cache, peak_bytes, read_bytes, resident_bytes
from benchmarks.sweep.points import PixelPoint
from benchmarks.sweep.sets import PixelSet, Places, pixel_set
from benchmarks.sweep.store import Raw
from spade_faiss import Bank, Detector, FeatureBatch, Scores
from spade_faiss.core.files import write_bytes
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.index.build import build_index
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.protocol import resolve_recipe

MEMORY = "2GiB"
# Single images are timed for so many seconds, but at least and at most so many of them.
LATENCY_S, LEAST, MOST = 8.0, 5, 64
_COLD_IMAGES = 5
# Distances of each location are stored for so many images.
STORED_IMAGES = 16
_BATCH = 16
_ORACLE_IMAGES = 2


def built_path(point: PixelPoint, bank: Path) -> Path:
    """Return the path of the file that says what building a point's index cost."""
    return bank / "indexes" / f"built-{point.build_key}.json"


def build(point: PixelPoint, places: Places) -> None:
    """Build the indexes that the recipe of a point needs; it needs a process of its own, for its peak memory is measured."""
    import_faiss().omp_set_num_threads(point.threads)
    bank = Bank.open(pixel_set(point.set, places, normals=point.normals, side=point.side).bank)
    before = resident_bytes()
    built = build_index(bank, point.loaded(), rebuild=True)
    facts = {"train_s": 0.0, "add_s": 0.0, "bytes": 0}
    if built:
        facts |= {"train_s": built.total_s, "bytes": built.bytes}
    path = built_path(point, bank.path)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, json.dumps({**facts, "build_peak_bytes": peak_bytes(), "build_start_bytes": before}).encode())


def needs_build(point: PixelPoint) -> bool:
    """Whether the recipe of a point needs an index."""
    recipe = point.loaded()
    return recipe.needs_image_index or resolve_recipe(recipe).method.train is not None


def measure(point: PixelPoint, places: Places) -> Raw:
    """Score the test images of a set with the settings of a point, and build the indexes first if they were not built."""
    import_faiss().omp_set_num_threads(point.threads)
    chosen = pixel_set(point.set, places, normals=point.normals, side=point.side).part(point.images)
    if not built_path(point, chosen.bank).is_file():
        build(point, places)
    facts: dict[str, Any] = json.loads(built_path(point, chosen.bank).read_text())
    before = resident_bytes()
    detector = open_detector(point, chosen)
    facts["start_bytes"] = resident_bytes()
    facts["memory_bytes"] = facts["start_bytes"] - before
    tests = chosen.tests
    scores = detector.score_features(tests[:1])
    timings = Timings()
    start = time.perf_counter()
    scores = detector.score_features(tests, timings=timings)
    facts |= {"batch": min(_BATCH, len(tests)), "all_s": time.perf_counter() - start, "timing_s": dict(timings.seconds)}
    arrays = arrays_of(chosen, scores, Bank.open(chosen.bank))
    latency, timing_s = single_times(detector, tests)
    arrays |= {"latency_s": latency, **{f"latency_s {stage}": taken for stage, taken in timing_s.items()}}
    facts["peak_bytes"] = peak_bytes()
    if point.recipe == "exact" and detector.bank.layout.normalize == "none":  # the oracle does not normalize features
        oracle = tests[:_ORACLE_IMAGES]
        facts["off_float64"] = off_oracle(detector.bank, oracle, detector.score_features(oracle), point.k)
    arrays["cold_latency_s"], facts["cold_dropped"] = _cold_times(point, chosen)
    bank = detector.bank
    facts |= {
        "normals": len(bank),
        "bank_bytes": bank.bytes_on_disk,
        "levels": [[level.height, level.width, level.channels] for level in bank.layout.levels],
        "input_size": list(bank.layout.input_size),
    }
    return Raw(point, arrays, facts)


def open_detector(point: PixelPoint, chosen: PixelSet) -> Detector:
    """Return the detector of a point."""
    k_image = min(5, len(Bank.open(chosen.bank)))
    return Detector.open(
        chosen.bank, recipe=point.loaded(), method=Method(k_image=k_image, k_gallery=point.k), run=Run(memory=MEMORY)
    )


def arrays_of(chosen: PixelSet, scores: Scores, bank: Bank) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of scores that are stored; the maps are stored only if there are masks to compare them with."""
    row_of = {name: row for row, name in enumerate(bank.ids)}
    digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in scores.maps]
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": np.array([[row_of[name] for name in line] for line in scores.neighbor_ids], np.int32),
        "dist": scores.neighbor_dist,
        "image_score": scores.image_score,
        "map_score": scores.map_score,
        "map_sha256": np.array(digests, "S64"),
        **{f"level_dist {name}": dist[:STORED_IMAGES] for name, dist in scores.level_dist.items()},
    }
    if chosen.defective is not None:
        arrays["defective"] = chosen.defective
    if chosen.masks is not None and chosen.valid is not None:
        arrays |= {"maps": scores.maps, "masks": chosen.masks, "valid": chosen.valid}
    return arrays


def single_times(detector: Detector, tests: FeatureBatch) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
    """Return the seconds of single images, from the features to the map, and those of the two searches in each."""
    taken: list[float] = []
    timing_s: dict[str, list[float]] = {IMAGES: [], PIXELS: []}
    start = time.perf_counter()
    for place in range(min(len(tests), MOST)):
        timings, one = Timings(), tests[place : place + 1]
        begun = time.perf_counter()
        detector.score_features(one, timings=timings)
        taken.append(time.perf_counter() - begun)
        for stage, values in timing_s.items():
            values.append(timings.seconds[stage])
        if time.perf_counter() - start > LATENCY_S and place + 1 >= LEAST:
            break
    return np.array(taken), {stage: np.array(values) for stage, values in timing_s.items()}


def _cold_times(point: PixelPoint, chosen: PixelSet) -> tuple[npt.NDArray[Any], bool]:
    """Seconds of images whose normals have to be read from the disk and decoded, and whether the system did read them."""
    taken, before = [], read_bytes()
    detector = open_detector(point, chosen)
    for place in range(min(_COLD_IMAGES, len(chosen.tests))):
        drop_from_cache(path for path in chosen.bank.rglob("*") if path.suffix in (".h5", ".faiss"))
        one = chosen.tests[place : place + 1]
        start = time.perf_counter()
        detector.score_features(one)
        taken.append(time.perf_counter() - start)
    return np.array(taken), read_bytes() > before
