"""Measures windows: what recipe `location` costs among few images and all, beside others, and as a bank grows.

Run as `python -m benchmarks.windows --out benchmarks/results --data FOLDER`, FOLDER holding mvtec_bottle. What is compared runs
in turn, in one process, with the same number of threads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.deployment.places import by_engine, inputs_of
from benchmarks.features import SHAPES, Product, Shape, write_bank
from benchmarks.gallery import AMPLE, Engine, engine_of, in_turn, ratio_of
from benchmarks.process import machine, seconds, spread
from benchmarks.sweep.sets import Places
from spade_faiss import Bank, Detector, FeatureBatch
from spade_faiss.core.declaring import ALL
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import Level, concatenate
from spade_faiss.features.datasets import load_dataset
from spade_faiss.features.forward.choice import usable_engines
from spade_faiss.features.layout import prepare
from spade_faiss.index.build import build_index
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.search import location
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.recipe import Recipe, load_recipe

Row = dict[str, Any]

# The blocks of a transformer as RAD searches them, at an input of 448 x 448 pixels: generated features look like those of a
# convolutional network's deepest level.
_BLOCKS = (3, 6, 9, 11)
SPEED_SHAPES = {
    "lite0": SHAPES["lite0"],
    "vits14": Shape(
        tuple(Level(f"blocks.{block}", 384, 7, 32, 32) for block in _BLOCKS),
        (SHAPES["lite0"].looks[-1],) * len(_BLOCKS),
        384,
    ),
}
NORMALS, KS, RADII = 300, (5, 100, ALL), (1, 3)
# Banks that grow, of generated features, and how many neighbors are searched: as the preset `default` has it, and five.
GROWTH_SHAPES, GROWTH_NORMALS, MANY, FEW = "lite0", (200, 1000, 5000), 100, 5
# What a machine of a line has for it; a bank of 5,000 has 0.6 GiB of codes.
GROWTH_MEMORY = ("2GiB", "256MiB")
# Each test image comes several times: only then are the codes of its neighbors there.
GROWTH_REPEATS = 12
TESTS, REPEATS = 4, 5
# AnomalyDINO compares the patches of the last block, at this size, and averages the highest 1 % of their distances.
NETWORK, SIZE, LAST, TOP = "vit_small_patch14_dinov2", 448, 11, 0.01
PICTURES, TEST_PICTURES, FORWARD_REPEATS = 60, 12, 5
_SEED = 0


def main() -> None:
    """Measure all sections, or those that --only names, and write them to windows.json; the others stay as they are."""
    parser = parser_of(__doc__, SECTIONS)
    parser.add_argument("--scratch", type=Path, help="where banks are written; some 2 GB")
    arguments = parser.parse_args()
    target = arguments.out / "windows.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for name in arguments.only:
            figures[name] = {"machine": machine(), "rows": []}
            for row in SECTIONS[name](Places(arguments.data, Path(scratch))):
                print(name, json.dumps(row), flush=True)
                figures[name]["rows"].append(row)
            target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def speed(places: Places) -> Iterator[Row]:
    """Milliseconds an image of the pixel search, image by image: exact, in windows, and in windows without the kernel."""
    for name, shape in SPEED_SHAPES.items():
        product = Product(shape)
        bank = write_bank(places.scratch / f"{name}.bank", product, NORMALS).path
        tests = product.tests(TESTS)
        one_by_one = [tests[place : place + 1] for place in range(len(tests))]
        for k in KS:
            engines = {"exact": engine_of(_open(bank, "exact", k))}
            for radius in RADII:
                engines |= _windows(bank, k, radius)
            taken = in_turn(engines, one_by_one, REPEATS)
            for radius in RADII:
                window, others = taken[f"window {radius}"], {"exact": taken["exact"]}
                if (plain := f"plain {radius}") in taken:
                    others["plain"] = taken[plain]
                yield {
                    "set": name,
                    "normals": NORMALS,
                    "k": NORMALS if k == ALL else k,
                    "radius": radius,
                    "ms": {engine: _ms(of) for engine, of in {"window": window, **others}.items()},
                    "times": {engine: ratio_of(of, window) for engine, of in others.items()},
                }


def growth(places: Places) -> Iterator[Row]:
    """What windows of the nearest hundred cost as a bank grows, with room for the codes of all images and of few."""
    product = Product(SHAPES[GROWTH_SHAPES])
    tests = product.tests(TESTS)
    one_by_one = [tests[place : place + 1] for place in range(len(tests))]
    banks = {count: write_bank(places.scratch / f"{count}.bank", product, count).path for count in GROWTH_NORMALS}
    engines: dict[str, Engine] = {}
    for count, bank in banks.items():
        engines |= {f"{count} {memory}": engine_of(_open(bank, "location", MANY, memory)) for memory in GROWTH_MEMORY}
        engines[f"{count} exact"] = engine_of(_open(bank, "exact", FEW))
    taken = in_turn(engines, one_by_one, GROWTH_REPEATS)
    for count, bank in banks.items():
        yield {
            "normals": count,
            "bank_bytes": Bank.open(bank).bytes_on_disk,
            "ms": {name: _ms(taken[f"{count} {name}"]) for name in (*GROWTH_MEMORY, "exact")},
        }


def dino(places: Places) -> Iterator[Row]:
    """ViT-S/14 at 448 on real pictures, all normals being searched: ours beside AnomalyDINO's last step, on the same features.

    The weights are random: they cost what trained ones do, and say nothing about quality.
    """
    assert places.data is not None
    from spade_faiss.features.stream import FeatureStream
    from spade_faiss.workflows.extract import extract

    dataset = load_dataset(places.data / "mvtec_bottle")
    normals = sorted((dataset.root / "train" / "good").iterdir())[:PICTURES]
    chosen = np.linspace(0, len(dataset.test) - 1, TEST_PICTURES).round().astype(int)
    records = [dataset.test[place] for place in chosen]
    backbone = _random_backbone()
    path = places.scratch / "dino.bank"
    extraction = Extraction(backbone=backbone, normalize="l2", network=False)
    extracted = extract(normals, bank=path, preset="spade", extraction=extraction)
    stream = FeatureStream(backbone, Run(), timings=Timings(), batch_size=1)
    tests = concatenate([part.batch for part in stream(dataset.root, records, "tests")])
    bank = Bank.open(path)
    for recipe in ("exact", "clusters"):
        build_index(bank, load_recipe(recipe))
    ours = {
        "exact": _open(path, "exact", ALL),
        "clusters": _open(path, "clusters", ALL),
        "window": _open(path, _with_radius(1), ALL),
    }
    theirs, found = _anomaly_dino(bank), {name: _scores(detector, tests) for name, detector in ours.items()}
    expected = np.array([theirs(tests[place : place + 1]) for place in range(len(tests))])
    engines: dict[str, Engine] = {name: engine_of(detector) for name, detector in ours.items()}
    engines["AnomalyDINO"] = lambda one: seconds(partial(theirs, one))
    taken = in_turn(engines, [tests[place : place + 1] for place in range(len(tests))], TEST_PICTURES)
    yield {
        "normals": len(bank),
        "tests": len(tests),
        "bank_bytes": bank.bytes_on_disk,
        "extract_s": extracted.total_s,
        "forward_ms": _forward_ms(backbone, inputs_of(records[:4], backbone)),
        "ms": {name: _ms(of) for name, of in taken.items()},
        "times": {name: ratio_of(taken["AnomalyDINO"], taken[name]) for name in ours},
        "off": {name: float(np.max(np.abs(scores / expected - 1))) for name, scores in found.items()},
    }


def _open(bank: Path, recipe: str | Recipe, k: int | str, memory: str = AMPLE) -> Detector:
    # Cosine distances are half of squared ones, between vectors of unit length.
    method = Method(k_gallery=k, distance="squared_l2", sigma=0, score="top", top_share=TOP)
    return Detector.open(bank, recipe=recipe, method=method, run=Run(memory=memory))


def _with_radius(radius: int) -> Recipe:
    return load_recipe("location").with_query({"radius": str(radius)})


def _windows(bank: Path, k: int | str, radius: int) -> dict[str, Engine]:
    """The engines of one window: by the kernel and, unless all images are searched, as where that does not run."""
    engines = {f"window {radius}": engine_of(_open(bank, _with_radius(radius), k))}
    if k != ALL:
        with patch.object(location, "usable_simd_level", lambda channels: None):
            engines[f"plain {radius}"] = engine_of(_open(bank, _with_radius(radius), k))
    return engines


def _random_backbone() -> Backbone:
    import timm
    import torch

    from spade_faiss.features.network import Network

    torch.manual_seed(_SEED)
    model = timm.create_model(NETWORK, pretrained=False, img_size=SIZE)
    return Backbone(Network.from_timm(model, NETWORK, blocks=(LAST,)), preprocess=Preprocess(size=SIZE))


def _anomaly_dino(bank: Bank) -> Callable[[FeatureBatch], float]:
    """AnomalyDINO's search and score: FAISS over all patches as unit vectors, the mean of the highest 1 % of the distances."""
    (level,) = bank.layout.levels
    index = import_faiss().IndexFlatL2(level.channels)
    for row in range(len(bank)):
        index.add(bank.level_map(level.name, row).reshape(-1, level.channels).astype(np.float32))

    def score(one: FeatureBatch) -> float:
        maps = prepare(one, bank.layout).levels[level.name]
        sq_dist, _ = index.search(np.ascontiguousarray(maps.reshape(-1, level.channels), np.float32), 1)
        return float(_top(sq_dist.reshape(1, level.height, level.width))[0])

    return score


def _scores(detector: Detector, tests: FeatureBatch) -> FloatArray:
    """The same score by our distances, which are squared: of patches, before they are resized to pixels."""
    (squared,) = detector.score_features(tests).level_dist.values()
    return _top(squared)


def _top(sq_dist: FloatArray) -> FloatArray:
    return map_statistics(np.float32(0.5) * sq_dist, None, TOP)[:, 0]


def _forward_ms(backbone: Backbone, inputs: FloatArray) -> dict[str, Row]:
    """Milliseconds a picture of the forward pass, by each engine."""
    runs = {"torch": backbone, **{engine: by_engine(backbone, engine, inputs) for engine in usable_engines("float32")}}

    def timed(engine: str) -> Engine:
        return lambda _: seconds(partial(runs[engine], inputs[:1]))

    taken = in_turn({engine: timed(engine) for engine in runs}, [FeatureBatch([], np.empty((0, 1)), {})], FORWARD_REPEATS)
    return {engine: _ms(of) for engine, of in taken.items()}


def _ms(of: list[float]) -> Row:
    return {key: value for key, value in spread([1000 * each for each in of]).items() if key != "runs"}


SECTIONS: Mapping[str, Callable[[Places], Iterator[Row]]] = {"speed": speed, "growth": growth, "dino": dino}

if __name__ == "__main__":
    main()
