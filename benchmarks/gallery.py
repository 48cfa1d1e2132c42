"""Measures the gallery search: what each recipe costs and what it changes, beside what others do.

`exact` is exact search by FAISS here, wherever it runs; benchmarks/kernel.py measures the compiled kernel.

Run `python -m benchmarks.gallery --out benchmarks/results` to measure on generated features; --bank and --queries add real
ones. What is compared runs in turn, in one process, with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import main_job
from benchmarks.features import SHAPES, Product, Shape, load_queries, save_queries, write_bank
from benchmarks.loops import MEASURED_CHUNKS, knn_low_threshold, published, rebuilt
from benchmarks.process import drop_from_cache, machine, read_bytes, resident_bytes, spread
from benchmarks.process import seconds as seconds_of
from spade_faiss import Bank, Detector, FeatureBatch, Level, Scores
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.memory import format_bytes, parse_bytes
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import concatenate
from spade_faiss.index.build import build_index
from spade_faiss.scoring.scores import join
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.engines import faiss as faiss_exact
from spade_faiss.search.recipe import Recipe, load_recipe, recipe_names

TOLERANCE = 1e-4
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
IMAGES, PIXELS = "image search", "pixel search"
# The ample budget is more than any batch needs, so that decoded maps stay cached; the others are put to the test.
AMPLE, MEMORY_BUDGET, SCALING_BUDGET = "4GiB", "1GiB", "256MiB"
_ORACLE_IMAGES, _ORACLE_QUERIES = 2, 48
_PEAK_SIDE, _PEAK_RUNS = 2048, 5
_SAMPLE_S = 0.002

Row = dict[str, Any]
# Scores a batch, and returns seconds an image.
Engine = Callable[[FeatureBatch], float]


@dataclass(frozen=True, eq=False)
class Features:
    """A bank, and the features of test images."""

    name: str
    bank: Path
    tests: FeatureBatch


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and how often. The sections `memory` and `scaling` write banks of their own, of `shapes`."""

    sets: Sequence[Features]
    scratch: Path
    recipes: Sequence[str] = ("exact",)
    ks: Sequence[int] = (5, 50)
    repeats: int = 5
    batch: int = 16
    data: Path | None = None
    shapes: Mapping[str, Shape]
    memory_normals: Sequence[int] = (500, 5000)
    memory_tests: int = 32
    scaling_normals: Sequence[int] = (500, 1000, 2000, 5000, 10000, 20000)
    scaling_tests: int = 64


def main() -> None:
    """Measure all sections, or those that --only names, and write gallery.json; the other sections stay in it."""
    import torch

    arguments = _parse()
    torch.set_num_threads(import_faiss().omp_get_max_threads())
    target = arguments.out / "gallery.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    figures["machine"] = machine()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        setup = _setup(arguments, Path(scratch))
        for name in arguments.only:
            figures[name] = [_say(name, row) for row in SECTIONS[name](setup)]
            target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    _say("wrote", {"file": str(target)})
    if arguments.json:
        print(json.dumps({name: figures[name] for name in ("machine", *arguments.only)}))


def build(setup: Setup) -> Iterator[Row]:
    """Measure the seconds and bytes of the indexes that recipes build beside the bank."""
    for features in setup.sets:
        bank = Bank.open(features.bank)
        for recipe in setup.recipes:
            built = build_index(bank, load_recipe(recipe), rebuild=True)
            cost = {"s": built.total_s, "bytes": built.bytes} if built else {"s": 0.0, "bytes": 0}
            yield {"set": features.name, "recipe": recipe, "normals": len(bank), "bank_bytes": bank.bytes_on_disk, **cost}


def speed(setup: Setup) -> Iterator[Row]:
    """Measure seconds an image of our engines and of others, on single images and on a batch with common nearest normals."""
    for features in setup.sets:
        bank, tests = Bank.open(features.bank), features.tests[: setup.batch]
        tests = replace(tests, embedding=np.repeat(tests.embedding[:1], len(tests), axis=0))
        for k in setup.ks:
            detectors = {recipe: _open(features, recipe, k) for recipe in dict.fromkeys(("exact", *setup.recipes))}
            # In a large bank, hardly any map is needed twice: this detector has no room for decoded maps.
            detectors["exact_uncached"] = _open(features, "exact", k, detectors["exact"].plan.working_bytes)
            nearest = galleries(bank, detectors["exact"].score_features(tests[:1]), k)[0]
            ours = {name: engine_of(detector) for name, detector in detectors.items()}
            others = peers(bank, nearest, published=k == min(setup.ks))
            for size in (1, len(tests)):
                batches = [tests[start : start + size] for start in range(0, len(tests), size)]
                seconds = in_turn({**others, **ours}, batches, setup.repeats)
                spreads = {name: {**spread(runs), "extrapolated": name == "published"} for name, runs in seconds.items()}
                over = {name: {one: ratio_of(seconds[one], seconds[name]) for one in (*others, "exact")} for name in ours}
                yield {"set": features.name, "k": k, "batch": size, "s_per_image": spreads, "times_that_of": over}


def quality(setup: Setup) -> Iterator[Row]:
    """Measure how approximate recipes change distances and maps, and AUROC and AUPRO if there is a labeled set."""
    for features in setup.sets:
        for k in setup.ks:
            best = _open(features, "exact", k).score_features(features.tests)
            for recipe in setup.recipes:
                if recipe != "exact":
                    found = _excess(best, _open(features, recipe, k).score_features(features.tests))
                    yield {"set": features.name, "k": k, "recipe": recipe, **found}
    if setup.data:
        yield from _labeled(setup, setup.data / "mvtec_bottle")


def equal(setup: Setup) -> Iterator[Row]:
    """Check that exact gives the same numbers in whatever company an image is scored, and measure its error in float64."""
    for features in setup.sets:
        tests = features.tests[: setup.batch]
        for k in setup.ks:
            base = _open(features, "exact", k).score_features(tests)
            same = {name: _same(base, scores) for name, scores in _variants(features, tests, k)}
            off = off_oracle(Bank.open(features.bank), tests, base, k)
            row = {"set": features.name, "k": k, "identical": same, "off_float64": off}
            if not all(same.values()) or off > TOLERANCE:
                raise RuntimeError(f"exact is not exact: {row}")
            yield row


def memory(setup: Setup) -> Iterator[Row]:
    """Measure the peak memory of scoring against small and large banks, each in a process of its own."""
    k, first = max(setup.ks), dict[str, int]()
    for bank, tests, recipe in _growing(setup, "wrn50", setup.memory_normals, setup.memory_tests):
        found = _child("peak_growth", str(bank.path), str(tests), recipe, k, MEMORY_BUDGET)
        limit = {"start_and_budget_bytes": found["start_bytes"] + parse_bytes(MEMORY_BUDGET)}
        over_first = found["peak_bytes"] / first.setdefault(recipe, found["peak_bytes"])
        yield {"recipe": recipe, "normals": len(bank), "k": k, **found, **limit, "over_first_peak": over_first}


def scaling(setup: Setup) -> Iterator[Row]:
    """Measure the time of an image by the size of the bank, with its files in the system's cache and dropped from it."""
    k = min(setup.ks)
    for bank, tests, recipe in _growing(setup, "lite0", setup.scaling_normals, setup.scaling_tests):
        for cold in (False, True):
            found = _child("single_timings", str(bank.path), str(tests), recipe, k, SCALING_BUDGET, cold)
            yield {"recipe": recipe, "normals": len(bank), "bank_bytes": bank.bytes_on_disk, "cold": cold, **found}


def profile(setup: Setup) -> Iterator[Row]:
    """Measure what share of the machine's peak exact search by FAISS reaches at the largest K, and where its time goes."""
    k = max(setup.ks)
    a = np.random.default_rng(0).random((_PEAK_SIDE, _PEAK_SIDE), np.float32)
    for features in setup.sets:
        detector = _open(features, "exact", k)
        levels = detector.bank.layout.levels
        work = {"exact": sum(2 * (level.height * level.width) ** 2 * k * level.channels for level in levels)}
        work |= dict.fromkeys(("numpy", "faiss"), 2 * _PEAK_SIDE**3)
        engines: dict[str, Engine] = {
            "exact": engine_of(detector),
            "numpy": lambda _: _least_s(lambda: a @ a),
            # With so many channels, nearly all of the search is the product by FAISS's own BLAS.
            "faiss": lambda _: _least_s(lambda: import_faiss().knn(a, a, 1)),
        }
        seconds = in_turn(engines, [features.tests[:1]], setup.repeats)
        rate = {name: [work[name] / second / 1e9 for second in runs] for name, runs in seconds.items()}
        with _instrumented() as timings:
            thread_s = engine_of(detector)(features.tests[:1]) * import_faiss().omp_get_max_threads()
        parts = {name: spent / thread_s for name, spent in timings.seconds.items()}
        parts["rest"] = 1 - sum(parts.values())
        of_peak = {name: ratio_of(rate["exact"], rate[name]) for name in ("numpy", "faiss")}
        rates = {name: spread(runs) for name, runs in rate.items()}
        yield {"set": features.name, "k": k, "gflop_per_s": rates, "of_peak": of_peak, "of_threads_time": parts}


def peak_growth(bank: str, tests: str, recipe: str, k: int, budget: str) -> dict[str, int]:
    """Measure the resident bytes before the first scoring, and the most while it runs; it needs a process of its own."""
    batch = load_queries(Path(tests))
    detector = Detector.open(bank, recipe=_recipe_of(recipe), method=Method(k_gallery=k), run=Run(memory=budget))
    samples = [resident_bytes()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_S):
            samples.append(resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    detector.score_features(batch)
    done.set()
    watcher.join()
    return {"start_bytes": samples[0], "peak_bytes": max(samples), "batch": detector.plan.batch}


def single_timings(bank: str, tests: str, recipe: str, k: int, budget: str, cold: bool) -> dict[str, Any]:
    """Measure the seconds of each stage, image by image without the first; it needs a process of its own."""
    batch = load_queries(Path(tests))
    if not cold:  # another detector fills the system's cache, so that the one that is measured has decoded nothing yet
        Detector.open(bank, recipe=_recipe_of(recipe), method=Method(k_gallery=k), run=Run(memory=budget)).score_features(batch)
    detector = Detector.open(bank, recipe=_recipe_of(recipe), method=Method(k_gallery=k), run=Run(memory=budget))
    seconds: dict[str, list[float]] = {IMAGES: [], PIXELS: []}
    read = []
    for place in range(len(batch)):
        if cold:
            drop_from_cache(Path(bank).rglob("*.h5"))
        timings, before = Timings(), read_bytes()
        detector.score_features(batch[place : place + 1], timings=timings)
        read.append(read_bytes() - before)
        for stage, runs in seconds.items():
            runs.append(timings.seconds[stage])
    spreads = {stage: spread(runs[1:]) for stage, runs in seconds.items()}
    return {**spreads, "read_bytes_per_image": statistics.median(read[1:]), "cache_bytes": detector.plan.cache_bytes}


def _open(features: Features, recipe: str, k: int, budget: str | int = AMPLE) -> Detector:
    build_index(Bank.open(features.bank), load_recipe(recipe))
    return Detector.open(features.bank, recipe=_recipe_of(recipe), method=Method(k_gallery=k), run=Run(memory=budget))


def _recipe_of(name: str) -> Recipe:
    return load_recipe(name).with_query({"engine": "faiss"} if name == "exact" else {})


def engine_of(detector: Detector) -> Engine:
    """Return an engine that times the pixel search of a detector."""

    def run(batch: FeatureBatch) -> float:
        timings = Timings()
        detector.score_features(batch, timings=timings)
        return timings.seconds[PIXELS] / len(batch)

    return run


def peers(bank: Snapshot, rows: IntArray, *, published: bool) -> dict[str, Engine]:
    """Return the engines of others. `published` and `rebuilt` take image by image, and are timed on one image of a batch."""
    faiss = import_faiss()

    def timed(search: Callable[[FloatArray, FloatArray], object], batch: FeatureBatch) -> float:
        return seconds_of(lambda: [search(*pair(bank, level, batch, rows)) for level in bank.layout.levels]) / len(batch)

    engines: dict[str, Engine] = {
        "rebuilt": lambda batch: timed(rebuilt, batch[:1]),
        "knn": lambda batch: timed(lambda xq, xb: faiss.knn(xq, xb, 1), batch),
        "knn_low_threshold": lambda batch: timed(knn_low_threshold, batch),
    }
    return {"published": lambda batch: _published_s(bank, batch[:1], rows), **engines} if published else engines


def _published_s(bank: Snapshot, batch: FeatureBatch, rows: IntArray) -> float:
    """Seconds of the published loop; gathering the gallery is not counted."""
    return sum(published(*pair(bank, level, batch, rows), MEASURED_CHUNKS)[1] for level in bank.layout.levels)


def pair(bank: Snapshot, level: Level, batch: FeatureBatch, rows: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return the queries of a level, (nq, d), and the vectors of these normals in one array, (nb, d)."""
    gallery = np.empty((len(rows), *level.shape), np.float32)
    for place, row in enumerate(rows):
        gallery[place] = bank.level_map(level.name, int(row))
    xq = np.asarray(batch.levels[level.name], np.float32)
    return xq.reshape(-1, level.channels), gallery.reshape(-1, level.channels)


def in_turn(engines: Mapping[str, Engine], batches: Sequence[FeatureBatch], repeats: int) -> dict[str, list[float]]:
    """Return seconds an image of each engine in each repeat, all on the same batch, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(-1, repeats):
        for name, engine in engines.items():
            found = engine(batches[repeat % len(batches)])
            if repeat >= 0:
                seconds[name].append(found)
    return seconds


def _growing(setup: Setup, shape: str, sizes: Sequence[int], tests: int) -> Iterator[tuple[Bank, Path, str]]:
    """Yield a bank that grows, the file of its test images, and one recipe after the other, once it is built."""
    product = Product(setup.shapes[shape])
    queries = save_queries(product.tests(tests), setup.scratch / f"growing-{shape}.npz")
    for normals in sizes:
        bank = write_bank(setup.scratch / f"growing-{shape}.bank", product, normals)
        for recipe in setup.recipes:
            build_index(bank, load_recipe(recipe))
            yield bank, queries, recipe


def _excess(best: Scores, ours: Scores) -> Row:
    """By how much distances are larger than those of exact search, at each level, and how much of it is left in the map."""
    levels: Row = {}
    for name, dist in best.level_dist.items():
        excess = ours.level_dist[name][dist > 0] / dist[dist > 0] - 1
        zeros = ours.level_dist[name][dist == 0]
        if (least := float(excess.min())) < -TOLERANCE:
            raise RuntimeError(f"nearer than exact at {name}, by {-least}")
        levels[name] = {
            **{f"quantile {at}": float(np.quantile(excess, at)) for at in QUANTILES},
            "exactly_0": float((excess == 0).mean()),
            "least": least,
            "zeros": len(zeros),
            "zeros_lost": int((zeros > 0).sum()),
        }
    change = np.abs(ours.maps - best.maps) / np.maximum(best.maps, np.finfo(np.float32).tiny)
    return {"excess": levels, "map_change": {"max": float(change.max()), "mean": float(change.mean())}}


def _labeled(setup: Setup, dataset: Path) -> Iterator[Row]:
    """The scores of a real set with each recipe."""
    bank = setup.scratch / "labeled.bank"
    main_job.cli("fit", dataset / "train/good", "--bank", bank, *main_job.LITE0)
    for recipe in setup.recipes:
        main_job.cli("index", bank, "--recipe", recipe)
        for k in setup.ks:
            report = main_job.evaluate(dataset, bank, setup.scratch, "--recipe", recipe, "--k-gallery", str(k))
            found = {**main_job.summary(report["metrics"]), "pixel_search_s": report["time"]["timing_s"][PIXELS]}
            yield {"set": dataset.name, "k": k, "recipe": recipe, **found}


def _variants(features: Features, tests: FeatureBatch, k: int) -> Iterator[tuple[str, Scores]]:
    """Score the same images in other batches, budgets, orders and numbers of threads."""
    faiss = import_faiss()
    for size in (1, 3, 16):
        detector = _open(features, "exact", k)
        yield f"batch {size}", join([detector.score_features(tests[at : at + size]) for at in range(0, len(tests), size)])
    for budget in ("512MiB", "4GiB"):
        yield f"memory {budget}", _open(features, "exact", k, budget).score_features(tests)
    order = np.random.default_rng(0).permutation(len(tests))
    yield "permuted", _open(features, "exact", k).score_features(concatenate([tests[at : at + 1] for at in order]))
    before = faiss.omp_get_max_threads()
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        try:
            yield f"threads {threads}", _open(features, "exact", k).score_features(tests)
        finally:
            faiss.omp_set_num_threads(before)


def _same(ours: Scores, theirs: Scores) -> bool:
    """Whether the same images, in any order, have the same numbers to the last bit."""
    order = [theirs.ids.index(name) for name in ours.ids]
    pairs: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = [(ours.maps, theirs.maps)]
    for name in ours.level_dist:
        pairs += [(ours.level_dist[name], theirs.level_dist[name]), (ours.nearest[name], theirs.nearest[name])]
    return all(np.array_equal(mine, other[order]) for mine, other in pairs)


def off_oracle(bank: Snapshot, tests: FeatureBatch, scores: Scores, k: int) -> float:
    """Return the largest relative difference between some distances and those of brute force in float64."""
    largest = 0.0
    for image, rows in enumerate(galleries(bank, scores, k)[:_ORACLE_IMAGES]):
        for level in bank.layout.levels:
            which = np.linspace(0, level.height * level.width - 1, _ORACLE_QUERIES).astype(int)
            xq = np.asarray(tests.levels[level.name][image], np.float64).reshape(-1, level.channels)[which]
            nearest = np.full(len(xq), np.inf)
            for row in rows:
                xb = bank.level_map(level.name, int(row)).reshape(-1, level.channels).astype(np.float64)
                best = ((xb**2).sum(axis=1) - 2 * xq @ xb.T).argmin(axis=1)
                nearest = np.minimum(nearest, np.linalg.norm(xq - xb[best], axis=1))
            off = np.abs(scores.level_dist[level.name][image].ravel()[which] - nearest)
            largest = max(largest, float((off / np.maximum(nearest, np.finfo(np.float32).tiny)).max()))
    return largest


def galleries(bank: Snapshot, scores: Scores, k: int) -> IntArray:
    """Return the bank rows of the k nearest normals, (n, k)."""
    row_of = {name: row for row, name in enumerate(bank.ids)}
    return np.array([[row_of[name] for name in line[:k]] for line in scores.neighbor_ids])


@contextmanager
def _instrumented() -> Iterator[Timings]:
    """Count the seconds of each part of exact search by FAISS, summed over threads."""
    timings = Timings()

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with timings(name):
                return function(*arguments)

        return run

    parts: list[tuple[str, Any, str]] = [("decode", Blocks, "__call__")]
    parts += [(name, faiss_exact, name) for name in ("product_knn", "direct_sq_dist", "scan", "rounding_of")]
    before = [getattr(owner, attribute) for _, owner, attribute in parts]
    for (name, owner, attribute), function in zip(parts, before, strict=True):
        setattr(owner, attribute, timed(function, name))
    try:
        yield timings
    finally:
        for (_, owner, attribute), function in zip(parts, before, strict=True):
            setattr(owner, attribute, function)


def _child(function: str, *arguments: object) -> dict[str, Any]:
    """Call a function of this module in a process of its own."""
    call = f"gallery.{function}({', '.join(map(repr, arguments))})"
    return main_job.script(f"import json\nfrom benchmarks import gallery\nprint(json.dumps({call}))")


def _least_s(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs: a peak is reached when nothing disturbs."""
    return min(seconds_of(run) for _ in range(_PEAK_RUNS))


def ratio_of(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios of runs that were measured side by side."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _say(title: str, row: Row) -> Row:
    print(f"{title}: {_text(row)}", file=sys.stderr, flush=True)
    return row


def _text(value: object) -> str:
    """A value of a row in one line."""
    if isinstance(value, dict) and "runs" in value:
        return f"{_text(value['median'])} ({_text(value['min'])} to {_text(value['max'])})"
    if isinstance(value, dict):
        return ", ".join(
            f"{name} [{_text(item)}]"
            if isinstance(item, dict) and "runs" not in item
            else f"{name} {format_bytes(item) if 'bytes' in name else _text(item)}"
            for name, item in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--shapes", nargs="*", choices=sorted(SHAPES), default=list(SHAPES), help="shapes of generated features"
    )
    parser.add_argument("--k", nargs="+", type=int, default=[5, 50])
    parser.add_argument("--recipes", nargs="+", default=["exact", "location", "compact", "ivf"])
    parser.add_argument("--normals", type=int, default=200, help="images in a generated bank (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bank", type=Path, help="a bank of real features to measure on as well")
    parser.add_argument("--queries", type=Path, help="the features of its test images, see benchmarks.features")
    parser.add_argument("--data", type=Path, help="a folder that holds mvtec_bottle, for quality")
    parser.add_argument("--memory-normals", nargs="+", type=int, default=[500, 5000])
    parser.add_argument("--scaling-normals", nargs="+", type=int, default=[500, 1000, 2000, 5000, 10000, 20000])
    parser.add_argument("--scratch", type=Path, help="a folder on a disk for banks, which take up to 20 GB")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    arguments = parser.parse_args()
    if (arguments.bank is None) != (arguments.queries is None):
        parser.error("--bank and --queries belong together")
    for recipe in set(arguments.recipes) - set(recipe_names()):
        _say("skipped", {"unknown recipe": recipe})
        arguments.recipes.remove(recipe)
    return arguments


def _setup(arguments: argparse.Namespace, scratch: Path) -> Setup:
    sets = []
    if set(arguments.only) - {"memory", "scaling"}:
        for name in arguments.shapes:
            product = Product(SHAPES[name])
            bank = write_bank(scratch / f"{name}.bank", product, arguments.normals)
            sets.append(Features(name, bank.path, product.tests(Setup.batch)))
        if arguments.bank:  # a copy, since indexes are built inside the bank
            copy = shutil.copytree(arguments.bank, scratch / arguments.bank.name)
            sets.append(Features(arguments.bank.stem, copy, load_queries(arguments.queries)))
    return Setup(
        sets=sets,
        scratch=scratch,
        recipes=arguments.recipes,
        ks=arguments.k,
        repeats=arguments.repeats,
        data=arguments.data,
        shapes=SHAPES,
        memory_normals=sorted(arguments.memory_normals),
        scaling_normals=sorted(arguments.scaling_normals),
    )


SECTIONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "build": build,
    "speed": speed,
    "quality": quality,
    "equal": equal,
    "memory": memory,
    "scaling": scaling,
    "profile": profile,
}

if __name__ == "__main__":
    main()
