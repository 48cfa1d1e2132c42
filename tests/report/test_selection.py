"""The images that a report shows: chosen by score and label, and kept while scores come in batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.report.picture_store import PictureStore, ShortlistedPictures, SpooledPictures
from spade_faiss.report.selection import select_images, shortlist

EVERY = np.ones(8, np.bool_)
SCORES = np.array([3.0, 9.0, 1.0, 9.0, 5.0, 7.0, 2.0, 5.0])
DEFECTIVE = np.array([False, True, True, True, False, False, True, True])


def test_without_labels_the_highest_scores_are_shown_and_equal_ones_in_order() -> None:
    (group,) = select_images(SCORES, EVERY, None, 4)
    assert group.images == (1, 3, 5, 4)
    localized = EVERY.copy()
    localized[1] = False
    assert select_images(SCORES, localized, None, 4)[0].images == (3, 5, 4, 7)
    assert select_images(SCORES, ~EVERY, None, 4) == []


def test_with_labels_each_image_is_shown_once() -> None:
    top, hardest, suspected = select_images(SCORES, EVERY, DEFECTIVE, 6)
    assert top.images == (1, 3)
    assert hardest.images == (2, 6)
    assert suspected.images == (5, 4)
    top, hardest, suspected = select_images(SCORES, EVERY, DEFECTIVE, 0)
    assert (top.images, hardest.images, suspected.images) == ((1,), (2,), (5,))
    top, hardest, suspected = select_images(SCORES, EVERY, DEFECTIVE, 12)
    assert top.images == (1, 3, 5, 4)
    assert hardest.images == (2, 6, 7)
    assert suspected.images == (0,)


def test_of_equally_hard_defects_the_last_is_the_hardest() -> None:
    scores, defective = np.array([5.0, 1.0, 1.0, 1.0]), np.array([False, True, True, True])
    assert select_images(scores, np.ones(4, np.bool_), defective, 6)[1].images == (3, 2)


@pytest.mark.parametrize("shown", [0, 3, 24])
def test_the_list_is_short(shown: int) -> None:
    rng = np.random.default_rng(0)
    scores, defective = rng.random(1000), rng.random(1000) < 0.5
    assert len(shortlist(scores, None, shown)) == shown
    assert len(shortlist(scores, defective, shown)) <= max(4, 4 * (shown // 3))


@given(data=st.data(), shown=st.integers(0, 9), labeled=st.booleans(), sizes=st.lists(st.integers(1, 6), max_size=8))
def test_what_will_be_shown_is_kept_whatever_the_batches(
    data: st.DataObject, shown: int, labeled: bool, sizes: list[int]
) -> None:
    n = sum(sizes)
    scores = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), np.float32)  # many are equal
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), np.bool_) if labeled else None
    # With labels, all images have a map.
    flags = [True] * n if labeled else data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    localized = np.array(flags, np.bool_)
    with ShortlistedPictures(shown) as pictures:
        _fill(pictures, scores, localized, labels, sizes)
        for group in select_images(scores, localized, labels, shown):
            for i in group.images:
                np.testing.assert_array_equal(pictures[i], _picture(i))
        assert len(pictures) <= (max(4, 4 * (shown // 3)) if labeled else shown)


def test_a_file_holds_every_picture_that_has_a_map_and_goes(tmp_path: Path) -> None:
    scores, localized = np.arange(9, dtype=np.float32), np.arange(9) % 3 != 1
    with SpooledPictures(tmp_path) as pictures:
        _fill(pictures, scores, localized, None, [4, 3, 2])
        for i in [*np.flatnonzero(localized)[::-1].tolist(), 0]:
            np.testing.assert_array_equal(pictures[i], _picture(i))
        with pytest.raises(KeyError):
            pictures[1]
    assert list(tmp_path.iterdir()) == []


def _picture(i: int) -> np.ndarray:
    return np.full((2, 3, 3), i, np.uint8)


def _fill(
    pictures: PictureStore, scores: np.ndarray, localized: np.ndarray, labels: np.ndarray | None, sizes: list[int]
) -> None:
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        batch = [_picture(i) for i in range(start, start + size)]
        pictures.add(batch, scores[part], localized[part], None if labels is None else labels[part])
        start += size
