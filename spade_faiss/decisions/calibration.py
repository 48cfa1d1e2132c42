"""Calibrations: how normal images score under one scoring config, and what that says about the scores of other images.

A calibration is a signed JSON file beside its bank, `BANK/calibration/<key of the scoring config>.json`. It holds for that
scoring config and for the state of the bank that it names.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.bank.places import CALIBRATIONS
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.hints import calibrate_command
from spade_faiss.core.inside import check_inside, is_regular
from spade_faiss.core.once import once
from spade_faiss.core.presets import BankSize, of_few
from spade_faiss.core.schema import check_choice, shorten
from spade_faiss.core.settings import Method
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.decisions.conformal import (
    Doubles,
    PixelCounts,
    Values,
    alarm_thresholds,
    alarms,
    allowed,
    check_rate,
    combined_p_values,
    p_values,
    p_values_in_bags,
    threshold,
)
from spade_faiss.decisions.structure import structure_bags
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.scoring.image_scores import structure_scores
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe

FORMAT = "spade_faiss calibration"
SCHEMA = 3

LEAVE_ONE_OUT, SPLIT = "leave_one_out", "split"
MODES = (LEAVE_ONE_OUT, SPLIT)
DEFAULT_ALPHA = 0.01

# Far more pixels, images and commits than a calibration is made of, and a score that stays within float32.
_MOST_PIXELS = 1 << 50
_MOST = 1 << 53
_LARGEST_SCORE = 1e38


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The scores that correspond to a false-alarm rate; a score passes a threshold if it is above.

    `structure` has none: what it is compared with depends on the image. The thresholds of the others hold whatever it is.

    Args:
        alpha: the false-alarm rate.
        image: the image score that makes an image an alarm whatever its map is; infinite if no image score does.
        map: the map maximum that makes an image an alarm whatever its other scores are; infinite if no map maximum does.
        top: the same of the mean of the map's highest pixels.
        pixel: at most alpha of normal images have a pixel above it.
        pixel_share: at most alpha of a normal image's pixels are expected above it.
    """

    alpha: float
    image: float
    map: float
    top: float
    pixel: float
    pixel_share: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Verdicts:
    """The p-values and verdicts of n images.

    Args:
        p_image: (n,) p-values of the image scores.
        p_map: (n,) p-values of the map maxima; NaN for images without a map.
        p_top: (n,) p-values of the means of the maps' highest pixels; NaN for images without a map, and for all if the
            calibration is of a version that did not record them.
        p_structure: (n,) p-values of the structure scores; NaN as in `p_top`.
        p_value: (n,) p-values of the tests together; of the image score alone if no maps were asked for.
        alarm: (n,) whether an image is called anomalous; see `judged`.
        rule: the rule that decided, `alpha` or `fdr`.
        level: the rate that the rule promises.
    """

    p_image: Doubles
    p_map: Doubles
    p_top: Doubles
    p_structure: Doubles
    p_value: Doubles
    alarm: Bools
    rule: str
    level: float

    def __getitem__(self, part: slice) -> Verdicts:
        """The verdicts on some of the images."""
        columns: dict[str, Any] = {
            name: value[part] if isinstance(value, np.ndarray) else value for name, value in vars(self).items()
        }
        return Verdicts(**columns)

    @property
    def judged(self) -> Bools:
        """(n,) which images there is a verdict on: all but those of products without a calibration."""
        return np.isfinite(self.p_value)

    def alarm_of(self, i: int) -> bool | None:
        """Whether one image is called anomalous; None without a verdict."""
        return bool(self.alarm[i]) if self.judged[i] else None

    def numbers(self, i: int) -> dict[str, Any]:
        """The p-values and the verdict of one image as plain values."""
        names = ("p_image", "p_map", "p_top", "p_structure", "p_value")
        return {**{name: getattr(self, name)[i] for name in names}, "alarm": self.alarm_of(i)}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The scores of n normal images under one scoring config.

    Args:
        mode: `split`: the images are not in the bank, and rates hold in finite samples. `leave_one_out`: they are the bank's
            own, each scored against all the others.
        scoring_config: how they were scored.
        alpha: the false-alarm rate that verdicts promise unless another one is asked for.
        available: the number of images that the sample was drawn from.
        seed: the seed of that draw; None if all images were used.
        images: the names of the images.
        image_score: their image scores, in the same order.
        map_score: their map maxima, in the same order.
        pixels: the pixel scores of all their maps.
        generation, shards_sha256: the state of the bank; of a product of it, `shards_sha256` alone is.
        versions: the versions of the libraries that computed the scores.
        entries, siblings: the size of the bank, see `BankSize`; no entries in a file of a version that did not record them.
        top_score, map_std, map_variation: the statistics of their maps, in the same order, see `image_scores.map_statistics`;
            empty in a file of a version that did not record them.
    """

    mode: str
    scoring_config: ScoringConfig
    alpha: float
    available: int
    seed: int | None
    images: tuple[str, ...]
    image_score: tuple[float, ...]
    map_score: tuple[float, ...]
    pixels: PixelCounts
    generation: int
    shards_sha256: str
    versions: dict[str, str]
    top_score: tuple[float, ...] = ()
    map_std: tuple[float, ...] = ()
    map_variation: tuple[float, ...] = ()
    entries: int = 0
    siblings: int = 1

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        n = len(self.images)
        if not n or not n == len(self.image_score) == len(self.map_score) or n > self.available:
            counts = f"{n} images, {len(self.image_score)} image scores, {len(self.map_score)} map scores"
            raise InputError(f"a calibration of {self.available} images has {counts}")
        statistics = (self.top_score, self.map_std, self.map_variation)
        if {len(values) for values in statistics} not in ({0}, {n}):
            raise InputError(
                f"a calibration of {n} images has {', '.join(str(len(values)) for values in statistics)} statistics"
            )
        scores = (*self.image_score, *self.map_score, *itertools.chain(*statistics))
        if not all(math.isfinite(score) for score in scores):
            raise InputError("a calibration score is not finite")
        for name in ("available", "generation", "seed", "entries", "siblings"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= _MOST:
                raise InputError(f"a calibration with {name}={shorten(value)} cannot be")
        if any(abs(score) > _LARGEST_SCORE for score in scores):
            raise InputError(f"a calibration score is beyond {_LARGEST_SCORE:g}")
        keys, pixels = self.pixels.keys, self.pixels.counts
        if (
            not keys
            or len(keys) != len(pixels)
            or min(pixels) < 1
            or sum(pixels) > _MOST_PIXELS
            or keys[0] < 0
            or keys[-1] >= 1 << 19
        ):
            raise InputError(f"a calibration counts {len(keys)} pixel scores {len(pixels)} times")
        if any(a >= b for a, b in pairwise(keys)):
            raise InputError("the pixel scores of a calibration do not ascend")
        allowed(self.alpha, n)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that the calibration can give, 1 / (n + 1)."""
        return 1 / (len(self) + 1)

    @once
    def scores(self) -> dict[str, Doubles]:
        """The (n,) scores of the calibration images by their names in `IMAGE_SCORES`, those that were recorded."""
        recorded = {"knn": self.image_score, "max": self.map_score, "top": self.top_score}
        return {name: np.array(values, np.float64) for name, values in recorded.items() if values}

    @once
    def statistics(self) -> Doubles:
        """(n, 3), the statistics of the maps; (0, 3) if they were not recorded."""
        return np.stack([self.top_score, self.map_std, self.map_variation], axis=1).astype(np.float64)

    @property
    def recorded(self) -> tuple[str, ...]:
        """The names in `IMAGE_SCORES` of the scores that it can decide by."""
        return (*self.scores, *(["structure"] if len(self.statistics) else []))

    def structure(self, statistics: Values) -> FloatArray | None:
        """(n,) structure scores of images, by the (n, 3) statistics of their maps; None if it recorded no normal ones."""
        if "structure" not in self.recorded:
            return None
        return structure_scores(self.statistics, statistics).astype(np.float32)

    def decide(
        self,
        scores: Mapping[str, Values],
        statistics: Values | None = None,
        *,
        tests: Sequence[str] = Method.image_scores,
        alpha: float | None = None,
        fdr: float | None = None,
    ) -> Verdicts:
        """Decide which images are alarms; they were scored against the calibration's bank with its scoring config.

        Args:
            scores: (n,) scores by their names in `IMAGE_SCORES`, `knn` and `max` among them; NaN for images without a map.
            statistics: (n, 3) the statistics of their maps, which `structure` is made of; None decides without.
            tests: which scores decide together; `knn` alone if no maps were asked for.
            alpha: the false-alarm rate to promise; the calibration's own unless `fdr` is given.
            fdr: the share of false alarms among the alarms to promise in its place.

        Raises:
            InputError: for a rate out of range, one that so few calibration images cannot promise, or a test whose score was
                not recorded.
        """
        if alpha is None and fdr is None:
            alpha = self.alpha
        if alpha is not None:
            allowed(alpha, len(self))
        fixed = [name for name in tests if name != "structure"]
        columns = np.stack([scores[name] for name in fixed], axis=1) if fixed else np.empty((len(scores["knn"]), 0))
        known = statistics if "structure" in self.recorded else None
        if known is None and "structure" in tests:
            raise InputError("verdicts by structure need the statistics of maps, of the images and in the calibration")
        # Bags are made twice: those of all images at once would take n + 1 numbers for each.
        bags = structure_bags(self.statistics, known) if known is not None and "structure" in tests else None
        p_value = combined_p_values(self._columns(tests), columns, bags)
        not_made = np.full(len(p_value), np.nan)
        p_structure = not_made if known is None else p_values_in_bags(structure_bags(self.statistics, known))
        p = {name: p_values(own, scores[name]) for name, own in self.scores.items() if name in scores}
        return Verdicts(
            p_image=p["knn"],
            p_map=p["max"],
            p_top=p.get("top", not_made),
            p_structure=p_structure,
            p_value=p_value,
            alarm=alarms(p_value, alpha=alpha, fdr=fdr),
            rule="fdr" if alpha is None else "alpha",
            level=float((fdr or 0.0) if alpha is None else alpha),
        )

    def _columns(self, tests: Sequence[str]) -> Doubles:
        """(n, t) the scores of the calibration images in tests by a fixed score; raises InputError if one was not recorded."""
        if missing := [name for name in tests if name not in self.recorded]:
            raise InputError(f"the calibration is of a version that did not record {', '.join(missing)}; calibrate again")
        columns = [self.scores[name] for name in tests if name != "structure"]
        return np.stack(columns, axis=1) if columns else np.empty((len(self), 0))

    def thresholds(self, alpha: float, *, tests: Sequence[str] = Method.image_scores) -> Thresholds:
        """The scores that correspond to a false-alarm rate.

        Args:
            alpha: the false-alarm rate.
            tests: which scores decide together, as for `decide`.

        Raises:
            InputError: for an alpha that so few images cannot promise, or a test whose score was not recorded.
        """
        found = alarm_thresholds(self._columns(tests), alpha, bags="structure" in tests)
        limits = dict(zip([name for name in tests if name != "structure"], found, strict=True))
        return Thresholds(
            alpha=alpha,
            image=limits.get("knn", math.inf),
            map=limits.get("max", math.inf),
            top=limits.get("top", math.inf),
            pixel=threshold(self.scores["max"], alpha),
            pixel_share=self.pixels.threshold(alpha, len(self)),
        )

    @property
    def bank_size(self) -> BankSize | None:
        """The size that the bank had; None if it is not known."""
        if self.entries:
            return BankSize(self.entries, self.siblings)
        return BankSize(self.available) if self.mode == LEAVE_ONE_OUT else None

    def options(self, bank: Snapshot) -> str:
        """The options of the command line that made it, without those that were usual for the bank when it had its size."""
        size, usual = self.bank_size, bank.manifest.usual
        was_usual = bank.usual if size is None else replace(usual, method=of_few(usual.method, *size))
        return self.scoring_config.options(was_usual)

    def asks_as(self, size: BankSize | None, config: ScoringConfig) -> bool:
        """Whether a config of the bank in another size asks for the same, see `ScoringConfig.asks_as`; not if none is known."""
        own = self.bank_size
        return own is not None and size is not None and self.scoring_config.asks_as(own, config, size)

    def outdated(self, bank: Snapshot, tests: Sequence[str] = (), config: ScoringConfig | None = None) -> str:
        """Why the calibration does not hold for the bank as it is now, or for some tests; empty if it does.

        Args:
            bank: the bank, or the product of one, that it is of.
            tests: which scores are to decide.
            config: the scoring config that `find_calibration` found it for; its own unless given.
        """
        options = self.options(bank) if config is None else config.options(bank.usual)
        renew = f"renew it with: {calibrate_command(bank.path, options, bank.product)}"
        if config is not None and config != self.scoring_config:
            of = f"product {bank.product} of {bank.path}" if bank.product else f"{bank.path}"
            theirs, ours = (f"k_image={each.k_image}, k_gallery={each.k_gallery}" for each in (self.scoring_config, config))
            size = self.bank_size
            assert size is not None
            images = "normal images" if bank.pictures.are_rows else "entries"
            return (
                f"the calibration of {of} is out of date: it was made for {size.entries} {images} with {theirs}, there are "
                f"{len(bank)} now, which are searched with {ours}; {renew}"
            )
        if bank.product and self.shards_sha256 != _hash_shards(bank):
            return f"the calibration of product {bank.product} of {bank.path} is out of date: its images have changed; {renew}"
        if not bank.product and (self.generation, self.shards_sha256) != (bank.generation, _hash_shards(bank)):
            return (
                f"the calibration of {bank.path} is out of date: it is of generation {self.generation}, "
                f"the bank is at {bank.generation}; {renew}"
            )
        if missing := [name for name in tests if name not in self.recorded]:
            return f"the calibration of {bank.path} is of a version that did not record {', '.join(missing)}; {renew}"
        return ""


def calibration_facts(calibration: Calibration) -> dict[str, Any]:
    """What identifies a calibration, for programs."""
    return {
        "key": calibration.scoring_config.key,
        "scoring_config": asdict(calibration.scoring_config),
        "mode": calibration.mode,
        "images": len(calibration),
        "available": calibration.available,
        "seed": calibration.seed,
        "alpha": calibration.alpha,
        "smallest_p": calibration.smallest_p,
        "generation": calibration.generation,
        "versions": calibration.versions,
    }


def state_of(bank: Snapshot) -> dict[str, Any]:
    """The fields of a calibration that name the state of its bank and the versions of the libraries."""
    from importlib.metadata import version  # see `bank.manifest.versions`

    packages = {name: version(name) for name in ("spade-faiss", "numpy", "scipy")}
    return {
        "generation": bank.generation,
        "shards_sha256": _hash_shards(bank),
        "versions": {**packages, "python": platform.python_version()},
        **bank.size._asdict(),
    }


def write_calibration(bank: Snapshot, calibration: Calibration) -> Path:
    """Write a calibration beside its bank, atomically; it replaces that of the same scoring config. Returns the file."""
    path = _path(bank, calibration.scoring_config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_signed(path, FORMAT, SCHEMA, asdict(calibration))
    return path


def find_calibration(bank: Snapshot, config: ScoringConfig) -> Calibration | None:
    """Find the calibration of a scoring config, out of date or not; None if there is none.

    Where the bank had another size, what is asked for may have been another scoring config: its calibration is out of date, and
    is found as well, if there is no other.

    Raises:
        BankError: if it is damaged, or of another scoring config than its file name says.
    """
    path, remedy = _path(bank, config), calibrate_command(bank.path, config.options(bank.usual), bank.product)
    if not is_regular(path):
        return _of_another_size(bank, config)
    found = _read(path, remedy)
    if found.scoring_config != config:
        raise BankError(f"{path} is the calibration of another scoring config, {found.scoring_config}; run: {remedy}")
    return found


def flag_below_p(bank: Snapshot, recipe: Recipe, method: Method, p: float) -> Method:
    """Restrict a method to map only images whose image score has a p-value of at most `p` by the bank's calibration.

    Raises:
        BankError: if there is no calibration, or one that is damaged or out of date.
        InputError: for a p-value that so few calibration images cannot give.
    """
    check_rate("flag_below_p", p)
    if bank.is_of_products:
        raise InputError(
            "flag_below_p is by one calibration, and each product has its own; name one: --product NAME, or give flag_above"
        )
    config = ScoringConfig.of(resolve_recipe(recipe.within_product if bank.product else recipe), method)
    calibration = find_calibration(bank, config)
    if calibration is None:
        remedy = calibrate_command(bank.path, config.options(bank.usual), bank.product)
        raise BankError(f"flag_below_p needs a calibration, {bank.path} has none; make it with: {remedy}")
    if outdated := calibration.outdated(bank, config=config):
        raise BankError(outdated)
    return replace(method, localize="flagged", flag_above=threshold(calibration.scores["knn"], p))


def stored_calibrations(bank: Snapshot) -> list[Calibration]:
    """Every calibration beside a bank.

    Raises:
        BankError: if one is damaged.
    """
    return [_read(path, calibrate_command(bank.path, product=bank.product)) for path in _paths(bank)]


def current_calibrations(bank: Snapshot) -> list[Calibration]:
    """Those calibrations beside a bank that none has replaced which was made since, when it had another size.

    Raises:
        BankError: if one is damaged.
    """
    found = stored_calibrations(bank)
    return [
        each
        for each in found
        if not any(
            other.generation > each.generation and each.asks_as(other.bank_size, other.scoring_config) for other in found
        )
    ]


def _of_another_size(bank: Snapshot, config: ScoringConfig) -> Calibration | None:
    """The newest calibration of what was asked for, of when the bank had another size; None if there is none."""
    newest = None
    for path in _paths(bank):
        try:
            found = _read(path, "")
        except BankError:  # what is wrong with those of other scoring configs, `verify` says
            continue
        if found.asks_as(bank.size, config) and (newest is None or newest.generation < found.generation):
            newest = found
    return newest


def _paths(bank: Snapshot) -> list[Path]:
    return sorted(check_inside(bank.path, *bank.place, CALIBRATIONS).glob("*.json"))


def _path(bank: Snapshot, config: ScoringConfig) -> Path:
    return check_inside(bank.path, *bank.place, CALIBRATIONS, f"{config.key}.json")


def _read(path: Path, remedy: str) -> Calibration:
    return read_signed(path, Calibration, FORMAT, SCHEMA, f"remove it, or calibrate again: {remedy}")


def _hash_shards(bank: Snapshot) -> str:
    """A hash of the shards; of a product's, also of what was removed of them: the generation counts commits to all products."""
    if bank.product:
        found = [f"{shard.sha256}-{','.join(map(str, shard.removed))}" for shard in bank.manifest.shards]
        return hashlib.sha256(" ".join(found).encode()).hexdigest()
    return hashlib.sha256(" ".join(shard.sha256 for shard in bank.manifest.shards).encode()).hexdigest()
