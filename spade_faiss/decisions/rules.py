"""Decisions on a run: by one rule, or by that of each product; how promised rates compare with observed ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Decision
from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.decisions.calibration import DEFAULT_ALPHA, Calibration, Verdicts, calibration_facts
from spade_faiss.decisions.conformal import alarms, images_needed, rate_bound, rate_interval
from spade_faiss.decisions.regions import Region
from spade_faiss.decisions.rule import DecisionRule
from spade_faiss.features.placement import Placement
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.neighbors import method_of
from spade_faiss.scoring.scores import Scores

# The rates at which promised and observed alarms are compared, if there are enough calibration images for them.
COMPARED_RATES = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, eq=False, kw_only=True)
class DecisionRules:
    """Decides which images are alarms, each by the calibration of the product that it shows.

    Where the caller named a picture's product, a verdict promises what the product's calibration does. Of one whose product
    its nearest normals named, the share of false alarms among the pictures of a product is at most alpha and the share of
    them that is taken for another product.

    Args:
        by_product: the rule of each product, None for one that has none; of a bank that is of one product, the rule under an
            empty name.
        notices: why a product has no rule, or what is to be said of it.
        fdr: the share of false alarms among the alarms of a run that is promised in place of alpha, or None.
    """

    by_product: Mapping[str, DecisionRule | None]
    notices: Mapping[str, str]
    fdr: float | None

    @staticmethod
    def of(detector: Detector, decision: Decision) -> tuple[DecisionRules | None, str]:
        """The rules of a run, or None and the reason why there are none.

        Raises:
            BankError: if a rate or the score `structure` is asked for and there is no calibration, or none that holds.
            InputError: for a rate out of range, or one that so few calibration images cannot promise.
        """
        if not detector.bank.is_of_products:
            rule, notice = DecisionRule.of(detector, decision)
            name = detector.bank.product
            return (None if rule is None else DecisionRules.single(rule, name)), notice
        found: dict[str, DecisionRule | None] = {}
        notices: dict[str, str] = {}
        for name, config in detector.product_configs.items():
            part = detector.bank.part(name)
            try:
                method = method_of(detector.bank, part, detector.method)
                found[name], notice = DecisionRule.for_config(part, config, method, decision)
            except (InputError, BankError) as error:  # those of other products may be good
                found[name], notice = None, str(error)
            if (rule := found[name]) is not None and decision.alpha is None and decision.fdr is None:
                notice = few_images_notice(rule.calibration, rule.tests)
            if notice:
                notices[name] = notice
        by_structure = "structure" in (detector.method.score, *detector.method.image_scores)
        if all(rule is None for rule in found.values()) or (by_structure and None in found.values()):
            first = next(f"product {name}: {notices[name]}" for name, rule in found.items() if rule is None)
            if decision.alpha is not None or decision.fdr is not None or by_structure:
                raise BankError(first)
            return None, first
        return DecisionRules(by_product=found, notices=notices, fdr=decision.fdr), ""

    @staticmethod
    def single(rule: DecisionRule, product: str = "") -> DecisionRules:
        """The one rule of a bank, or of the product that all pictures show."""
        return DecisionRules(by_product={product: rule}, notices={}, fdr=rule.fdr)

    @property
    def rules(self) -> list[DecisionRule]:
        """The rules that there are, one at least."""
        return [rule for rule in self.by_product.values() if rule is not None]

    @property
    def only(self) -> DecisionRule | None:
        """The rule, if there is one for all images."""
        return next(iter(self.by_product.values())) if len(self.by_product) == 1 else None

    @property
    def said(self) -> list[str]:
        """What is to be said of products: sentences without their period."""
        return [f"product {name}: {notice}" for name, notice in self.notices.items()]

    def rule_of(self, product: str | None) -> DecisionRule | None:
        """The rule of the images of a product; in a bank that is of one, that of all."""
        return self.only if len(self.by_product) == 1 else self.by_product.get(product or "")

    def scores_of(self, scores: Scores) -> dict[str, FloatArray]:
        """The (n,) image scores by their names, with `structure` if all calibrations can tell."""
        found, structure = dict(scores.image_scores), np.full(len(scores), np.nan, np.float32)
        for rule, at in self._split(_products_of(scores)):
            if (known := rule.calibration.structure(scores.statistics[at])) is not None:
                structure[at] = known
        if all(rule is not None and "structure" in rule.calibration.recorded for rule in self.by_product.values()):
            found["structure"] = structure
        return found

    def __call__(
        self,
        scores: Mapping[str, npt.NDArray[Any]],
        statistics: npt.NDArray[Any],
        products: npt.NDArray[np.str_] | None = None,
    ) -> Verdicts:
        """The verdicts on all images of the run; an image of a product without a rule has p-values NaN, and is no alarm.

        Args:
            scores: (n,) scores by name.
            statistics: (n, 3) the statistics of their maps.
            products: (n,) the product of each image, in a bank of several.
        """
        if (only := self.only) is not None:
            return only(scores, statistics)
        assert products is not None
        n = len(products)
        p = {name: np.full(n, np.nan) for name in ("p_image", "p_map", "p_top", "p_structure", "p_value")}
        alarm, level = np.zeros(n, np.bool_), 0.0
        for rule, at in self._split(products):
            found = rule({name: values[at] for name, values in scores.items()}, statistics[at])
            for name, values in p.items():
                values[at] = getattr(found, name)
            alarm[at], level = found.alarm, max(level, found.level)
        if self.fdr is not None:  # among the alarms of the whole run
            judged = np.isfinite(p["p_value"])
            alarm[judged] = alarms(p["p_value"][judged], fdr=self.fdr)
        return Verdicts(**p, alarm=alarm, rule="alpha" if self.fdr is None else "fdr", level=level)

    def regions(self, scores: Scores, placements: Sequence[Placement]) -> list[list[Region]]:
        """The regions of each image's map, strongest first; none for a product without a rule."""
        if (only := self.only) is not None:
            return only.regions(scores, placements)
        found = []
        for product, scored, placement in zip(_products_of(scores).tolist(), scores.own_maps(), placements, strict=True):
            rule = self.by_product.get(product)
            found.append([] if rule is None else rule.regions_of(scored, placement))
        return found

    def _split(self, products: npt.NDArray[np.str_]) -> Iterator[tuple[DecisionRule, npt.NDArray[np.int64]]]:
        """Each rule, and which images are decided by it."""
        if (only := self.only) is not None:
            yield only, np.arange(len(products))
            return
        for product in dict.fromkeys(products.tolist()):
            if (rule := self.by_product.get(product)) is not None:
                yield rule, np.flatnonzero(products == product)


def _products_of(scores: Scores) -> npt.NDArray[np.str_]:
    return np.full(len(scores), "") if scores.routes is None else scores.routes.product


def few_images_notice(calibration: Calibration, tests: Sequence[str]) -> str:
    """Say that a product has too few images for the rate that calibrations usually promise; empty if it has enough."""
    n, needed = len(calibration), images_needed(DEFAULT_ALPHA / max(1, len(tests)))
    if n >= needed or calibration.alpha <= DEFAULT_ALPHA:
        return ""
    return (
        f"its {n} images promise a false-alarm rate of {calibration.alpha:.2g}; for {DEFAULT_ALPHA:g} it takes {needed}: add "
        f"images of it"
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Decisions:
    """The decisions on the n images of a run.

    Args:
        rules: how they were made.
        verdicts: the p-values and alarms.
        regions: the regions of each image.
        defective: (n,) labels, or None if there are none.
        products: (n,) the product of each image, of a bank of several.
    """

    rules: DecisionRules
    verdicts: Verdicts
    regions: Sequence[Sequence[Region]]
    defective: Bools | None
    products: npt.NDArray[np.str_] | None = None

    @property
    def rule(self) -> DecisionRule | None:
        """The rule of all images; None where each product has its own."""
        return self.rules.only

    @property
    def at(self) -> str:
        """The rate that the verdicts promise, in words; products may have calibrations of several."""
        verdicts = self.verdicts
        several = len({rule.thresholds.alpha for rule in self.rules.rules}) > 1 and verdicts.rule == "alpha"
        return f"{verdicts.rule} of up to {verdicts.level:.3g}" if several else f"{verdicts.rule}={verdicts.level:g}"

    def numbers(self) -> dict[str, Any]:
        """The decisions on the run, for report.json."""
        verdicts = self.verdicts
        found = {"rule": {verdicts.rule: verdicts.level}, "alarms": int(verdicts.alarm.sum()), "achieved": self.achieved()}
        if (rule := self.rule) is not None:
            return {**_rule_numbers(rule), **found}
        return {
            **found,
            "products": {
                name: None if rule is None else {**_rule_numbers(rule), "alarms": int(verdicts.alarm[self.of(name)].sum())}
                for name, rule in self.rules.by_product.items()
            },
            "notices": self.rules.notices,
        }

    def of(self, product: str) -> Bools:
        """(n,) which images are of a product."""
        if self.products is None:
            return np.ones(len(self.verdicts.alarm), np.bool_)
        found: Bools = self.products == product
        return found

    def image_numbers(self, i: int) -> dict[str, Any]:
        """The decision on one image, for report.json."""
        return {**self.verdicts.numbers(i), "regions": [region.numbers() for region in self.regions[i]]}

    def achieved(self) -> list[dict[str, Any]]:
        """For several values of alpha, the share of the images of each group that would be alarms, with a 95 % interval."""
        rows, rules = [], self.rules.rules
        for alpha in sorted({*COMPARED_RATES, *(rule.thresholds.alpha for rule in rules)}):
            if alpha < max(rule.calibration.smallest_p for rule in rules) * (1 - 1e-9):
                continue
            passed = alarms(self.verdicts.p_value, alpha=alpha)
            rows.append({"alpha": alpha, **{name: _share(passed[chosen]) for name, chosen in self.groups()}})
        return rows

    def groups(self) -> Iterator[tuple[str, Bools]]:
        """The groups of images whose rates are counted, as (n,) flags: normal and defective ones, or all without labels."""
        if self.defective is None:
            yield "images", self.verdicts.judged
        else:
            yield "normal", ~self.defective & self.verdicts.judged
            yield "defective", self.defective & self.verdicts.judged


def _rule_numbers(rule: DecisionRule) -> dict[str, Any]:
    return {
        **calibration_facts(rule.calibration),
        "image_scores": rule.tests,
        "rate_bound_90": rate_bound(rule.thresholds.alpha, len(rule.calibration)),
        "thresholds": asdict(rule.thresholds),
    }


def _share(passed: Bools) -> dict[str, Any]:
    count, total = int(passed.sum()), len(passed)
    if total == 0:
        return {"count": 0, "of": 0, "rate": float("nan"), "interval": [float("nan"), float("nan")]}
    return {"count": count, "of": total, "rate": count / total, "interval": list(rate_interval(count, total))}
