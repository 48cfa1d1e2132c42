"""Measures one bank of several products beside a bank for each: who names the product, and what is found.

Run as `python -m benchmarks.products --data FOLDER --out benchmarks/results`, FOLDER holding the real sets. All sets are placed
into the network's input alike (letterbox), in the one bank and in the others, so that nothing but the bank differs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser_of
from benchmarks.calibration import EXPOSURES, number_of, write_exposures
from benchmarks.process import machine
from benchmarks.sweep.sets import BACKBONE
from spade_faiss import Backbone, Bank, Decision, Detector, ReportOptions, evaluate, fit, load_backbone, load_recipe
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord, load_dataset
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.report.metric_labels import METRICS, SCORE_RANKINGS
from spade_faiss.report.products import ProductResult
from spade_faiss.report.results import Results
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.evaluation import Metrics
from spade_faiss.scoring.routing import NONE_LEVEL, Router

Row = dict[str, Any]

SETS = ("mvtec_bottle", "magnetic_tile", "mvtec_screw", "mvtec_toothbrush", "aws_cookies")
ALPHA = 0.05
RUN = Run(memory="4GiB")


def main() -> None:
    """Measure one bank of all sets, a bank for each, and pictures of a product that the bank does not have."""
    parser = parser_of(__doc__)
    parser.add_argument("--scratch", type=Path, help="where banks are kept for the next run")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--preset", default="default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        figures = {"machine": machine(), **_measure(arguments.data, scratch, arguments.sets, arguments.preset)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "products.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _measure(data: Path, scratch: Path, sets: tuple[str, ...], preset: str) -> Row:
    good, labeled = scratch / "good", scratch / "labeled"
    for folder in (good, labeled):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for name in sets:
        (good / name).symlink_to((data / name / "train" / "good").resolve())
        (labeled / name).symlink_to((data / name).resolve())
    backbone = load_backbone(BACKBONE, preprocess=Preprocess(resize_mode="letterbox"))
    grouped = EXPOSURES in sets  # those of a tile are left out together
    start = time.perf_counter()
    made = fit(
        good,
        bank=scratch / f"all-{preset}.bank",
        preset=preset,
        extraction=Extraction(
            backbone=backbone,
            products="folder",
            group_by=str(_exposures(data, scratch / "together.csv", f"{EXPOSURES}/")) if grouped else None,
        ),
        run=RUN,
    )
    fit_s = time.perf_counter() - start
    together, one_s = _evaluate(labeled, made.bank, backbone, scratch / "all")
    routes = _routes(scratch / "all" / "scores.h5")
    rows = []
    for name in sets:
        alone = fit(
            good / name,
            bank=scratch / f"{name}-{preset}.bank",
            preset=preset,
            extraction=Extraction(
                backbone=backbone, group_by=str(_exposures(data, scratch / "alone.csv", "")) if name == EXPOSURES else None
            ),
            run=RUN,
        )
        results, alone_s = _evaluate(data / name, alone.bank, backbone, scratch / name)
        found = next(item for item in together.products if item.name == name)
        rows.append(
            {
                "set": name,
                **_of_product(found, routes[name]),
                "one_bank": _numbers(found.metrics, made.bank),
                "alone": _numbers(results.metrics, alone.bank),
                "false_alarms_alone": _false_alarms(results),
                "alone_ms": 1000 * alone_s / results.images,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    unknown = list(_left_out(data, made.bank, backbone, sets))
    return {
        "preset": preset,
        "alpha": ALPHA,
        "none_level": NONE_LEVEL,
        "images": together.images,
        "fit_s": fit_s,
        "one_bank_ms": 1000 * one_s / together.images,
        "product_ms": 1000 * together.timing_s["product"] / together.images,
        "rows": rows,
        "left_out": unknown,
    }


def _exposures(data: Path, table: Path, prefix: str) -> Path:
    """A table of the exposures of each tile."""
    return write_exposures(sorted((data / EXPOSURES / "train" / "good").iterdir(), key=number_of), table, prefix)


def _evaluate(dataset: Path, bank: Bank, backbone: Backbone, out: Path) -> tuple[Results, float]:
    """The results of a labeled set, and the seconds that features and searches took."""
    detector = Detector.open(bank, run=Run(memory="4GiB"), backbone=backbone)
    results = evaluate(dataset, bank=detector, out=out, decision=Decision(alpha=ALPHA), report=ReportOptions(shown=1))
    steps = ("forward", "prepare", "product", "image search", "pixel search", "fusion")
    return results, sum(results.timing_s.get(step, 0.0) for step in steps)


def _routes(path: Path) -> dict[str, Row]:
    """By product: confidences and p-values of the test "none of them", of normal and of defective test images."""
    found: dict[str, Row] = {}
    with ScoreFile.open(path) as scores:
        assert scores.routes is not None
        products = np.array([name.partition("/")[0] for name in scores.ids])
        normal = np.array(["/test/good/" in name for name in scores.ids])
        for product in dict.fromkeys(products.tolist()):
            own = products == product
            right = scores.routes.product[own] == product
            none = scores.routes.none
            found[product] = {
                "wrong": [scores.ids[i] for i in np.flatnonzero(own)[~right]],
                "normal_tests": int((own & normal).sum()),
                "least_confidence": float(scores.routes.confidence[own].min()),
                "low_p_of_normal": float((scores.routes.p_none[own & normal] <= NONE_LEVEL).mean()),
                "low_p_of_defective": float((scores.routes.p_none[own & ~normal] <= NONE_LEVEL).mean()),
                "none_of_normal": float(none[own & normal].mean()),
                "none_of_defective": float(none[own & ~normal].mean()),
            }
    return found


def _of_product(found: ProductResult, routes: Row) -> Row:
    return {
        "normals": found.normals,
        "images": found.images,
        "right": found.images - (found.other or 0),
        "false_alarms": found.false_alarms,
        **routes,
    }


def _numbers(metrics: Metrics | None, bank: Bank) -> Row:
    assert metrics is not None
    ranked = getattr(metrics, SCORE_RANKINGS[bank.usual.method.score])
    pixel = metrics.pixel
    assert pixel is not None
    by_score = {name: getattr(metrics, attribute).auroc for name, attribute in SCORE_RANKINGS.items() if name != "structure"}
    return {
        "auroc": ranked.auroc,
        **by_score,
        "pixel_auroc": pixel.auroc,
        **{name: getattr(pixel, name) for name in METRICS if name == "aupro"},
    }


def _false_alarms(results: Results) -> float:
    assert results.decisions is not None
    chosen = dict(results.decisions.groups())["normal"]
    return float(results.decisions.verdicts.alarm[chosen].mean())


def _left_out(data: Path, bank: Bank, backbone: Backbone, sets: tuple[str, ...]) -> Iterator[Row]:
    """What is said of the test images of each product by a bank that does not have it."""
    for name in sets:
        tests = load_dataset(data / name).test
        embedding = _embeddings(tests, bank, backbone, data / name)
        held = bank.part(name).pictures.ids
        bank.remove(held)
        try:
            state = bank.snapshot()
            found = Router(state, ImageIndex.open(state, load_recipe("exact")))(embedding)
        finally:
            bank.restore(held)
        yield {
            "set": name,
            "images": len(found),
            "told": int(found.none.sum()),
            "median_p": float(np.median(found.p_none)),
            "median_confidence": float(np.median(found.confidence)),
        }


def _embeddings(records: list[ImageRecord], bank: Bank, backbone: Backbone, root: Path) -> FloatArray:
    detector = Detector.open(bank, run=Run(memory="4GiB"), backbone=backbone)
    stream = detector.feature_stream(Timings())
    return np.concatenate([extracted.batch.embedding for extracted in stream(root, records, "embed")])


if __name__ == "__main__":
    main()
