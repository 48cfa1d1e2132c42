"""A state of a bank that is served: its detector, and the rule that decides by its calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Decision, Run
from spade_faiss.decisions.calibration import LEAVE_ONE_OUT, Calibration, find_calibration
from spade_faiss.decisions.rule import DecisionRule
from spade_faiss.features.backbone import Backbone
from spade_faiss.index.build import update_indexes
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.calibrate import SAMPLE, SEED, calibrate


@dataclass(frozen=True, eq=False, kw_only=True)
class Served:
    """A state of a bank, ready to score.

    Args:
        detector: scores against it.
        rule: decides which pictures are alarms; None without a calibration, then `notice` says why.
        calibration: what the rule decides by; without a rule, one that is out of date, or None.
        notice: why there is no rule, or what was done differently than asked; empty if there is nothing to say.
    """

    detector: Detector
    rule: DecisionRule | None
    calibration: Calibration | None
    notice: str = ""

    @property
    def generation(self) -> int:
        """The bank's generation."""
        return self.detector.bank.generation

    @staticmethod
    def open(
        path: Path,
        run: Run,
        *,
        backbone: Backbone | None = None,
        before: Calibration | None = None,
        holdout: str | None = None,
    ) -> Served:
        """Open a bank as it is now, with its indexes and its calibration brought up to date.

        Args:
            path: the bank.
            run: how work is done.
            backbone: that of another state of the bank, which need not be loaded again.
            before: the calibration of a former state; the new one is made as it was, and promises the same rate.
            holdout: the folder of held-out pictures, for a calibration that is made of such.

        Raises:
            NotFoundError: if there is no bank.
            BankError: if it is damaged; `BusyError` if another process is writing to it.
            InputError: if it cannot be served.
        """
        bank = Bank.open(path)
        check_served(bank)
        update_indexes(bank)
        # What was passed as a backbone is not loaded again; a new one is, now, so that the first picture does not wait for it.
        detector = Detector.open(bank, run=run, backbone=backbone)
        loaded = detector.backbone
        found = find_calibration(bank, detector.scoring_config) or before
        notice = ""
        if found is not None and found.outdated(bank):
            notice = _calibrate_as(detector, found, holdout)
        rule, why_none = DecisionRule.of(detector, Decision())
        if backbone is None:
            # From now on all states share it.
            detector = Detector(detector.bank, detector.recipe, detector.method, run, loaded)
        calibration = found if rule is None else rule.calibration
        return Served(detector=detector, rule=rule, calibration=calibration, notice=notice if rule else why_none)


def check_served(bank: Bank) -> None:
    """Raise InputError for a bank that pictures alone cannot be scored against."""
    if not len(bank):
        raise InputError(f"the bank {bank.path} is empty; add normal images: spade-faiss add IMAGES --bank {bank.path}")
    if bank.manifest.source is None:
        raise InputError(f"the bank {bank.path} holds the features of another extractor: pictures cannot be scored against it")
    if bank.layout.own_rois:
        raise InputError(
            f"in the bank {bank.path} each picture has a region of interest of its own, and uploads come without; make a bank "
            "with one mask for all"
        )


def _calibrate_as(detector: Detector, before: Calibration, holdout: str | None) -> str:
    """Calibrate as it was done before; returns what had to be done differently."""
    if before.mode != LEAVE_ONE_OUT:
        if holdout is None:
            raise InputError(
                f"the bank {detector.bank.path} was calibrated with held-out images, which are needed again now that it has "
                "changed: serve it with --holdout FOLDER, or calibrate it without holdout"
            )
        calibrate(detector, holdout=holdout, alpha=before.alpha)
        return ""
    # All of them, if all were taken; as many, if there was a choice.
    sample = len(before) if len(before) < before.available else SAMPLE
    seed = SEED if before.seed is None else before.seed
    try:
        calibrate(detector, alpha=before.alpha, sample=sample, seed=seed)
    except InputError as error:
        made = calibrate(detector, sample=sample, seed=seed)
        return f"alpha={before.alpha:g} cannot be promised any more ({error}); it is {made.alpha:g} now"
    return ""


def for_serving(run: Run) -> Run:
    """The settings of a server's work: it shows no bars, and leaves unreadable pictures out, however many they are."""
    return replace(run, progress=False, max_skipped=1 << 30)
