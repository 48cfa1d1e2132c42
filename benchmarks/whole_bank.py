"""Measures the whole bank as the gallery: what it costs, how that grows with the bank, and what it is worth.

Run as `python -m benchmarks.whole_bank --out benchmarks/results --data FOLDER`, FOLDER holding real sets. What is compared runs
in turn, in one process, with the same number of threads. PatchCore stands beside it where an environment that has anomalib is
named (SPADE_FAISS_PATCHCORE_PYTHON).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.features import SHAPES, Product, Shape
from benchmarks.gallery import Engine, in_turn, ratio_of
from benchmarks.kernel import HOSTILE, ROWS, STEP, Checked
from benchmarks.process import machine, resident_bytes, spread
from benchmarks.sweep import peers
from benchmarks.sweep.measures import exponent, share_as_near
from benchmarks.sweep.points import PeerPoint
from benchmarks.sweep.sets import COARSE_POOLED, NORMALIZED, POOLED, POOLED_NORMALIZED, PixelSet, Places, pixel_set
from spade_faiss import Bank, Detector, FeatureBatch, Scores
from spade_faiss.core.declaring import ALL
from spade_faiss.core.presets import of_few
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import Level
from spade_faiss.features.layout import prepare
from spade_faiss.index.build import build_index
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.clusters import METHOD
from spade_faiss.search.coreset import k_center
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.levels import open_blocks, searched_levels, vectors_of
from spade_faiss.search.recipe import Recipe, load_recipe
from spade_faiss.search.workers import Workers
from spade_faiss.testing import open_method

Row = dict[str, Any]
KGallery = int | str | tuple[int | str, ...]

SPEED_SETS = ("mvtec_bottle", "mvtec_screw")
QUALITY_SETS = ("mvtec_bottle", "magnetic_tile", "mvtec_screw", "mvtec_toothbrush", "aws_cookies", "elpv")
# Real cells up to 1,000; generated features, which look like those of real products, beyond.
REAL_GROWTH, REAL_SIZES = "elpv", (200, 400, 700, 1000)
LARGE = 20_000
GENERATED_GROWTH, GENERATED_SIZES = "lite0", (200, 1000, 5000)
# Up to so many images are searched map by map, and by FAISS, which has everything decoded.
MOST_BY_SCAN = 1000
MOST_BY_FAISS = 5000
JOINED = ("blocks.2+blocks.4",)
APART = ("blocks.2", "blocks.4")
# How all normals are searched: the names of the engines here, and their recipes.
RECIPES = {"scan": "exact", "clusters": "clusters", "global": "global"}
# What quality is measured of: how maps are prepared, the levels, the gallery, and the recipe.
QUALITY_SEARCHES: dict[str, tuple[str, tuple[str, ...], KGallery, str]] = {
    "K=5": ("", (), 5, "exact"),
    "K=5, averaged": (POOLED, (), 5, "exact"),
    "K=5, unit length": (NORMALIZED, (), 5, "exact"),
    "K=5, averaged, unit length": (POOLED_NORMALIZED, (), 5, "exact"),
    "all, averaged, apart": (POOLED, APART, ALL, "clusters"),
    "all, averaged, joined": (POOLED, JOINED, ALL, "clusters"),
    "all, averaged, joined, by `global`": (POOLED, JOINED, ALL, "global"),
    "finest as it is, K=20; all, averaged, joined": (COARSE_POOLED, ("blocks.1", *JOINED), (20, ALL), "clusters"),
    "K=100, averaged, in windows": (POOLED, (), 100, "location"),
    "all, averaged, in windows": (POOLED, (), ALL, "location"),
}
MEMORY = "6GiB"
TESTS, REPEATS = 12, 9
# Queries of each set of hostile vectors: more than ten million in all.
HOSTILE_QUERIES = 460_000
# Test images whose labels say what a recipe loses.
LABELED = 160
# What PatchCore keeps of a set.
PATCHCORE_SHARES = (0.01, 0.1)
# Where anomalib picks that share itself. On two cores it takes minutes for 1 % of these sets, hours for others and for 10 %:
# there, this project's greedy k-center picks as many from the very same vectors.
PICKED_BY_ANOMALIB = {
    "aws_cookies": (0.01, 0.1),
    "mvtec_toothbrush": (0.01,),
    "mvtec_bottle": (0.01,),
    "mvtec_screw": (0.01,),
}
_SHARD = 100
_TOP = 0.01


def main() -> None:
    """Measure all sections, or those that --only names, and write them to whole_bank.json; the others stay as they are."""
    parser = parser_of(__doc__, SECTIONS, _default_sections())
    parser.add_argument("--scratch", type=Path, help="where banks are written and kept for the next run; some 4 GB")
    parser.add_argument("--searches", nargs="+", help="the searches of `quality`, by their names; rows of others stay")
    arguments = parser.parse_args()
    target = arguments.out / "whole_bank.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        places = Places(arguments.data, arguments.scratch or Path(temporary))
        places.scratch.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            measure, before = SECTIONS[name], []
            if name == "quality" and arguments.searches:
                measure = partial(quality, searches=arguments.searches)
                before = [row for row in figures[name]["rows"] if row["search"] not in arguments.searches]
            figures[name] = {"machine": machine(), "rows": before}
            for row in measure(places):
                print(name, json.dumps({key: value for key, value in row.items() if key != "runs"}), flush=True)
                figures[name]["rows"].append(row)
            target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _default_sections() -> list[str]:
    return [name for name in SECTIONS if name != "patchcore" or os.environ.get(peers.PYTHON)]


@dataclass(frozen=True, eq=False)
class Compared:
    """One search of the whole bank, and the bank and test images that it is measured on."""

    bank: Path
    tests: FeatureBatch
    levels: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The recipe of clusters for its levels."""
        return load_recipe("clusters").with_levels(self.levels)

    def open(self, recipe: str | Recipe, k_gallery: KGallery = ALL) -> Detector:
        """Open its detector with another recipe or gallery."""
        method = of_few(Method(k_gallery=k_gallery, levels=self.levels), len(Bank.open(self.bank)))
        return Detector.open(self.bank, recipe=recipe, method=method, run=Run(memory=MEMORY, device="cpu"))


def speed(places: Places) -> Iterator[Row]:
    """What all normals of real sets cost, beside five neighbors at three levels, a scan, and FAISS on everything."""
    for name in SPEED_SETS:
        plain, pooled = pixel_set(name, places), pixel_set(name + POOLED, places)
        five = _bank_of(plain, TESTS)
        for label, chosen, levels in (("joined", pooled, JOINED), ("apart", pooled, APART), ("three levels", plain, ())):
            whole = replace(_bank_of(chosen, TESTS), levels=levels)
            yield {"set": name, "search": label, **_compare(whole, five, chosen, scan=True)}


def growth(places: Places) -> Iterator[Row]:
    """How the cost grows with the bank: levels 2 and 3 joined, on real cells and on generated features."""
    chosen = pixel_set(REAL_GROWTH + POOLED, places)
    plain = pixel_set(REAL_GROWTH, places)
    cells = []
    for size in REAL_SIZES:
        whole = Compared(_first(chosen.bank, size, places), chosen.part(TESTS).tests, JOINED)
        cells.append((whole, Compared(_first(plain.bank, size, places), plain.part(TESTS).tests)))
    yield from _growing(REAL_GROWTH, cells, chosen)
    product = Product(SHAPES[GENERATED_GROWTH])
    levels = tuple(level.name for level in SHAPES[GENERATED_GROWTH].levels)
    joined = ("+".join(levels[1:]),)
    sizes = []
    for size in GENERATED_SIZES:
        bank = _generated(product, size, places)
        sizes.append((Compared(bank, product.tests(TESTS), joined), Compared(bank, product.tests(TESTS))))
    yield from _growing(GENERATED_GROWTH, sizes, None)


def large(places: Places) -> Iterator[Row]:
    """Recipe `global` beyond what the others are measured at: generated features, levels 2 and 3 joined.

    The bank has no level 1, which the search does not read: generating and writing it would be most of the work.
    """
    shape = SHAPES[GENERATED_GROWTH]
    coarse = Shape(shape.levels[1:], shape.looks[1:], shape.embedding_dim)
    product, levels = Product(coarse), ("+".join(level.name for level in coarse.levels),)
    whole = Compared(
        _generated(product, LARGE, replace(places, scratch=places.scratch / "coarse")), product.tests(TESTS), levels
    )
    bank, recipe = Bank.open(whole.bank), load_recipe("global").with_levels(levels)
    start = time.perf_counter()
    built = build_index(bank, recipe, rebuild=True)
    build_s, before = time.perf_counter() - start, resident_bytes()
    detector = whole.open(recipe)
    detector.score_features(whole.tests)
    memory_bytes = max(0, resident_bytes() - before)
    engines = {"global": _pixel_search(detector, whole.tests), "global, 12 together": _together(detector)}
    seconds = in_turn(engines, [whole.tests], REPEATS)
    yield {
        "set": GENERATED_GROWTH,
        "normals": len(bank),
        "ms": {name: _ms(each) for name, each in seconds.items()},
        "build_s": {"global": build_s},
        "index_bytes": {"global": built.bytes if built else 0},
        "bank_bytes": bank.bytes_on_disk,
        "memory_bytes": {"global": memory_bytes},
    }


def _growing(name: str, sizes: Sequence[tuple[Compared, Compared]], chosen: PixelSet | None) -> Iterator[Row]:
    rows = []
    for whole, five in sizes:
        small = len(Bank.open(whole.bank)) <= MOST_BY_SCAN
        rows.append({"set": name, "search": "joined", **_compare(whole, five, chosen, scan=small)})
        yield rows[-1]
    normals = [row["normals"] for row in rows]
    yield {
        "set": name,
        "exponent": {
            engine: exponent(normals, [row["ms"][engine]["median"] for row in rows]) for engine in ("clusters", "global")
        },
        "exponent_looked_at": exponent(normals, [row["looked_at"] for row in rows]),
    }


def leave_one_out(places: Places) -> Iterator[Row]:
    """What a bank's own image costs against all others, beside an image that is not in the bank."""
    for name in SPEED_SETS:
        chosen = replace(_bank_of(pixel_set(name + POOLED, places), TESTS), levels=JOINED)
        build_index(Bank.open(chosen.bank), chosen.recipe)
        detector = chosen.open(chosen.recipe)
        rows = np.linspace(0, len(detector.bank) - 1, TESTS).astype(int).tolist()

        tests = chosen.tests
        engines = {
            "scoring": _timed(partial(detector.score_features, tests), len(tests)),
            "leave one out": _timed(partial(detector.score_rows, rows), len(rows)),
        }
        seconds = in_turn(engines, [tests], REPEATS)
        yield {
            "set": name,
            "normals": len(detector.bank),
            "ms": {engine: _ms(runs) for engine, runs in seconds.items()},
            "times_scoring": ratio_of(seconds["leave one out"], seconds["scoring"]),
        }


def thin(places: Places) -> Iterator[Row]:
    """What it takes to pick a coreset of 1 % by greedy k-center, on whole vectors of levels 2 and 3 joined."""
    for name in SPEED_SETS:
        bank = Bank.open(pixel_set(name + POOLED, places).bank)
        (level,) = searched_levels(bank.layout.levels, "mean", JOINED)
        blocks = open_blocks(bank, level)
        xb = np.concatenate([blocks(row) for row in range(len(bank))])
        count = round(0.01 * len(xb))
        seconds = in_turn({"k-center": _timed(partial(k_center, xb, count), 1)}, [FeatureBatch([], np.empty((0, 1)), {})], 3)
        yield {"set": name, "vectors": len(xb), "picks": count, "s": spread(seconds["k-center"])}


def equality(places: Places) -> Iterator[Row]:
    """Compare distances with float64's, of vectors that are hard to tell apart or to compute with."""
    workers = Workers()
    for kind, make in HOSTILE.items():
        for d in (24, 96):
            rng = np.random.default_rng([d, len(kind)])
            checked = Checked()
            for _ in range(0, HOSTILE_QUERIES, STEP):
                xb, xq = make(rng, ROWS, d), make(rng, STEP, d)
                near = rng.integers(0, ROWS, STEP // 2)
                xq[: len(near)] = xb[near] * (1 + np.float32(1e-3) * rng.standard_normal((len(near), d), np.float32))
                blocks = Blocks(Level("level", d, stride=1, height=1, width=ROWS), ArraySource(xb[None]))
                hits = open_method(METHOD, blocks, workers)(xq.reshape(-1, ROWS, d), np.zeros((STEP // ROWS, 1), np.int64), 1)
                checked.queries += STEP
                at = np.stack([hits.row.ravel(), hits.location.ravel()])
                checked.compare(blocks, xq.astype(np.float64), np.arange(1), hits.sq_dist.ravel().astype(np.float64), at)
            found = checked.row()  # raises, if a nearer vector was missed
            yield {"set": kind, "channels": d, **{name: found[name] for name in ("queries", "missed", "worst")}}


def quality(places: Places, searches: Sequence[str] = ()) -> Iterator[Row]:
    """What galleries are worth: image AUROC by the mean of a map's top 1 %, pixel AUROC and AUPRO; of all searches, or some."""
    for name in QUALITY_SETS:
        for label in searches or QUALITY_SEARCHES:
            prepared, levels, k_gallery, name_of_recipe = QUALITY_SEARCHES[label]
            chosen = pixel_set(name + prepared, places)
            compared, recipe = Compared(chosen.bank, chosen.tests, levels), load_recipe(name_of_recipe).with_levels(levels)
            start = time.perf_counter()
            build_index(Bank.open(compared.bank), recipe, rebuild=True)
            fit_s = time.perf_counter() - start
            detector = compared.open(recipe, k_gallery)
            timings = Timings()
            maps = detector.score_features(compared.tests, timings=timings).maps
            cost = {"fit_s": fit_s, "ms": 1000 * timings.seconds["pixel search"] / len(maps)}
            yield {"set": name, "normals": len(detector.bank), "search": label, **_measured(chosen, maps), **cost}


def patchcore(places: Places) -> Iterator[Row]:
    """The same by anomalib's PatchCore on the same maps, which averages them itself; its own image score."""
    for name in QUALITY_SETS:
        chosen = pixel_set(name, places)
        points = [(ratio, "kernel") for ratio in PATCHCORE_SHARES]
        points += [(ratio, "anomalib") for ratio in PICKED_BY_ANOMALIB.get(name, ())]
        for ratio, picked_by in points:
            raw = peers.measure(
                PeerPoint(set=name, peer="patchcore", settings={"ratio": ratio, "picked_by": picked_by}), places
            )
            cost = {"fit_s": raw.facts["train_s"], "ms": 1000 * float(np.median(raw.arrays["latency_s"]))}
            found = _measured(chosen, raw.arrays.get("maps"), raw.arrays["map_score"])
            label = f"PatchCore {100 * ratio:g} %" + (", our k-center" if picked_by == "kernel" else "")
            yield {"set": name, "normals": raw.facts["normals"], "search": label, **found, **cost}


def _compare(whole: Compared, five: Compared, chosen: PixelSet | None, *, scan: bool) -> Row:
    """Seconds of the pixel search, side by side: five neighbors at three levels, and all normals by each recipe.

    What a recipe loses is measured on a real set: by how much metrics fall behind those of exact search.
    """
    bank = Bank.open(whole.bank)
    engines = {"five": _pixel_search(five.open("exact", 5), five.tests)}
    found: dict[str, Scores] = {}
    row: Row = {"normals": len(bank), "bank_bytes": bank.bytes_on_disk}
    for engine, name in RECIPES.items():
        if engine == "scan" and not scan:
            continue
        recipe = load_recipe(name).with_levels(whole.levels) if name != "exact" else load_recipe(name)
        start = time.perf_counter()
        built = build_index(bank, recipe, rebuild=True)
        row.setdefault("build_s", {})[engine] = time.perf_counter() - start
        row.setdefault("index_bytes", {})[engine] = built.bytes if built else 0
        before, start = resident_bytes(), time.perf_counter()
        detector = whole.open(recipe)
        found[engine] = detector.score_features(whole.tests)
        row.setdefault("first_batch_s", {})[engine] = time.perf_counter() - start
        row.setdefault("memory_bytes", {})[engine] = max(0, resident_bytes() - before)
        engines[engine] = _pixel_search(detector, whole.tests)
    if scan:
        np.testing.assert_array_equal(found["scan"].maps, found["clusters"].maps)
    seconds = in_turn(engines, [whole.tests], REPEATS)
    if len(bank) <= MOST_BY_FAISS:
        seconds["faiss"] = [_by_faiss(whole, whole.tests[:1])]
    shares = {level: float(share.mean()) for level, share in found["clusters"].passed_over.items()}
    vectors = [level.height * level.width for level in searched_levels(bank.layout.levels, "mean", whole.levels)]
    return {
        **row,
        "ms": {engine: _ms(runs) for engine, runs in seconds.items()},
        "times": {engine: ratio_of(seconds["clusters"], seconds[engine]) for engine in engines},
        "passed_over": shares,
        "looked_at": sum((1 - share) * size * len(bank) for share, size in zip(shares.values(), vectors, strict=True)),
        "found_as_near": _as_near(found["clusters"], found["global"]),
        "lost": {} if chosen is None else _lost(whole, chosen),
    }


def _as_near(exact: Scores, approximate: Scores) -> float:
    """The share of locations whose vector is as near as the nearest."""
    pairs = [(approximate.level_dist[level], dist) for level, dist in exact.level_dist.items()]
    return float(np.mean([share_as_near(found, dist) for found, dist in pairs]))


def _lost(whole: Compared, chosen: PixelSet) -> dict[str, float]:
    """By how much each recipe falls behind exact search, in the metric that falls most."""
    chosen, metrics = chosen.part(LABELED), {}
    for engine, name in RECIPES.items():
        if engine != "scan":
            recipe = load_recipe(name).with_levels(whole.levels)
            maps = Compared(whole.bank, chosen.tests, whole.levels).open(recipe).score_features(chosen.tests).maps
            metrics[engine] = _measured(chosen, maps)
    exact = metrics["clusters"]
    lost = {engine: max(0.0, *(exact[name] - of_engine[name] for name in exact)) for engine, of_engine in metrics.items()}
    return {"scan": 0.0, **lost}


def _pixel_search(detector: Detector, tests: FeatureBatch) -> Engine:
    """Returns the seconds of the pixel search of one test image after the other, whatever it is asked for."""
    places = itertools.cycle(range(len(tests)))

    def engine(_: FeatureBatch) -> float:
        place, timings = next(places), Timings()
        detector.score_features(tests[place : place + 1], timings=timings)
        return timings.seconds["pixel search"]

    return engine


def _together(detector: Detector) -> Engine:
    """Returns the seconds that an image takes of the pixel search of all test images in as few batches as the plan has."""

    def engine(tests: FeatureBatch) -> float:
        timings = Timings()
        detector.score_features(tests, timings=timings)
        return timings.seconds["pixel search"] / len(tests)

    return engine


def _by_faiss(whole: Compared, one: FeatureBatch) -> float:
    """Seconds that `faiss.knn` takes for an image, its level's vectors of the whole bank being decoded already."""
    faiss, bank = import_faiss(), Bank.open(whole.bank)
    total = 0.0
    query = prepare(one, bank.layout)
    for level in searched_levels(bank.layout.levels, "mean", whole.levels):
        blocks = open_blocks(bank, level)
        xb = np.concatenate([blocks(row) for row in range(len(bank))])
        maps = vectors_of(level, bank.layout.levels, query.levels.__getitem__)
        xq = np.ascontiguousarray(maps.reshape(-1, level.channels))
        start = time.perf_counter()
        faiss.knn(xq, xb, 1)
        total += time.perf_counter() - start
    return total


def _timed(run: Callable[[], object], images: int) -> Engine:
    """Returns the seconds that an image takes of a run, all stages together."""

    def engine(_: FeatureBatch) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / images

    return engine


def _measured(chosen: PixelSet, maps: FloatArray | None, score: FloatArray | None = None) -> Row:
    """Metrics of a set's maps; a method with an image score of its own is ranked by that."""
    assert chosen.defective is not None
    if score is None:
        assert maps is not None
        valid = np.ones(maps.shape, np.bool_) if chosen.valid is None else chosen.valid
        score = np.array([_mean_of_top(scores[inside]) for scores, inside in zip(maps, valid, strict=True)])
    found: Row = {"image_auroc": detection_metrics(chosen.defective, score).auroc}
    if chosen.masks is not None and maps is not None:
        pixel = localization_metrics(chosen.masks, maps, chosen.valid)
        found |= {"pixel_auroc": pixel.auroc, "aupro": pixel.aupro}
    return found


def _mean_of_top(scores: FloatArray) -> float:
    count = max(1, round(_TOP * len(scores)))
    return float(np.partition(scores, -count)[-count:].mean(dtype=np.float64))


def _ms(seconds: Sequence[float]) -> Row:
    return {key: value for key, value in spread([1000 * each for each in seconds]).items() if key != "runs"}


def _bank_of(chosen: PixelSet, tests: int) -> Compared:
    return Compared(chosen.bank, chosen.part(tests).tests)


def _first(source: Path, size: int, places: Places) -> Path:
    """A bank of the first images of another one, whose maps are stored as they are."""
    path = places.scratch / "first" / f"{source.parent.name}-{size}.bank"
    if not path.is_dir():
        bank = Bank.open(source)
        temporary = path.with_suffix(".making")
        shutil.rmtree(temporary, ignore_errors=True)
        made = Bank.create(temporary, replace(bank.layout, pool=1))
        for start in range(0, size, _SHARD):
            rows = np.arange(start, min(start + _SHARD, size))
            made.append(replace(bank.read(rows), source=None, paths=(), sha256=(), root=""))
        temporary.rename(path)
    return path


def _generated(product: Product, size: int, places: Places) -> Path:
    from benchmarks.features import write_bank

    path = places.scratch / "generated" / f"{size}.bank"
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bank(path, product, size)
    return path


SECTIONS: Mapping[str, Callable[[Places], Iterator[Row]]] = {
    "speed": speed,
    "growth": growth,
    "large": large,
    "equality": equality,
    "leave_one_out": leave_one_out,
    "thin": thin,
    "quality": quality,
    "patchcore": patchcore,
}

if __name__ == "__main__":
    main()
