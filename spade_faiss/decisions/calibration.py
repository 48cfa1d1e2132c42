"""Calibrations: how normal images score, kept beside a bank, and what follows for the scores of others.

A calibration is one JSON file, `BANK/calibration/<hash of the scoring config>.json`; it names the state of the bank that it was
made with, and carries its own checksum.
"""

from __future__ import annotations

import hashlib
import math
import platform
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.schema import check_choice
from spade_faiss.core.settings import Method
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.decisions.conformal import (
    Bools,
    Doubles,
    PixelCounts,
    Values,
    alarm_thresholds,
    alarms,
    allowed,
    check_rate,
    combined_p_values,
    p_values,
    threshold,
)
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe

FORMAT = "spade_faiss calibration"
SCHEMA = 2

LEAVE_ONE_OUT, SPLIT = "leave_one_out", "split"
MODES = (LEAVE_ONE_OUT, SPLIT)
DEFAULT_ALPHA = 0.01

_FOLDER = "calibration"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What alpha means in scores; a score above a threshold passes it.

    `image`, `map`: the image score and the map's maximum that alone make an image an alarm (infinite: neither does without the
    other). `pixel`: at most alpha of normal images have a pixel above it. `pixel_share`: at most alpha of a normal image's
    pixels are expected above it.
    """

    alpha: float
    image: float
    map: float
    pixel: float
    pixel_share: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Verdicts:
    """What a calibration says of n images.

    Args:
        p_image: (n,) p-values of the image scores.
        p_map: (n,) p-values of the map maxima; NaN where there is no map.
        p_value: (n,) p-values of both together; of the image score alone where no maps were asked for.
        alarm: (n,) whether an image is called anomalous.
        rule: `alpha` or `fdr`, by which it was.
        level: of that rule.
    """

    p_image: Doubles
    p_map: Doubles
    p_value: Doubles
    alarm: Bools
    rule: str
    level: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How n normal images score that a bank does not hold, or that were left out of it one at a time.

    `mode`: `split`: the images are not in the bank, and rates hold in finite samples. `leave_one_out`: they are the bank's own,
    each scored against all others. `available`: the images that the sample was drawn from with `seed`; held-out images are all
    used, without one. `images`: their names; `image_score` and `map_score`: in their order. `pixels`: of all their maps.
    `alpha`: the promised rate where nothing else is asked for. `generation`, `shards_sha256`: the state of the bank.
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

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        n = len(self.images)
        if not n or not n == len(self.image_score) == len(self.map_score) or n > self.available:
            held = f"{n} images, {len(self.image_score)} image scores, {len(self.map_score)} map scores"
            raise InputError(f"a calibration of {self.available} images has {held}")
        if not all(math.isfinite(score) for score in (*self.image_score, *self.map_score)):
            raise InputError("a calibration score is not finite")
        keys, counts = self.pixels.keys, self.pixels.counts
        if not keys or len(keys) != len(counts) or min(counts) < 1 or keys[0] < 0 or keys[-1] >= 1 << 19:
            raise InputError(f"a calibration counts {len(keys)} pixel scores {len(counts)} times")
        if any(a >= b for a, b in pairwise(keys)):
            raise InputError("the pixel scores of a calibration do not ascend")
        allowed(self.alpha, n)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def smallest_p(self) -> float:
        """1 / (n + 1)."""
        return 1 / (len(self) + 1)

    @cached_property
    def scores(self) -> Doubles:
        """(n, 2): image scores and map maxima."""
        return np.stack([self.image_score, self.map_score], axis=1).astype(np.float64)

    def decide(
        self, image_score: Values, map_score: Values | None, *, alpha: float | None = None, fdr: float | None = None
    ) -> Verdicts:
        """P-values and verdicts of images that were scored in this calibration's way against its bank.

        Args:
            image_score: (n,).
            map_score: (n,), NaN for images without a map; None where no maps were asked for: the image score alone decides.
            alpha: the rate to keep; the calibration's own unless `fdr` is given.
            fdr: the share of false alarms among the alarms to keep, instead.

        Raises:
            InputError: for a rate out of range, or one that so few calibration images cannot promise.
        """
        if alpha is None and fdr is None:
            alpha = self.alpha
        if alpha is not None:
            allowed(alpha, len(self))
        p_image = p_values(self.scores[:, 0], image_score)
        if map_score is None:
            p_map, p_value = np.full(len(p_image), np.nan), p_image
        else:
            p_map = p_values(self.scores[:, 1], map_score)
            p_value = combined_p_values(self.scores, np.stack([image_score, map_score], axis=1))
        return Verdicts(
            p_image=p_image,
            p_map=p_map,
            p_value=p_value,
            alarm=alarms(p_value, alpha=alpha, fdr=fdr),
            rule="fdr" if alpha is None else "alpha",
            level=float((fdr or 0.0) if alpha is None else alpha),
        )

    def thresholds(self, alpha: float, *, maps: bool = True) -> Thresholds:
        """What alpha means in scores.

        Args:
            alpha: the promised rate.
            maps: whether images get maps; without, the image score alone decides.

        Raises:
            InputError: for an alpha that so few images cannot promise.
        """
        image, by_map = alarm_thresholds(self.scores, alpha) if maps else (threshold(self.scores[:, 0], alpha), math.inf)
        return Thresholds(
            alpha=alpha,
            image=image,
            map=by_map,
            pixel=threshold(self.scores[:, 1], alpha),
            pixel_share=self.pixels.threshold(alpha, len(self)),
        )

    def outdated(self, bank: Snapshot) -> str:
        """Why it does not hold for the bank as it is now; empty if it does."""
        if (self.generation, self.shards_sha256) == (bank.generation, _hash_shards(bank)):
            return ""
        return (
            f"the calibration of {bank.path} is out of date: it is of generation {self.generation}, "
            f"the bank is at {bank.generation}; renew it with: {command(bank, self.scoring_config)}"
        )


def calibration_facts(calibration: Calibration) -> dict[str, Any]:
    """What identifies a calibration."""
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
    """What a calibration says of the bank that it is made with, and of the libraries that it is made by."""
    packages = {name: version(name) for name in ("spade-faiss", "numpy", "scipy")}
    return {
        "generation": bank.generation,
        "shards_sha256": _hash_shards(bank),
        "versions": {**packages, "python": platform.python_version()},
    }


def command(bank: Snapshot, config: ScoringConfig) -> str:
    """What to type to calibrate."""
    return f"spade-faiss calibrate {bank.path} {config.options}".rstrip()


def write_calibration(bank: Snapshot, calibration: Calibration) -> Path:
    """Keep a calibration beside its bank, atomically, in place of any other of its scoring config; returns the file."""
    path = _path(bank, calibration.scoring_config)
    path.parent.mkdir(exist_ok=True)
    write_signed(path, FORMAT, SCHEMA, asdict(calibration))
    return path


def find_calibration(bank: Snapshot, config: ScoringConfig) -> Calibration | None:
    """The calibration of a scoring config, out of date or not; None where there is none.

    Raises:
        BankError: if it is damaged, or not what its name says.
    """
    path = _path(bank, config)
    if not path.exists():
        return None
    found = _read(path, command(bank, config))
    if found.scoring_config != config:
        raise BankError(
            f"{path} is the calibration of another scoring config, {found.scoring_config}; run: {command(bank, config)}"
        )
    return found


def flag_below_p(bank: Snapshot, recipe: Recipe, method: Method, p: float) -> Method:
    """The method, with maps only for images whose image score has a p-value of at most `p` by the bank's calibration.

    Raises:
        BankError: if there is no calibration, or one that is damaged or out of date.
        InputError: for a p-value that so few calibration images cannot give.
    """
    check_rate("flag_below_p", p)
    config = ScoringConfig.of(resolve_recipe(recipe), method)
    calibration = find_calibration(bank, config)
    if calibration is None:
        raise BankError(f"flag_below_p needs a calibration, {bank.path} has none; make it with: {command(bank, config)}")
    if outdated := calibration.outdated(bank):
        raise BankError(outdated)
    return replace(method, localize="flagged", flag_above=threshold(calibration.scores[:, 0], p))


def stored_calibrations(bank: Snapshot) -> list[Calibration]:
    """Every calibration beside a bank.

    Raises:
        BankError: if one is damaged.
    """
    return [_read(path, f"spade-faiss calibrate {bank.path}") for path in sorted((bank.path / _FOLDER).glob("*.json"))]


def _path(bank: Snapshot, config: ScoringConfig) -> Path:
    return bank.path / _FOLDER / f"{config.key}.json"


def _read(path: Path, remedy: str) -> Calibration:
    return read_signed(path, Calibration, FORMAT, SCHEMA, f"remove it, or calibrate again: {remedy}")


def _hash_shards(bank: Snapshot) -> str:
    return hashlib.sha256(" ".join(shard.sha256 for shard in bank.manifest.shards).encode()).hexdigest()
