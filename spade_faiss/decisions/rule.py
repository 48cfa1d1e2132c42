"""What a calibration says of one run: who is an alarm, where, and how the promised rates compare with what was seen."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import BankError
from spade_faiss.core.settings import Decision
from spade_faiss.decisions.calibration import (
    LEAVE_ONE_OUT,
    Calibration,
    Thresholds,
    Verdicts,
    calibration_facts,
    command,
    find_calibration,
)
from spade_faiss.decisions.conformal import Bools, alarms, check_rate, images_needed, p_values, rate_bound, rate_interval
from spade_faiss.decisions.regions import Region, to_text
from spade_faiss.report import charts
from spade_faiss.report.model import Chart, Headline, Table
from spade_faiss.scoring.detector import Detector

_log = logging.getLogger(__name__)

# Rates that are compared with what was seen, where there are enough calibration images for them.
ASKED = (0.01, 0.02, 0.05, 0.1)
CURVE_TO = 0.2


@dataclass(frozen=True, eq=False, kw_only=True)
class DecisionRule:
    """A calibration that holds for a detector, and what to make of it: alarms at `alpha`, or keeping the share `fdr`.

    `alpha` is also that of the regions; it is the calibration's own under `fdr`.
    """

    calibration: Calibration
    thresholds: Thresholds
    fdr: float | None

    @staticmethod
    def of(detector: Detector, decision: Decision) -> tuple[DecisionRule | None, str]:
        """The decision rule of a run, or None and why there is none.

        Raises:
            BankError: if a rate is asked for and there is no calibration, or one that is out of date.
            InputError: for a rate out of range, or one that so few calibration images cannot promise.
        """
        alpha, fdr = decision.alpha, decision.fdr
        bank, config = detector.bank, detector.scoring_config
        calibration = find_calibration(bank, config)
        if calibration is None:
            notice = f"no p-values and no verdicts: {bank.path} has no calibration for these settings; make one with: "
            notice += command(bank, config)
        else:
            notice = calibration.outdated(bank)
        if calibration is None or notice:
            if alpha is not None or fdr is not None:
                raise BankError(notice)
            if calibration is not None:
                _log.warning(notice)
            return None, notice
        if fdr is not None:
            check_rate("fdr", fdr)
        return DecisionRule(
            calibration=calibration,
            thresholds=calibration.thresholds(
                calibration.alpha if alpha is None else alpha, maps=detector.method.localize != "none"
            ),
            fdr=fdr,
        ), ""

    def __call__(self, image_score: npt.NDArray[Any], map_score: npt.NDArray[Any] | None) -> Verdicts:
        """The verdicts of all images of the run."""
        return self.calibration.decide(
            image_score, map_score, alpha=self.thresholds.alpha if self.fdr is None else None, fdr=self.fdr
        )

    def p_of_pixel(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """(n,) p-values of pixel scores among the maxima of normal maps."""
        return p_values(self.calibration.scores[:, 1], scores)


@dataclass(frozen=True, eq=False, kw_only=True)
class Decisions:
    """The verdicts of n images and the regions of each, with the labels where there are any: (n,) defective."""

    rule: DecisionRule
    verdicts: Verdicts
    regions: Sequence[Sequence[Region]]
    defective: Bools | None

    def numbers(self) -> dict[str, Any]:
        """Of the run, for report.json."""
        calibration, verdicts = self.rule.calibration, self.verdicts
        return {
            **calibration_facts(calibration),
            "rule": {verdicts.rule: verdicts.level},
            "rate_bound_90": rate_bound(self.rule.thresholds.alpha, len(calibration)),
            "thresholds": asdict(self.rule.thresholds),
            "alarms": int(verdicts.alarm.sum()),
            "achieved": self.achieved(),
        }

    def image_numbers(self, i: int) -> dict[str, Any]:
        """Of one image, for report.json."""
        verdicts = self.verdicts
        return {
            "p_image": verdicts.p_image[i],
            "p_map": verdicts.p_map[i],
            "p_value": verdicts.p_value[i],
            "alarm": bool(verdicts.alarm[i]),
            "regions": [_region_numbers(region) for region in self.regions[i]],
        }

    def achieved(self) -> list[dict[str, Any]]:
        """For each rate asked for, the share of normal and of defective images that would be alarms; of all, without labels.

        Shares come with 95 % binomial intervals.
        """
        rows = []
        level = self.rule.thresholds.alpha
        for alpha in sorted({*ASKED, level}):
            if alpha < self.rule.calibration.smallest_p * (1 - 1e-9):
                continue
            passed = alarms(self.verdicts.p_value, alpha=alpha)
            rows.append({"alpha": alpha, **{name: _share(passed[chosen]) for name, chosen in self._groups()}})
        return rows

    def headlines(self) -> Iterator[Headline]:
        """The verdict in a few numbers."""
        alarm, rule = self.verdicts.alarm, self.verdicts.rule
        at = f"{rule}={self.verdicts.level:g}"
        if self.defective is None:
            yield Headline(label="Alarms", value=int(alarm.sum()), note=f"of {len(alarm)} images, {at}")
        else:
            yield Headline(label="False alarms", value=float(alarm[~self.defective].mean()), note=f"of normal images, {at}")
            yield Headline(label="Detected", value=float(alarm[self.defective].mean()), note=f"of defective images, {at}")

    def notices(self) -> Iterator[str]:
        """What the reader must know of the promise."""
        calibration, (rule, level) = self.rule.calibration, (self.verdicts.rule, self.verdicts.level)
        n = len(calibration)
        if rule == "alpha":
            promise = f"at most {level:.3g} of normal images are alarms on average over calibrations (90 % of them stay below "
            promise += f"{rate_bound(level, n):.3g})"
        else:
            promise = f"at most {level:.3g} of this batch's alarms are expected to be false"
        how = (
            f"{n} of the bank's {calibration.available} images, each against the others: approximate for the map's maximum"
            if calibration.mode == LEAVE_ONE_OUT
            else f"{n} held-out normal images"
        )
        yield f"Verdicts promise that {promise}. Calibrated on {how}."
        if rule == "fdr" and (single := level / len(self.verdicts.alarm)) < calibration.smallest_p:
            yield (
                f"A single alarm among {len(self.verdicts.alarm)} images keeps fdr={level:g} with a p-value of at most "
                f"{single:.3g}; the smallest that {n} calibration images give is {calibration.smallest_p:.3g}; "
                f"it takes {images_needed(single)} of them."
            )

    def charts(self) -> Iterator[Chart]:
        """The calibration curve."""
        curves = {f"{name} ({int(chosen.sum())})": self.verdicts.p_value[chosen] for name, chosen in self._groups()}
        note = "Share of images with a p-value of at most alpha; normal ones should stay on the diagonal or below."
        yield Chart(title="Calibration", svg=charts.rate_chart(curves, CURVE_TO), note=note)

    def tables(self) -> Iterator[Table]:
        """Thresholds, and asked against achieved rates."""
        found = self.rule.thresholds
        yield Table(
            title="Thresholds",
            header=("score", "above which", "means"),
            rows=(
                ("image score", _finite(found.image), "an alarm, whatever the map"),
                ("map maximum", _finite(found.map), "an alarm, whatever the image score"),
                ("pixel", found.pixel, f"a region: at most {found.alpha:g} of normal images have one"),
                ("pixel", found.pixel_share, f"at most {found.alpha:g} of a normal image's pixels"),
            ),
            note=f"At alpha={found.alpha:g}. Both tests together keep it, so that each alone has a higher threshold.",
        )
        rows = []
        for row in self.achieved():
            for name, _ in self._groups():
                share = row[name]
                rows.append(
                    (f"{row['alpha']:g}", name, share["rate"], *share["interval"], f"{share['count']} of {share['of']}")
                )
        yield Table(
            title="Asked and achieved",
            header=("alpha", "images", "alarms", "95 % from", "to", "count"),
            rows=tuple(rows),
            note=""
            if self.defective is not None
            else "Without labels: alarms among all images, defects and false alarms alike.",
        )

    def _groups(self) -> Iterator[tuple[str, Bools]]:
        if self.defective is None:
            yield "images", np.ones(len(self.verdicts.alarm), np.bool_)
        else:
            yield "normal", ~self.defective
            yield "defective", self.defective


def _finite(threshold: float) -> float | None:
    return threshold if math.isfinite(threshold) else None


def _share(passed: Bools) -> dict[str, Any]:
    count, total = int(passed.sum()), len(passed)
    if total == 0:
        return {"count": 0, "of": 0, "rate": float("nan"), "interval": [float("nan"), float("nan")]}
    return {"count": count, "of": total, "rate": count / total, "interval": list(rate_interval(count, total))}


def _region_numbers(region: Region) -> dict[str, Any]:
    return {
        "score": region.score,
        "p_value": region.p_value,
        **{
            name: {
                "box": extent.box,
                "area": extent.area,
                "peak": extent.peak,
                "segmentation": {"size": extent.size, "counts": to_text(extent.counts)},
            }
            for name, extent in (("input", region.input), ("original", region.original))
        },
    }


def verdict_columns(verdicts: Verdicts) -> dict[str, npt.NDArray[Any]]:
    """The verdicts as the columns of scores.h5."""
    return {
        "p_image": verdicts.p_image,
        "p_map": verdicts.p_map,
        "p_value": verdicts.p_value,
        "alarm": verdicts.alarm.astype(np.uint8),
    }


def region_columns(regions: Sequence[Sequence[Region]]) -> dict[str, npt.NDArray[Any]]:
    """The regions of all images as the columns of scores.h5."""
    flat = [region for found in regions for region in found]
    columns: dict[str, npt.NDArray[Any]] = {
        "image": np.repeat(np.arange(len(regions)), [len(found) for found in regions]).astype(np.int64),
        "score": np.array([region.score for region in flat], np.float64),
        "p_value": np.array([region.p_value for region in flat], np.float64),
    }
    for where, extents in (("input", [region.input for region in flat]), ("original", [region.original for region in flat])):
        columns |= {
            f"{where}_box": np.array([extent.box for extent in extents], np.int64).reshape(-1, 4),
            f"{where}_area": np.array([extent.area for extent in extents], np.int64),
            f"{where}_peak": np.array([extent.peak for extent in extents], np.int64).reshape(-1, 2),
            f"{where}_size": np.array([extent.size for extent in extents], np.int64).reshape(-1, 2),
            f"{where}_counts": np.array([count for extent in extents for count in extent.counts], np.int64),
            f"{where}_runs": np.array([len(extent.counts) for extent in extents], np.int64),
        }
    return columns
