"""The commands for verdicts: calibrate, drift."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from spade_faiss.cli.options import Commands, add_cluster, add_method, add_product, add_run, open_detector
from spade_faiss.cli.text import Output, describe_calibration, describe_products
from spade_faiss.core.errors import InputError

if TYPE_CHECKING:
    from spade_faiss.scoring.detector import Detector

_ARTICLES = {"knn": "an", "max": "a", "top": "a"}


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    calibrate = commands.add(
        "calibrate",
        _calibrate,
        "score normal images, so that scores get p-values and a promised false-alarm rate",
        "spade-faiss calibrate parts.bank --holdout good2/ --alpha 0.01",
    )
    calibrate.add_argument("bank", metavar="BANK", help="the bank's folder")
    calibrate.add_argument(
        "--holdout",
        nargs="+",
        metavar="IMAGES",
        help="normal images that are not in the bank (default: the bank's own, each against the others)",
    )
    calibrate.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="share of normal images that may be alarms, unless another one is asked for later",
    )
    calibrate.add_argument("--sample", type=int, metavar="N", help="the most images of the bank to score (default: 200)")
    calibrate.add_argument("--seed", type=int, default=0, help="seed that they are drawn with (default: %(default)s)")
    add_product(calibrate)
    add_method(calibrate, without=("localize", "flag_above", "score"))
    add_run(calibrate, scores=True, groups=True)
    add_cluster(calibrate, searches=True)
    drift = commands.add(
        "drift",
        _drift,
        "test whether recent images still score like the normal ones of the calibration",
        "spade-faiss drift monday/ tuesday/ --bank parts.bank --out drift/",
    )
    drift.add_argument("results", nargs="+", metavar="RESULTS", help="folders that spade-faiss score wrote")
    drift.add_argument("--bank", required=True, help="the bank's folder")
    drift.add_argument("--product", metavar="NAME", help="of a bank of several products, one alone (default: each by itself)")
    drift.add_argument("--out", help="the folder to write drift.html and drift.json to (default: the first of RESULTS)")
    drift.add_argument("--level", type=float, default=0.01, help="chance of a false alarm (default: %(default)s)")
    drift.add_argument(
        "--defects", type=float, default=0.05, help="share of recent images that may be defects (default: %(default)s)"
    )


def _calibrate(arguments: argparse.Namespace) -> Output:
    from spade_faiss.decisions.calibration import Thresholds
    from spade_faiss.report.metric_labels import SCORE_LABELS
    from spade_faiss.workflows.calibrate import calibrate

    detector = open_detector(arguments)
    if detector.bank.is_of_products:
        return _calibrate_products(detector, arguments)
    made = calibrate(
        detector,
        holdout=arguments.holdout,
        alpha=arguments.alpha,
        sample=arguments.sample,
        seed=arguments.seed,
    )
    numbers, text = describe_calibration(detector.bank, made)
    tests = detector.method.image_scores
    found: Thresholds = made.thresholds(made.alpha, tests=tests)
    at = {"knn": found.image, "max": found.map, "top": found.top}
    limits = [f"{_ARTICLES[name]} {SCORE_LABELS[name]} of {at[name]:.4g}" for name in tests if name in at]
    above = f"above {' or '.join(limits)}{', whatever the others are' if len(tests) > 1 else ''}"
    highest = sorted(zip(made.map_score, made.image_score, made.images, strict=True), reverse=True)[:3]
    lines = [
        f"{detector.bank.path}: {text}",
        f"  alarm       {above if limits else 'by the p-value of the structure, which has no fixed threshold'}",
        f"  region      pixels above {found.pixel:.4g}: at most {found.alpha:g} of normal images have one",
        f"  pixel       {found.pixel_share:.4g}: at most {found.alpha:g} of a normal image's pixels are above",
        f"  p-values    from {made.smallest_p:.3g} on",
        *(f"  highest     {name}: image score {image:.4g}, map maximum {top:.4g}" for top, image, name in highest),
    ]
    return {"bank": str(detector.bank.path), **numbers, "thresholds": vars(found)}, lines


def _calibrate_products(detector: Detector, arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.calibrate import calibrate_products

    if arguments.holdout is not None:
        raise InputError("held-out images are of one product; name it: --product NAME")
    made = calibrate_products(detector, alpha=arguments.alpha, sample=arguments.sample, seed=arguments.seed)
    numbers, lines = describe_products(detector.bank, made)
    return {"bank": str(detector.bank.path), "products": numbers}, [f"{detector.bank.path}: {len(made)} products", *lines]


def _drift(arguments: argparse.Namespace) -> Output:
    from spade_faiss.bank.bank import Bank
    from spade_faiss.report.drift_page import drift_numbers, product_drift_numbers, product_drift_verdict
    from spade_faiss.workflows.drift import drift, drift_of_products, folder_of, write_drift

    results, asked = arguments.results, {"level": arguments.level, "defects": arguments.defects}
    out = arguments.out or folder_of(results[0])
    if arguments.product is None and Bank.open(arguments.bank).is_of_products:
        each = drift_of_products(results, bank=arguments.bank, **asked)
        write_drift(out, each, results=results, bank=arguments.bank)
        said = (f"  {name}: {item if isinstance(item, str) else item.verdict}" for name, item in each.items())
        told = [product_drift_verdict(each), *said, f"look at {out}/drift.html"]
        return {"out": out, **product_drift_numbers(each)}, told
    found = drift(results, bank=arguments.bank, product=arguments.product, **asked)
    write_drift(out, found, results=results, bank=arguments.bank)
    lines = [
        found.verdict,
        *(
            f"  {name:6} distance {test.distance:.3f}, p = {test.p_value:.2g}, median p-value of the images {test.median_p:.2f}"
            for name, test in found.tests.items()
        ),
        *([f"  {found.outdated}"] if found.outdated else []),
        f"look at {out}/drift.html",
    ]
    return {"out": out, **drift_numbers(found)}, lines
