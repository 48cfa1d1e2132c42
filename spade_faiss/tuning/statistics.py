"""Paired statistics of options: how much better one is than another on the same pictures, and how sure that is.

An option is judged by two numbers, those that a labeled set would be measured by. Of images: the chance that a spoilt picture
scores above a normal one. Of maps: how much of a defect is found at false positive rates of up to 0.3 (AUPRO), which is a mean
over defects, so that each has its own share in it.

Differences to a base are resampled by pictures, a normal one with all that was made of it (cluster bootstrap: Field & Welsh,
"Bootstrapping Clustered Data", 2007, https://doi.org/10.1111/j.1467-9868.2007.00593.x). That many options were tried is allowed
for by the largest studentized difference of all (Romano & Wolf, "Stepwise Multiple Testing as Formalized Data Snooping", 2005,
https://doi.org/10.1111/j.1468-0262.2005.00615.x, single step).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import Bools

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEVEL = 0.95
RESAMPLES = 1000
# Spoils that hardly any option finds are noise: one says something if it scores above so many normal pictures, in the mean over
# options. It is about what options reach on real defects, and as it is a mean over all of them, it favors none.
LEAST_FOUND = 0.8
# Where maps differ by less on a spoil, it says nothing.
LEAST_SPREAD = 0.01
# Spoils are no real defects: what they tell of maps is believed where an option is surely better by more than this.
IMAGE_GAIN, MAP_GAIN = 0.0, 0.01
# A choice needs at least so many spoils that options differ on.
LEAST_TELLING = 10
FPR_LIMIT = 0.3
# Differences that are nothing but rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False, kw_only=True)
class Trials:
    """What O options measured on the same n normal pictures and S defects.

    Args:
        normal: (O, n) image scores.
        spoilt: (O, S) image scores.
        areas: (O, S) how much of each defect its map finds, see `map_areas`; NaN for a defect without a mask.
        normal_group, spoilt_group: (n,), (S,) the number of the picture that each was made of.
        least_found: see `LEAST_FOUND`; 0 where defects are real, all of which count.
        seen: (O, S) whether an option's input shows anything of a defect; None where all do. Whether a defect is found is up to
            those that do; the others miss it.
    """

    normal: Doubles
    spoilt: Doubles
    areas: Doubles
    normal_group: Ints
    spoilt_group: Ints
    least_found: float = LEAST_FOUND
    seen: Bools | None = None

    def __post_init__(self) -> None:
        options, n, defects = len(self.normal), len(self.normal_group), len(self.spoilt_group)
        shapes = (self.normal.shape, self.spoilt.shape, self.areas.shape)
        if shapes != ((options, n), (options, defects), (options, defects)):
            raise InputError(f"trials of {options} options, {n} pictures and {defects} defects have shapes {shapes}")

    def rates(self) -> Doubles:
        """(O, S) the share of normal pictures that score below each spoilt one, a tie counting half."""
        found = np.empty(self.spoilt.shape)
        for rate, normal, spoilt in zip(found, np.sort(self.normal, axis=1), self.spoilt, strict=True):
            sides = [np.searchsorted(normal, spoilt, side=side) for side in ("left", "right")]
            rate[:] = (sides[0] + sides[1]) / (2 * len(normal))
        return found

    def found(self) -> Bools:
        """(S,) the defects that options find, in the mean over those that show them."""
        if self.seen is None:
            return np.asarray(self.rates().mean(axis=0) >= self.least_found)
        mean = np.where(self.seen, self.rates(), 0.0).sum(axis=0) / np.maximum(1, self.seen.sum(axis=0))
        return np.asarray(mean >= self.least_found)

    def telling_images(self) -> Bools:
        """(S,) the defects that are found, but not by every option alike: what all find says nothing."""
        return np.asarray(self.found() & (np.ptp(self.rates(), axis=0) > 0))

    def telling_maps(self) -> Bools:
        """(S,) the defects that are found and that maps differ on."""
        known = ~np.isnan(self.areas).any(axis=0)
        return np.asarray(self.found() & known & (np.ptp(np.nan_to_num(self.areas), axis=0) > LEAST_SPREAD))


@dataclass(frozen=True, eq=False, kw_only=True)
class Differences:
    """How options differ from a base in one number: estimates over what is found, with intervals.

    Args:
        value: (O,) the number itself, over all defects that are found, see `Trials.found`.
        telling: how many of them options differ on.
        difference: (O,) to the base.
        low, high: (O,) the interval of each difference by itself.
        sure: (O,) whether an option is better than the base by more than `IMAGE_GAIN` or `MAP_GAIN`, allowed for that so many
            were tried.
    """

    value: Doubles
    telling: int
    difference: Doubles
    low: Doubles
    high: Doubles
    sure: Bools


def image_differences(trials: Trials, base: int, seed: int = 0) -> Differences:
    """How the chance that a defect scores above a normal picture differs, see `Trials.telling_images`."""
    found, telling = trials.found(), trials.telling_images()
    if not telling.any():
        return _nothing(trials.rates()[:, found].mean(axis=1) if found.any() else np.full(len(trials.normal), np.nan))
    value = trials.rates()[:, found].mean(axis=1)
    wins = [_wins(normal, spoilt[telling]) for normal, spoilt in zip(trials.normal, trials.spoilt, strict=True)]
    of_normal, of_spoilt = _weights(trials, seed)
    of_telling = of_spoilt[:, telling]
    total = np.maximum(of_normal.sum(axis=1) * of_spoilt[:, found].sum(axis=1), 1.0)
    resampled = np.stack([((of_normal @ (own - wins[base])) * of_telling).sum(axis=1) / total for own in wins])
    share = telling.sum() / found.sum()
    difference = np.array([(own - wins[base]).mean() * share for own in wins])
    return _judged(value, int(telling.sum()), difference, resampled, IMAGE_GAIN)


def map_differences(trials: Trials, base: int, seed: int = 0) -> Differences:
    """How the share of a defect that is found differs, see `Trials.telling_maps`."""
    known, telling = trials.found() & ~np.isnan(trials.areas).any(axis=0), trials.telling_maps()
    if not telling.any():
        return _nothing(trials.areas[:, known].mean(axis=1) if known.any() else np.full(len(trials.areas), np.nan))
    areas = np.where(telling, trials.areas - trials.areas[base], 0.0)
    _, of_spoilt = _weights(trials, seed)
    total = of_spoilt[:, known].sum(axis=1)
    resampled = (areas @ of_spoilt.T) / np.where(total > 0, total, 1.0)
    value = trials.areas[:, known].mean(axis=1)
    return _judged(value, int(telling.sum()), areas[:, known].mean(axis=1), resampled, MAP_GAIN)


def map_areas(maps: npt.NDArray[np.float32], masks: Bools, normal: npt.NDArray[np.float32]) -> Doubles:
    """(S,) how much of each defect is found: the area under its overlap curve up to a false positive rate of `FPR_LIMIT`.

    AUPRO (see `scoring.metrics`) is the mean of these over regions. A pixel of the false positive rate f is part of what is
    found at all rates from f on.

    Args:
        maps: (S, H, W) score maps.
        masks: (S, H, W), True where a picture is defective.
        normal: scores of pixels that are not defective, in any order.
    """
    ascending = np.sort(normal, axis=None)
    found = np.full(len(maps), np.nan)
    for place, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        if mask.any():
            rate = 1 - np.searchsorted(ascending, scores[mask], side="left") / len(ascending)
            found[place] = np.maximum(0.0, 1 - rate / FPR_LIMIT).mean()
    return found


def _nothing(value: Doubles) -> Differences:
    """No difference, as no defect tells options apart."""
    zero = np.zeros(len(value))
    return Differences(value=value, telling=0, difference=zero, low=zero, high=zero, sure=zero.astype(np.bool_))


def _wins(normal: Doubles, spoilt: Doubles) -> Doubles:
    """(n, S) 1 where a defect scores above a normal picture, half where both score the same."""
    return np.asarray((spoilt > normal[:, None]) + 0.5 * (spoilt == normal[:, None]), np.float64)


def _weights(trials: Trials, seed: int) -> tuple[Doubles, Doubles]:
    """(R, n) and (R, S): how often each picture and each defect is drawn in every resample."""
    groups = int(max(trials.normal_group.max(initial=0), trials.spoilt_group.max(initial=0))) + 1
    drawn = np.random.default_rng([seed, 0xB007]).multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    weights = drawn.astype(np.float64)
    return weights[:, trials.normal_group], weights[:, trials.spoilt_group]


def _judged(value: Doubles, telling: int, difference: Doubles, resampled: Doubles, least_gain: float) -> Differences:
    deviation = resampled - difference[:, None]
    with np.errstate(invalid="ignore"):
        error = np.sqrt(np.nanmean(deviation**2, axis=1))
    differs = error > _ROUNDING
    studentized = deviation[differs] / error[differs, None]
    critical = float(np.nanquantile(studentized.max(axis=0), LEVEL)) if len(studentized) else 0.0
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(resampled, (tail, 1 - tail), axis=1)
    return Differences(
        value=value,
        telling=telling,
        difference=difference,
        low=low,
        high=high,
        sure=differs & (difference - critical * error > least_gain) & (telling >= LEAST_TELLING),
    )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which option was chosen, and why, in a sentence.

    Args:
        option: its number.
        reason: the sentence.
        by_image: which option the image scores alone would choose.
        by_map: which the maps alone would choose.
    """

    option: int
    reason: str
    by_image: int
    by_map: int


# What a choice may cost in one number, by its estimate, while it surely gains in the other, about a standard error of a hundred
# spoils; and how much of a cost the interval must rule out.
IMAGE_MARGIN, MAP_MARGIN = 0.01, 0.01
MOST_COST = 0.03


def choose(trials: Trials, names: Sequence[str], *, default: int, allowed: Bools | None = None, seed: int = 0) -> Chosen:
    """Choose an option: by image scores first, then, among those that rank as well, by maps; the default unless surely better.

    Args:
        trials: what was measured.
        names: the options' names, for the sentence.
        default: the number of the option that stays unless another is surely better.
        allowed: (O,) which may be chosen; all unless given. The default always may.
        seed: the seed of the resamples.
    """
    may = np.ones(len(names), np.bool_) if allowed is None else allowed.copy()
    may[default] = True
    image, maps = image_differences(trials, default, seed), map_differences(trials, default, seed)
    by_image = _best(image.difference, may & image.sure, default)
    by_map = _best(maps.difference, may & maps.sure, default)
    leader = _best(image.difference, may & image.sure & (maps.difference >= -MAP_MARGIN), default)
    why = [] if leader == default else [f"tells {_gain(image, leader)} more spoilt pictures from normal ones"]
    # From the leader on: what ranks images as well, and surely shows defects better.
    beside_image, beside_map = (each(trials, leader, seed) for each in (image_differences, map_differences))
    as_good = image.difference >= -IMAGE_MARGIN
    as_good &= (beside_image.difference >= -IMAGE_MARGIN) & (beside_image.low >= -MOST_COST) & (beside_image.high >= 0)
    option = _best(beside_map.difference, may & as_good & beside_map.sure, leader)
    if option != leader:
        why.append(f"finds {_gain(beside_map, option)} more of a defect's pixels")
    if option == default:
        few = image.telling < LEAST_TELLING and maps.telling < LEAST_TELLING
        reason = (
            f"the options differ on only {max(image.telling, maps.telling)} spoils: the default stays"
            if few
            else "no option is surely better than the default: it stays"
        )
        return Chosen(option=default, reason=reason, by_image=by_image, by_map=by_map)
    return Chosen(option=option, reason=f"{names[option]} {' and '.join(why)}", by_image=by_image, by_map=by_map)


def _best(difference: Doubles, eligible: Bools, otherwise: int) -> int:
    """The eligible option with the largest difference, the first of several; `otherwise` if none is."""
    if not eligible.any():
        return otherwise
    return int(np.where(eligible, difference, -np.inf).argmax())


def _gain(found: Differences, option: int) -> str:
    percent = (100 * each[option] for each in (found.difference, found.low, found.high))
    return "{:.1f} % ({:.1f} to {:.1f})".format(*percent)
