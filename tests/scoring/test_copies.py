"""Changed copies of a bank's own images are scored against all images but the one that they are copies of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method


@pytest.mark.parametrize("k_gallery", [5, ALL])
def test_a_copy_that_was_not_changed_scores_as_the_image_left_out(fitted_bank: Path, k_gallery: int | str) -> None:
    bank = Bank.open(fitted_bank)
    detector = Detector.open(bank, recipe="exact", method=Method(k_gallery=k_gallery))
    rows = [3, 0, 17]
    copies, own = detector.score_copies(bank.read(np.array(rows)), rows), detector.score_rows(rows)
    np.testing.assert_array_equal(copies.image_score, own.image_score)
    np.testing.assert_array_equal(copies.maps, own.maps)
    assert (copies.maps.max(axis=(1, 2)) > 0).all()  # in the bank, it would be at distance 0 from itself
    others = detector.score_copies(bank.read(np.array([3])), [0])
    assert float(others.image_score[0]) < float(own.image_score[0])  # image 3 is in the gallery


def test_copies_need_a_row_each(fitted_bank: Path) -> None:
    bank = Bank.open(fitted_bank)
    with pytest.raises(InputError, match="2 copies were given with 1 rows"):
        Detector.open(bank).score_copies(bank.read(np.array([1, 2])), [1])
