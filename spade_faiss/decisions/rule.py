"""Decisions on a run: the rule that a calibration gives, its verdicts, and how promised rates compare with observed ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import BankError
from spade_faiss.core.hints import calibrate_command
from spade_faiss.core.settings import Decision
from spade_faiss.decisions.calibration import Calibration, Thresholds, Verdicts, calibration_facts, find_calibration
from spade_faiss.decisions.conformal import Bools, alarms, check_rate, p_values, rate_bound, rate_interval
from spade_faiss.decisions.regions import Region, find_regions
from spade_faiss.features.placement import Placement
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores

_log = logging.getLogger(__name__)

# The rates at which promised and observed alarms are compared, if there are enough calibration images for them.
COMPARED_RATES = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, eq=False, kw_only=True)
class DecisionRule:
    """Decides which images are alarms, by a calibration that holds for a detector.

    Args:
        calibration: the calibration.
        tests: which image scores decide together.
        thresholds: the scores that correspond to alpha. Regions always use them; under `fdr`, alpha is the calibration's own.
        fdr: the share of false alarms among the alarms that is promised in place of alpha, or None.
    """

    calibration: Calibration
    tests: tuple[str, ...]
    thresholds: Thresholds
    fdr: float | None

    @staticmethod
    def of(detector: Detector, decision: Decision) -> tuple[DecisionRule | None, str]:
        """The decision rule of a run, or None and the reason why there is none.

        Raises:
            BankError: if a rate or the score `structure` is asked for and there is no calibration, or one out of date.
            InputError: for a rate out of range, or one that so few calibration images cannot promise.
        """
        alpha, fdr = decision.alpha, decision.fdr
        bank, config, tests = detector.bank, detector.scoring_config, detector.method.image_scores
        asked = tuple(dict.fromkeys((*tests, *(["structure"] if detector.method.score == "structure" else []))))
        calibration = find_calibration(bank, config)
        if calibration is None:
            notice = f"no p-values and no verdicts: {bank.path} has no calibration for these settings; make one with: "
            notice += calibrate_command(bank.path, config.options(bank.usual))
        else:
            notice = calibration.outdated(bank, asked)
        if calibration is None or notice:
            if "structure" in asked:
                raise BankError(f"the score structure compares maps with those of a calibration: {notice}")
            if alpha is not None or fdr is not None:
                raise BankError(notice)
            if calibration is not None:
                _log.warning(notice)
            return None, notice
        if fdr is not None:
            check_rate("fdr", fdr)
        alpha = calibration.alpha if alpha is None else alpha
        if detector.method.localize == "none":
            tests = ("knn",)
        thresholds = calibration.thresholds(alpha, tests=tests)
        return DecisionRule(calibration=calibration, tests=tests, thresholds=thresholds, fdr=fdr), ""

    def __call__(self, scores: Mapping[str, npt.NDArray[Any]], statistics: npt.NDArray[Any]) -> Verdicts:
        """The verdicts on all images of the run, from their scores by name and the statistics of their maps."""
        alpha = self.thresholds.alpha if self.fdr is None else None
        return self.calibration.decide(scores, statistics, tests=self.tests, alpha=alpha, fdr=self.fdr)

    def regions(self, scores: Scores, placements: Sequence[Placement]) -> list[list[Region]]:
        """The regions of each image's map, strongest first; `placements` say how the images lie in the backbone's input."""
        return [
            find_regions(scored, self.thresholds.pixel, self.p_of_pixel, placement)
            for scored, placement in zip(scores.own_maps(), placements, strict=True)
        ]

    def p_of_pixel(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """(n,) p-values of pixel scores among the maxima of normal maps."""
        return p_values(self.calibration.scores["max"], scores)


@dataclass(frozen=True, eq=False, kw_only=True)
class Decisions:
    """The decisions on the n images of a run.

    Args:
        rule: how they were made.
        verdicts: the p-values and alarms.
        regions: the regions of each image.
        defective: (n,) labels, or None if there are none.
    """

    rule: DecisionRule
    verdicts: Verdicts
    regions: Sequence[Sequence[Region]]
    defective: Bools | None

    def numbers(self) -> dict[str, Any]:
        """The decisions on the run, for report.json."""
        calibration, verdicts = self.rule.calibration, self.verdicts
        return {
            **calibration_facts(calibration),
            "rule": {verdicts.rule: verdicts.level},
            "image_scores": self.rule.tests,
            "rate_bound_90": rate_bound(self.rule.thresholds.alpha, len(calibration)),
            "thresholds": asdict(self.rule.thresholds),
            "alarms": int(verdicts.alarm.sum()),
            "achieved": self.achieved(),
        }

    def image_numbers(self, i: int) -> dict[str, Any]:
        """The decision on one image, for report.json."""
        return {**self.verdicts.numbers(i), "regions": [region.numbers() for region in self.regions[i]]}

    def achieved(self) -> list[dict[str, Any]]:
        """For several values of alpha, the share of the images of each group that would be alarms, with a 95 % interval."""
        rows = []
        for alpha in sorted({*COMPARED_RATES, self.rule.thresholds.alpha}):
            if alpha < self.rule.calibration.smallest_p * (1 - 1e-9):
                continue
            passed = alarms(self.verdicts.p_value, alpha=alpha)
            rows.append({"alpha": alpha, **{name: _share(passed[chosen]) for name, chosen in self.groups()}})
        return rows

    def groups(self) -> Iterator[tuple[str, Bools]]:
        """The groups of images whose rates are counted, as (n,) flags: normal and defective ones, or all without labels."""
        if self.defective is None:
            yield "images", np.ones(len(self.verdicts.alarm), np.bool_)
        else:
            yield "normal", ~self.defective
            yield "defective", self.defective


def _share(passed: Bools) -> dict[str, Any]:
    count, total = int(passed.sum()), len(passed)
    if total == 0:
        return {"count": 0, "of": 0, "rate": float("nan"), "interval": [float("nan"), float("nan")]}
    return {"count": count, "of": total, "rate": count / total, "interval": list(rate_interval(count, total))}
