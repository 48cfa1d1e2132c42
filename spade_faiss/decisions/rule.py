"""The rule that a calibration gives: which images are alarms, and which parts of them regions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import BankError
from spade_faiss.core.hints import calibrate_command
from spade_faiss.core.settings import Decision, Method
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.calibration import Calibration, Thresholds, Verdicts, find_calibration
from spade_faiss.decisions.conformal import check_rate, p_values
from spade_faiss.decisions.regions import Region, find_regions
from spade_faiss.features.placement import Placement
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores

_log = logging.getLogger(__name__)


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
        return DecisionRule.for_config(detector.bank, detector.scoring_config, detector.method, decision)

    @staticmethod
    def for_config(
        bank: Snapshot, config: ScoringConfig, method: Method, decision: Decision
    ) -> tuple[DecisionRule | None, str]:
        """Do what `of` does, for a detector of a bank, or of a product of it, that need not be open."""
        alpha, fdr, tests = decision.alpha, decision.fdr, method.image_scores
        asked = tuple(dict.fromkeys((*tests, *(["structure"] if method.score == "structure" else []))))
        calibration = find_calibration(bank, config)
        if calibration is None:
            of = f"product {bank.product} of {bank.path}" if bank.product else f"{bank.path}"
            notice = f"no p-values and no verdicts: {of} has no calibration for these settings; make one with: "
            notice += calibrate_command(bank.path, config.options(bank.usual), bank.product)
        else:
            notice = calibration.outdated(bank, asked, config)
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
        if method.localize == "none":
            tests = ("knn",)
        thresholds = calibration.thresholds(alpha, tests=tests)
        return DecisionRule(calibration=calibration, tests=tests, thresholds=thresholds, fdr=fdr), ""

    def __call__(self, scores: Mapping[str, npt.NDArray[Any]], statistics: npt.NDArray[Any]) -> Verdicts:
        """The verdicts on all images of the run, from their scores by name and the statistics of their maps."""
        alpha = self.thresholds.alpha if self.fdr is None else None
        return self.calibration.decide(scores, statistics, tests=self.tests, alpha=alpha, fdr=self.fdr)

    def regions(self, scores: Scores, placements: Sequence[Placement]) -> list[list[Region]]:
        """The regions of each image's map, strongest first; `placements` say how the images lie in the backbone's input."""
        return [self.regions_of(scored, placement) for scored, placement in zip(scores.own_maps(), placements, strict=True)]

    def regions_of(self, scored: FloatArray, placement: Placement) -> list[Region]:
        """The regions of one map, (h, w), strongest first."""
        return find_regions(scored, self.thresholds.pixel, self.p_of_pixel, placement)

    def p_of_pixel(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """(n,) p-values of pixel scores among the maxima of normal maps."""
        return p_values(self.calibration.scores["max"], scores)
