"""A state of a bank that is served: its detector, and the rules that decide by its calibrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError
from spade_faiss.core.hints import add_command
from spade_faiss.core.settings import Decision, Run
from spade_faiss.decisions.calibration import LEAVE_ONE_OUT, Calibration, find_calibration
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features.backbone import Backbone
from spade_faiss.index.build import update_indexes
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.calibrate import SAMPLE, SEED, calibrate


@dataclass(frozen=True, eq=False, kw_only=True)
class Served:
    """A state of a bank, ready to score.

    Args:
        detector: scores against it.
        rules: decide which pictures are alarms; None without a calibration, then `notice` says why.
        calibrations: what they decide by, or what is out of date, by product; that of a bank of one product has an empty name.
        notice: why there are no rules, or what was done differently than asked; empty if there is nothing to say.
    """

    detector: Detector
    rules: DecisionRules | None
    calibrations: Mapping[str, Calibration]
    notice: str = ""

    @property
    def message(self) -> str:
        """Everything that is to be said of the bank: `notice`, and that it has few images."""
        return "; ".join(filter(None, (self.notice, self.detector.bank.few_images_notice)))

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
        before: Mapping[str, Calibration] | None = None,
        holdout: str | None = None,
    ) -> Served:
        """Open a bank as it is now, with its indexes and its calibration brought up to date.

        Args:
            path: the bank.
            run: how work is done.
            backbone: that of another state of the bank, which need not be loaded again.
            before: the calibrations of a former state; the new ones are made as they were, and promise the same rates. A
                product that has none gets one if another has.
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
        found, notice = _calibrations(detector, before or {}, holdout)
        rules, why_none = DecisionRules.of(detector, Decision())
        if backbone is None:
            # From now on all states share it.
            detector = Detector(detector.bank, detector.recipe, detector.method, run, loaded)
        made = {} if rules is None else {name: rule.calibration for name, rule in rules.by_product.items() if rule is not None}
        said = [notice] if notice else [] if rules is None else rules.said
        return Served(
            detector=detector, rules=rules, calibrations={**found, **made}, notice="; ".join(said) if rules else why_none
        )


def check_served(bank: Bank) -> None:
    """Raise InputError for a bank that pictures alone cannot be scored against."""
    if not len(bank):
        raise InputError(f"the bank {bank.path} is empty; add normal images: {add_command(bank.path)}")
    if bank.manifest.source is None:
        raise InputError(f"the bank {bank.path} holds the features of another extractor: pictures cannot be scored against it")
    if bank.layout.own_rois:
        raise InputError(
            f"in the bank {bank.path} each picture has a region of interest of its own, and uploads come without; make a bank "
            "with one mask for all"
        )


def _calibrations(
    detector: Detector, before: Mapping[str, Calibration], holdout: str | None
) -> tuple[dict[str, Calibration], str]:
    """The calibrations of a bank, of each product if it has several, brought up to date; and what was done differently."""
    configs, said = detector.product_configs, []
    if not configs:
        found = find_calibration(detector.bank, detector.scoring_config) or before.get("")
        if found is None:
            return {}, ""
        return {"": found}, _calibrate_as(detector, found, holdout) if found.outdated(detector.bank) else ""
    parts = {name: detector.bank.part(name) for name in configs}
    known = {name: find_calibration(parts[name], config) or before.get(name) for name, config in configs.items()}
    if not any(known.values()):
        return {}, ""
    for name, calibration in known.items():
        if calibration is None:
            try:
                known[name] = calibrate(detector.of_product(name))
            except InputError as error:
                said.append(f"product {name} is not calibrated: {error}")
        elif calibration.outdated(parts[name]):
            try:
                notice = _calibrate_as(detector.of_product(name), calibration, None)
            except InputError as error:  # the other products are served all the same
                notice = str(error)
            said += [f"product {name}: {notice}"] if notice else []
    return {name: calibration for name, calibration in known.items() if calibration is not None}, "; ".join(said)


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
