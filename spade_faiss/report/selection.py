"""Which images a report shows in full."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import Bools

Ints = npt.NDArray[np.int64]
Values = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Images that are shown together: a title, their numbers in the order they are shown in, and a note."""

    title: str
    images: tuple[int, ...]
    note: str = ""


def select_images(image_score: Values, localized: Bools, defective: Bools | None, shown: int) -> list[Selection]:
    """Choose the images that are shown in full, among those that have a map.

    Args:
        image_score: (n,) image scores.
        localized: (n,) whether an image has a map.
        defective: (n,) labels, or None.
        shown: how many images to show; with labels, a third of them in each of three groups, and at least one.

    Returns:
        One group without labels, three with; equal scores are in the order of the images.
    """
    order = [i for i in _by_score(image_score).tolist() if localized[i]]
    if defective is None:
        return [Selection(title="Most anomalous images", images=tuple(order[:shown]))] if order else []
    share = _share(shown)
    top, rest = order[:share], [i for i in order if i not in order[:share]]
    hardest = [i for i in reversed(rest) if defective[i]]
    suspected = [i for i in rest if not defective[i]]
    return [
        Selection(title="Most anomalous images", images=tuple(top), note="The highest image scores."),
        Selection(
            title="Defects hardest to find",
            images=tuple(hardest[:share]),
            note="Defective images with the lowest image scores.",
        ),
        Selection(
            title="Normal images most suspected",
            images=tuple(suspected[:share]),
            note="Normal images with the highest image scores.",
        ),
    ]


def shortlist(image_score: Values, defective: Bools | None, shown: int) -> Ints:
    """The images, ascending, that `select_images` may choose once more images have followed, all of which have a map.

    An image that is not on the list of the first images is not on a later one. The list is at most four thirds of `shown` long.

    Args:
        image_score: (n,) image scores.
        defective: (n,) labels, or None.
        shown: as for `select_images`.
    """
    order = _by_score(image_score)
    if defective is None:
        return np.sort(order[:shown])
    share = _share(shown)
    # Up to `share` of the normal images with the highest scores may be among the most anomalous, which are shown once.
    hardest, suspected = order[defective[order]][::-1], order[~defective[order]]
    return np.unique(np.concatenate([order[:share], hardest[:share], suspected[: 2 * share]]))


def lowest_for_nan(scores: Values) -> Values:
    """(n,) scores to rank by: NaN, of an image that has none, is below all others."""
    return np.where(np.isnan(scores), -np.inf, scores)


def _by_score(image_score: Values) -> Ints:
    return np.argsort(-lowest_for_nan(image_score), kind="stable")


def _share(shown: int) -> int:
    return max(1, shown // 3)
