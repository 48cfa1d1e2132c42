"""Measures stores: what a picture takes as float32, float16 and codes, what codes lose, and what they cost.

Run as `python -m benchmarks.stores --out benchmarks/results --data FOLDER`, FOLDER holding real sets. What is compared runs in
turn, in one process, with the same number of threads. The section `large` takes long, and runs only where --only names it; with
the same folder as --scratch, it goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.features import INPUT_SIZE, SHAPES, Product, load_queries, save_queries, write_bank
from benchmarks.gallery import in_turn, ratio_of
from benchmarks.process import drop_from_cache, machine, peak_bytes, resident_bytes, seconds, spread
from benchmarks.sweep.sets import FULL, POOLED_FULL, PixelSet, Places, pixel_set
from spade_faiss import Bank, Detector, FeatureBatch, convert
from spade_faiss.core.presets import load_preset, of_few
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.store import Store
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics
from spade_faiss.search.recipe import Recipe, load_recipe

Row = dict[str, Any]

QUALITY_SETS = ("mvtec_bottle", "magnetic_tile", "mvtec_screw", "mvtec_toothbrush", "aws_cookies", "elpv")
# float32 is what losses are against; the others are in the order in which they take less.
STORES = ("float32", "float16", "int8", "int4", "int3", "pca16-int8")
# The presets, and how maps are prepared for their methods.
SEARCHES: Mapping[str, str] = {"spade": FULL, "default": POOLED_FULL}
# Of larger sets, so many test images are scored.
MOST_TESTS = 300
COST_STORES: Mapping[str, tuple[str, ...]] = {
    "wrn50": ("float16", "int8", "int4", "pca128-int4", "pca64-int8"),
    "lite0": ("float16", "int8", "int4", "int3", "pca16-int8"),
}
COST_NORMALS, TESTS, REPEATS = 64, 6, 7
MEMORY = "6GiB"
# Of the section `large`: pictures, the store, the most memory, and after how many pictures it is measured on the way.
LARGE, LARGE_SHAPES, LARGE_STORE, LARGE_MEMORY = 100_000, "lite0", "int4", "1GiB"
LARGE_STEPS = (10_000, 30_000, 100_000)
LARGE_ADDED, LARGE_SHARD = 100, 1000
# Generating a picture takes longer than storing it: so many are generated, and the others are those, moved and weighed anew.
_GENERATED = 256
_TOP = 0.01


def main() -> None:
    """Measure sections, and write them to stores.json; the others stay as they are."""
    parser = parser_of(__doc__, SECTIONS, ["quality", "cost"])
    parser.add_argument(
        "--scratch", type=Path, help="where banks are written and kept for the next run; some 5 GB, `large` 9 GB"
    )
    parser.add_argument("--sets", nargs="+", default=QUALITY_SETS, help="the sets of `quality`; rows of others stay")
    arguments = parser.parse_args()
    target = arguments.out / "stores.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        places = Places(arguments.data, arguments.scratch or Path(temporary))
        places.scratch.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            before = figures.get(name, {"rows": []})["rows"] if name == "quality" else []
            rows = [row for row in before if row["set"] not in arguments.sets]
            for row in SECTIONS[name](places, arguments.sets):
                print(name, json.dumps(row), flush=True)
                rows.append(row)
                figures[name] = {"machine": machine(), "rows": rows}
                target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def quality(places: Places, sets: Sequence[str]) -> Iterator[Row]:
    """What each store keeps of the quality of both presets, and what it takes."""
    for name in sets:
        for search, prepared in SEARCHES.items():
            chosen = pixel_set(name + prepared, places).part(MOST_TESTS)
            for store in STORES:
                bank = _stored(chosen.bank, store, places)
                detector = _open(bank, search)
                timings = Timings()
                scores = detector.score_features(chosen.tests, timings=timings)
                yield {
                    "set": name,
                    "search": search,
                    "store": store,
                    "normals": len(bank),
                    "bytes": bank.bytes_on_disk / len(bank),
                    "ms": 1000 * (timings.seconds["prepare"] + timings.seconds["pixel search"]) / len(scores.maps),
                    **_metrics(chosen, scores.image_score, scores.maps),
                    "losses": [vars(loss) for loss in bank.manifest.codes.losses] if bank.manifest.codes else [],
                }


def cost(places: Places, sets: Sequence[str]) -> Iterator[Row]:
    """What the search of a picture takes with each store, beside float16: generated features of two backbones' shapes."""
    for name, stores in COST_STORES.items():
        product = Product(SHAPES[name])
        source = write_bank(places.scratch / "cost" / f"{name}.bank", product, COST_NORMALS).path
        tests = product.tests(TESTS)
        one_by_one = [tests[place : place + 1] for place in range(len(tests))]
        for search in SEARCHES:
            banks = {store: _stored(source, store, places) for store in stores}
            detectors = {store: _open(bank, search) for store, bank in banks.items()}
            # Preparing a query is part of what codes cost.
            taken = in_turn({store: partial(_search_s, of) for store, of in detectors.items()}, one_by_one, REPEATS)
            alone = in_turn({store: partial(_prepare_s, of) for store, of in detectors.items()}, one_by_one, REPEATS)
            for store, bank in banks.items():
                yield {
                    "set": name,
                    "search": search,
                    "store": store,
                    "normals": len(bank),
                    "bytes": bank.bytes_on_disk / len(bank),
                    "ms": _ms(taken[store]),
                    "prepare_ms": _ms(alone[store]),
                    "times": ratio_of(taken[store], taken["float16"]),
                }


def large(places: Places, sets: Sequence[str]) -> Iterator[Row]:
    """A bank of codes of many pictures: how fast it is built, searched, added to and removed from, and in how much memory."""
    path, shape = places.scratch / "large.bank", SHAPES[LARGE_SHAPES]
    pictures = _Pictures(Product(shape))
    queries = save_queries(pictures.product.tests(TESTS), places.scratch / "large.npz")
    rates: list[float] = []
    for normals in LARGE_STEPS:
        layout = Layout(
            levels=shape.levels,
            embedding_dim=shape.embedding_dim,
            input_size=INPUT_SIZE,
            **vars(Store.parse(LARGE_STORE)),
        )
        bank = Bank.open_or_create(path, layout)
        while len(bank) < normals:
            batch = pictures(len(bank), min(LARGE_SHARD, normals - len(bank)))
            rates.append(len(batch) / seconds(partial(bank.append, batch)))
        if len(bank) > normals:
            continue  # measured by a run before this one
        before = bank.bytes_on_disk
        found = _in_a_process(_scored, path, queries)
        yield {
            "normals": normals,
            "bytes": before / normals,
            "build_per_s": _ms([rate / 1000 for rate in rates]) if rates else None,
            **found,
        }
    ids = Bank.open(path).ids[: LARGE_ADDED // 2]
    batch = replace(pictures(LARGE, LARGE_ADDED), ids=[f"added {number}" for number in range(LARGE_ADDED)])
    bank = Bank.open(path)
    if "added 0" not in bank.ids:
        yield {
            "normals": LARGE,
            "added": LARGE_ADDED,
            "add_s": seconds(partial(bank.append, batch)),
            "removed": len(ids),
            "remove_s": seconds(partial(bank.remove, ids)),
            "restore_s": seconds(partial(bank.restore, ids)),
            "open_s": seconds(partial(Bank.open, path)),
        }


class _Pictures:
    """As many pictures as are asked for, of a few that are generated; picture `number` is the same whenever it is asked for."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self._generated: FeatureBatch | None = None

    def __call__(self, first: int, count: int) -> FeatureBatch:
        if self._generated is None:
            self._generated = self.product.normals(0, _GENERATED)
        of, levels, embedding = self._generated, {}, np.empty((count, self.product.shape.embedding_dim), np.float32)
        for name, maps in of.levels.items():
            levels[name] = np.empty((count, *maps.shape[1:]), np.float16)
        for place in range(count):
            rng = np.random.default_rng([1, first + place])
            one, gain, moved = rng.integers(_GENERATED), np.float16(rng.normal(1, 0.02)), rng.integers(-1, 2, 2)
            embedding[place] = of.embedding[one] * rng.normal(1, 0.02, embedding.shape[1])
            for name, maps in of.levels.items():
                np.multiply(np.roll(maps[one], moved, axis=(0, 1)), gain, out=levels[name][place])
        return FeatureBatch([f"normal {number}" for number in range(first, first + count)], embedding, levels)


def _scored(path: Path, queries: Path) -> Row:
    """Score test pictures with a bank that is not in memory, and again; run it in a process of its own."""
    tests = load_queries(queries)
    bank = Bank.open(path)
    drop_from_cache((path / "features").glob("*.h5"))
    before, start = resident_bytes(), time.perf_counter()
    method = Method()
    detector = Detector.open(bank, recipe="exact", method=method, run=Run(memory=LARGE_MEMORY, device="cpu"))
    open_s = time.perf_counter() - start
    one_by_one = [tests[place : place + 1] for place in range(len(tests))]
    cold = [seconds(partial(detector.score_features, one)) for one in one_by_one]
    warm = [seconds(partial(detector.score_features, one)) for _ in range(3) for one in one_by_one]
    return {
        "open_s": open_s,
        "cold_ms": _ms(cold),
        "warm_ms": _ms(warm),
        "memory": LARGE_MEMORY,
        "grown_bytes": peak_bytes() - before,
    }


def _in_a_process(function: Callable[..., Row], *arguments: Any) -> Row:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _stored(source: Path, store: str, places: Places) -> Bank:
    """The bank as it is stored in another way, made once."""
    path = places.scratch / "stores" / f"{source.parent.name}-{source.stem}-{store}.bank"
    if not path.is_dir():
        making = path.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        convert(source, making, store=store, calibrate=False)
        making.rename(path)
    return Bank.open(path)


def _open(bank: Bank, search: str) -> Detector:
    recipe, method = _as_preset(bank, search)
    build_index(bank, recipe)
    return Detector.open(bank, recipe=recipe, method=method, run=Run(memory=MEMORY, device="cpu"))


def _as_preset(bank: Bank, name: str) -> tuple[Recipe, Method]:
    usual = load_preset(name).usual([level.name for level in bank.layout.levels])
    recipe = load_recipe(usual.recipe)
    return recipe if usual.recipe == "exact" else recipe.with_levels(usual.method.levels), of_few(usual.method, len(bank))


def _search_s(detector: Detector, one: FeatureBatch) -> float:
    timings = Timings()
    detector.score_features(one, timings=timings)
    return (timings.seconds["prepare"] + timings.seconds["pixel search"]) / len(one)


def _prepare_s(detector: Detector, one: FeatureBatch) -> float:
    return seconds(partial(detector.bank.prepared, one)) / len(one)


def _metrics(chosen: PixelSet, knn: FloatArray, maps: FloatArray) -> Row:
    """The quality of image scores by nearest pictures and by the mean of a map's top 1 %, and of maps."""
    assert chosen.defective is not None
    valid = np.ones(maps.shape, np.bool_) if chosen.valid is None else chosen.valid
    tops = np.array([_mean_of_top(scores[inside]) for scores, inside in zip(maps, valid, strict=True)])
    found: Row = {
        "knn_auroc": detection_metrics(chosen.defective, knn).auroc,
        "map_auroc": detection_metrics(chosen.defective, tops).auroc,
    }
    if chosen.masks is not None:
        pixel = localization_metrics(chosen.masks, maps, chosen.valid)
        found |= {"pixel_auroc": pixel.auroc, "aupro": pixel.aupro}
    return found


def _mean_of_top(scores: FloatArray) -> float:
    count = max(1, round(_TOP * len(scores)))
    return float(np.partition(scores, -count)[-count:].mean(dtype=np.float64))


def _ms(taken: Sequence[float]) -> Row:
    return {key: value for key, value in spread([1000 * each for each in taken]).items() if key != "runs"}


SECTIONS: Mapping[str, Callable[[Places, Sequence[str]], Iterator[Row]]] = {"quality": quality, "cost": cost, "large": large}

if __name__ == "__main__":
    main()
