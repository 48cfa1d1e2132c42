"""Decisions as headlines, notices, tables and a chart."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spade_faiss.decisions.calibration import LEAVE_ONE_OUT
from spade_faiss.decisions.conformal import images_needed, rate_bound
from spade_faiss.decisions.rule import Decisions
from spade_faiss.report import charts
from spade_faiss.report.metric_labels import SCORE_LABELS
from spade_faiss.report.model import Chart, Headline, Table

# What the scores are made of that have an approximate rate where images are left out, by their names in `IMAGE_SCORES`.
_OF_MAPS = {"max": "the map's maximum", "top": "the mean of its top pixels", "structure": "its structure"}
# The rates that the chart of alarms shows.
_HIGHEST_RATE = 0.2


def verdict_headlines(decisions: Decisions) -> Iterator[Headline]:
    """The verdicts in a few numbers."""
    verdicts, defective = decisions.verdicts, decisions.defective
    alarm, at = verdicts.alarm, f"{verdicts.rule}={verdicts.level:g}"
    if defective is None:
        yield Headline(label="Alarms", value=int(alarm.sum()), note=f"of {len(alarm)} images, {at}")
    else:
        yield Headline(label="False alarms", value=float(alarm[~defective].mean()), note=f"of normal images, {at}")
        yield Headline(label="Detected", value=float(alarm[defective].mean()), note=f"of defective images, {at}")


def verdict_notices(decisions: Decisions) -> Iterator[str]:
    """What the verdicts promise, and on which images that rests."""
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


def verdict_charts(decisions: Decisions) -> Iterator[Chart]:
    """The share of alarms at every promised rate."""
    p_value = decisions.verdicts.p_value
    curves = {f"{name} ({int(chosen.sum())})": p_value[chosen] for name, chosen in decisions.groups()}
    note = "Share of images with a p-value of at most alpha; normal ones should stay on the diagonal or below."
    yield Chart(title="Calibration", svg=charts.rate_chart(curves, _HIGHEST_RATE), note=note)


def verdict_tables(decisions: Decisions) -> Iterator[Table]:
    """The thresholds, and the promised rates beside the observed ones."""
    found, tests = decisions.rule.thresholds, decisions.rule.tests
    at = {"knn": found.image, "max": found.map, "top": found.top, "structure": math.inf}
    others = {**dict.fromkeys(at, "the other scores"), "knn": "the map"}
    means = {name: f"an alarm, whatever {others[name]}" if len(tests) > 1 else "an alarm" for name in at}
    means["structure"] = "an alarm by its p-value alone: what it is compared with depends on the image"
    yield Table(
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


def _listed(names: list[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _finite(threshold: float) -> float | None:
    return threshold if math.isfinite(threshold) else None
