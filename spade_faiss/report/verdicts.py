"""Decisions as headlines, notices, tables and a chart."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from spade_faiss.decisions.calibration import LEAVE_ONE_OUT
from spade_faiss.decisions.conformal import images_needed, rate_bound
from spade_faiss.decisions.rule import DecisionRule
from spade_faiss.decisions.rules import Decisions
from spade_faiss.report import charts
from spade_faiss.report.metric_labels import SCORE_LABELS
from spade_faiss.report.model import Chart, Headline, Table

# What the scores are made of that have an approximate rate where images are left out, by their names in `IMAGE_SCORES`.
_OF_MAPS = {"max": "the map's maximum", "top": "the mean of its top pixels", "structure": "its structure"}
# The thresholds of the scores that have a fixed one, by the same names.
_FIXED = {"knn": "image", "max": "map", "top": "top"}
# The rates that the chart of alarms shows.
_HIGHEST_RATE = 0.2


def verdict_headlines(decisions: Decisions) -> Iterator[Headline]:
    """The verdicts in a few numbers."""
    verdicts, defective = decisions.verdicts, decisions.defective
    alarm, at = verdicts.alarm, decisions.at
    if defective is None:
        yield Headline(label="Alarms", value=int(alarm.sum()), note=f"of {len(alarm)} images, {at}")
    else:
        for label, kind in (("False alarms", "normal"), ("Detected", "defective")):
            chosen = dict(decisions.groups())[kind]
            value = float(alarm[chosen].mean()) if chosen.any() else None
            yield Headline(label=label, value=value, note=f"of {kind} images, {at}")


def verdict_notices(decisions: Decisions) -> Iterator[str]:
    """What the verdicts promise, and on which images that rests."""
    if decisions.rule is None:
        yield from _product_notices(decisions)
        return
    calibration, rule, level = decisions.rule.calibration, decisions.verdicts.rule, decisions.verdicts.level
    n, images = len(calibration), len(decisions.verdicts.alarm)
    if rule == "alpha":
        promise = f"at most {level:.3g} of normal images are alarms on average over calibrations (90 % of them stay below "
        promise += f"{rate_bound(level, n):.3g})"
    else:
        promise = f"at most {level:.3g} of this batch's alarms are expected to be false"
    by_map = [_OF_MAPS[name] for name in decisions.rule.tests if name in _OF_MAPS]
    how = (
        f"{n} of the bank's {calibration.available} images, each against the others"
        + (f": approximate for {_listed(by_map)}" if by_map else "")
        if calibration.mode == LEAVE_ONE_OUT
        else f"{n} held-out normal images"
    )
    yield f"Verdicts promise that {promise}. Calibrated on {how}."
    if rule == "fdr" and (single := level / images) < calibration.smallest_p:
        yield (
            f"A single alarm among {images} images keeps fdr={level:g} with a p-value of at most {single:.3g}; the smallest "
            f"that {n} calibration images give is {calibration.smallest_p:.3g}; it takes {images_needed(single)} of them."
        )


def _product_notices(decisions: Decisions) -> Iterator[str]:
    verdicts = decisions.verdicts
    promise = (
        f"of the normal images of each product, at most {verdicts.level:.3g} are alarms on average over calibrations, "
        f"beside those that are taken for another product"
        if verdicts.rule == "alpha"
        else f"at most {verdicts.level:.3g} of this batch's alarms are expected to be false"
    )
    yield f"Verdicts promise that {promise}. Each product has a calibration of its own."
    if without := [name for name, rule in decisions.rules.by_product.items() if rule is None]:
        yield f"No verdicts on images of {_listed(without)}: see below why."


def verdict_charts(decisions: Decisions) -> Iterator[Chart]:
    """The share of alarms at every promised rate."""
    p_value = np.nan_to_num(decisions.verdicts.p_value, nan=1.0)
    curves = {f"{name} ({int(chosen.sum())})": p_value[chosen] for name, chosen in decisions.groups()}
    note = "Share of images with a p-value of at most alpha; normal ones should stay on the diagonal or below."
    yield Chart(title="Calibration", svg=charts.rate_chart(curves, _HIGHEST_RATE), note=note)


def verdict_tables(decisions: Decisions) -> Iterator[Table]:
    """The thresholds, and the promised rates beside the observed ones."""
    yield _threshold_table(decisions.rule) if decisions.rule is not None else _product_thresholds(decisions)
    rows = []
    for row in decisions.achieved():
        for name, _ in decisions.groups():
            share = row[name]
            rows.append((f"{row['alpha']:g}", name, share["rate"], *share["interval"], f"{share['count']} of {share['of']}"))
    yield Table(
        title="Promised and observed rates",
        header=("alpha", "images", "alarms", "95 % from", "to", "count"),
        rows=tuple(rows),
        note=""
        if decisions.defective is not None
        else "Without labels: alarms among all images, defects and false alarms alike.",
    )


def _product_thresholds(decisions: Decisions) -> Table:
    """The thresholds of each product."""
    rules = decisions.rules.by_product
    tests = [name for name in decisions.rules.rules[0].tests if name in _FIXED]
    rows = []
    for name, rule in rules.items():
        found = None if rule is None else rule.thresholds
        limits = [None if found is None else _finite(getattr(found, _FIXED[test])) for test in tests]
        n = 0 if rule is None else len(rule.calibration)
        rows.append((name, n, None if found is None else found.alpha, *limits, None if found is None else found.pixel))
    return Table(
        title="Thresholds of each product",
        header=("product", "calibrated on", "alpha", *(SCORE_LABELS[test] for test in tests), "pixel"),
        rows=tuple(rows),
        note="An image is an alarm above one of its product's thresholds, a region is above the one of pixels.",
    )


def _threshold_table(rule: DecisionRule) -> Table:
    found, tests = rule.thresholds, rule.tests
    at = {"knn": found.image, "max": found.map, "top": found.top, "structure": math.inf}
    others = {**dict.fromkeys(at, "the other scores"), "knn": "the map"}
    means = {name: f"an alarm, whatever {others[name]}" if len(tests) > 1 else "an alarm" for name in at}
    means["structure"] = "an alarm by its p-value alone: what it is compared with depends on the image"
    return Table(
        title="Thresholds",
        header=("score", "above which", "means"),
        rows=(
            *((SCORE_LABELS[name], _finite(at[name]), means[name]) for name in tests),
            ("pixel", found.pixel, f"a region: at most {found.alpha:g} of normal images have one"),
            ("pixel", found.pixel_share, f"at most {found.alpha:g} of a normal image's pixels"),
        ),
        note=f"At alpha={found.alpha:g}."
        + (" All tests together keep it, so that each alone has a higher threshold." if len(tests) > 1 else ""),
    )


def _listed(names: list[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _finite(threshold: float) -> float | None:
    return threshold if math.isfinite(threshold) else None
