"""Calibrating: normal images are scored, and their scores are stored beside the bank.

There are two modes, and both need normal images only:
- `split` scores images that are not in the bank. They and a new normal image are exchangeable, so every rate holds in finite
  samples.
- `leave_one_out` scores the bank's own images, each against all the others, so that no image is spent on calibration. With an
  exact search the p-values of image scores are valid as well, and slightly too high: if the new image were in the bank and each
  image were scored against all the others, the scores would be exchangeable. The calibration images are scored without the new
  one among their neighbors, which can only raise their scores. This does not hold for scores of maps, whose gallery would be
  another one: their rate is approximate. `benchmarks/calibration.py` measures by how much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.cluster.session import connected
from spade_faiss.core.errors import InputError
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.decisions.calibration import (
    DEFAULT_ALPHA,
    LEAVE_ONE_OUT,
    SPLIT,
    Calibration,
    find_calibration,
    state_of,
    write_calibration,
)
from spade_faiss.decisions.conformal import allowed, check_rate
from spade_faiss.features.batch import FeatureBatch, by_picture, originals
from spade_faiss.features.datasets import Images, survey
from spade_faiss.features.grouping import find_groups
from spade_faiss.features.kinds import check_normals
from spade_faiss.features.pages import file_of, hash_images
from spade_faiss.scoring.detector import Detector
from spade_faiss.search.recipe import load_recipe
from spade_faiss.workflows.normal_scores import NormalScores, score_on_cluster

# How many images of the bank are scored unless another number is asked for: enough for alpha = 0.005.
SAMPLE = 200
SEED = 0


def calibrate(
    detector: Detector,
    *,
    holdout: Images | FeatureBatch | None = None,
    alpha: float | None = None,
    sample: int | None = None,
    seed: int = SEED,
) -> Calibration:
    """Score normal images and store their scores beside the bank, for the scoring config of a detector.

    A picture that the bank or `holdout` holds several entries of is scored once, by its original, or by all of its tiles.

    Args:
        detector: opened with `localize='all'`.
        holdout: normal images that are not in the bank, and none of whose group is, or their features (mode `split`); None for
            the bank's own images, each against those of other groups (mode `leave_one_out`).
        alpha: the false-alarm rate that verdicts promise unless another one is asked for; by default 0.01, or the smallest that
            so few images can promise for each of the t scores by itself that the detector's method combines, t / (n + 1).
        sample: the most images of the bank to score, drawn at random; 200 by default.
        seed: the seed of that draw.

    Returns:
        The calibration, which is also stored.

    Raises:
        InputError: for an alpha that so few images cannot promise, held-out images that are in the bank, have siblings in it,
            or are given twice, a bank with too few images, or a recipe that cannot leave an image out (see
            `Detector.score_rows`).
    """
    if detector.bank.is_of_products:
        raise InputError(
            f"the bank {detector.bank.path} is of several products, each with a calibration of its own: use "
            f"calibrate_products, or name one: calibrate(detector.of_product(NAME))"
        )
    if detector.method.localize != "all":
        raise InputError(f"localize={detector.method.localize!r} leaves images without a map; calibrate with localize='all'")
    if alpha is not None:
        check_rate("alpha", alpha)
    if holdout is None:
        count = SAMPLE if sample is None else sample
        check_at_least("sample", count, 1)
        check_at_least("seed", seed, 0)
        # A picture counts once, however many entries were made of it: they are no independent evidence.
        pictures = detector.bank.pictures
        available = len(pictures)
        rows = pictures.originals[np.sort(np.random.default_rng(seed).permutation(available)[:count])]
        if alpha is not None and len(rows):
            allowed(alpha, len(rows))  # fails before anything is scored
        found = _score_own(detector, rows.tolist())
    elif sample is not None:
        raise InputError(f"sample={sample} is of the bank's own images; held-out images are all used")
    else:
        found, available = _score_holdout(detector, holdout), 0
    if alpha is None:
        alpha = max(DEFAULT_ALPHA, min(0.5, len(detector.method.image_scores) / (len(found.names) + 1)))
    allowed(alpha, len(found.names))
    top_score, map_std, map_variation = zip(*found.statistics, strict=True)
    calibration = Calibration(
        mode=LEAVE_ONE_OUT if holdout is None else SPLIT,
        scoring_config=detector.scoring_config,
        alpha=float(alpha),
        available=max(available, len(found.names)),
        seed=seed if holdout is None else None,
        images=tuple(found.names),
        image_score=tuple(found.image_score),
        map_score=tuple(found.map_score),
        pixels=found.pixels,
        top_score=top_score,
        map_std=map_std,
        map_variation=map_variation,
        **state_of(detector.bank),
    )
    write_calibration(detector.bank, calibration)
    return calibration


def calibrate_products(
    detector: Detector, *, alpha: float | None = None, sample: int | None = None, seed: int = SEED
) -> dict[str, Calibration | str]:
    """Do what `calibrate` does, for each product of a bank of several: its images are scored against the others of it.

    Args:
        detector: of the whole bank, opened with `localize='all'`.
        alpha, sample, seed: as for `calibrate`, for each product.

    Returns:
        The calibration of each product, or in words why there can be none, such as too few images.

    Raises:
        InputError: for settings that no product can be calibrated with.
    """
    found: dict[str, Calibration | str] = {}
    with connected(detector.run.cluster):
        for name in detector.bank.products:
            try:
                found[name] = calibrate(detector.of_product(name), alpha=alpha, sample=sample, seed=seed)
            except InputError as error:
                found[name] = f"not calibrated: {error}"
    if found and all(isinstance(item, str) for item in found.values()):
        raise InputError("; ".join(f"product {name}: {why}" for name, why in found.items()))
    return found


def calibrate_if_needed(bank: Snapshot, run: Run) -> tuple[Calibration | None, str]:
    """Find the calibration of a bank for how it is usually searched; make it if there is none, or it is out of date.

    Returns:
        The calibration and an empty text, or None and why there can be none, such as a bank that is too small. Making such a
        bank is no error.
    """
    try:
        usual = bank.usual
        detector = Detector(bank, load_recipe(usual.recipe), usual.method, replace(run, weights=None))
        found = find_calibration(bank, detector.scoring_config)
        if found is not None and not found.outdated(bank):
            return found, ""
        return calibrate(detector), ""
    except InputError as error:
        return None, f"not calibrated: {error}"


def calibrate_whole_if_needed(bank: Snapshot, run: Run) -> tuple[Calibration | None, str, dict[str, Calibration | str]]:
    """Do what `calibrate_if_needed` does for a bank, or for each product of one of several.

    Returns:
        The calibration, or why there can be none; and of a bank of several products, the calibration of each, or why it has
        none: then there is none of the whole.
    """
    if not bank.is_of_products:
        return *calibrate_if_needed(bank, run), {}
    found: dict[str, Calibration | str] = {}
    for name in bank.products:
        made, why_none = calibrate_if_needed(bank.part(name), run)
        found[name] = made or why_none
    return None, "", found


def _score_own(detector: Detector, rows: list[int]) -> NormalScores:
    if detector.run.cluster is not None and rows:
        return score_on_cluster(detector, rows)
    size, found = detector.images_at_a_time, NormalScores()
    with progress_bar(len(rows), "calibrate", detector.run.progress) as bar:
        for start in range(0, max(1, len(rows)), size):
            found.add(detector.score_rows(rows[start : start + size]), detector)
            bar.update(len(rows[start : start + size]))
    return found


def _score_holdout(detector: Detector, holdout: Images | FeatureBatch) -> NormalScores:
    size, scored = detector.plan.batch, NormalScores()
    if isinstance(holdout, FeatureBatch):
        whole = originals(holdout)
        _check_new(detector.bank, whole.ids, whole.sha256)
        _check_no_siblings(detector.bank, whole.ids, whole.groups)
        parts = (whole[start : start + size] for start in range(0, len(whole), size))
        for part in by_picture(holdout) if detector.bank.is_tiled else parts:
            scored.add(detector.score_features(part), detector)
        return scored
    found = survey(holdout, detector.run)
    found.warn()
    check_normals(found.sources, [record.path for record in found.records])
    readable = [record for record in found.records if file_of(record.path).is_file()]
    digests = hash_images([record.path for record in readable])
    _check_new(detector.bank, [record.id for record in readable], digests)
    names = [record.id for record in found.records]
    _check_no_siblings(detector.bank, names, find_groups(names, detector.bank.manifest.grouping, detector.run.group_by))
    if detector.run.cluster is not None:
        return score_on_cluster(detector, [], found)
    for _, scores in detector.stream(Timings(), "calibrate")(found.root, found.records):
        scored.add(scores, detector)
    return scored


def _check_new(bank: Snapshot, names: Sequence[str], digests: Sequence[str]) -> None:
    """Raise InputError for held-out images that are in the bank or given twice, by content or, without files, by name."""
    keys = list(digests) or list(names)
    of_digest = {digest: name for name, digest in bank.sha256_of.items()}
    in_bank = of_digest if digests else {name: name for name in bank.pictures.ids}
    if known := [f"{name} (there {in_bank[key]})" for name, key in zip(names, keys, strict=True) if key in in_bank]:
        raise InputError(
            f"{len(known)} held-out images are in the bank {bank.path}: {_first(known)}; hold out images that are not "
            f"in it, or calibrate without holdout"
        )
    counts = Counter(keys)
    if twice := [name for name, key in zip(names, keys, strict=True) if counts[key] > 1]:
        raise InputError(f"held-out images have the same content: {_first(twice)}; hold out each image once")


def _check_no_siblings(bank: Snapshot, names: Sequence[str], groups: Sequence[str]) -> None:
    """Raise InputError for held-out images whose siblings are in the bank: they are nearer to it than a new part would be."""
    if not groups:
        return
    held = {group: name for name, group in bank.group_of.items()}
    if near := [f"{name} (like {held[group]})" for name, group in zip(names, groups, strict=True) if group in held]:
        raise InputError(
            f"{len(near)} held-out images belong to groups that the bank {bank.path} holds: {_first(near)}; hold out whole "
            f"groups, or calibrate without holdout"
        )


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
