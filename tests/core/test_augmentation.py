"""Augmentations: what can be written, how many views it makes, and what is refused."""

from __future__ import annotations

import pytest

from spade_faiss import Extraction, InputError
from spade_faiss.core.augmentation import Augmentation


@pytest.mark.parametrize(
    ("text", "expected", "views"),
    [
        ("rotate=8,flip,brightness=0.8:1.2", Augmentation(rotate=8, flip=True, brightness=(0.8, 1.2)), 18),
        ("flip", Augmentation(flip=True), 2),
        ("rotate=4", Augmentation(rotate=4), 4),
        ("brightness=0.5:2", Augmentation(brightness=(0.5, 2.0)), 3),
        (" flip, rotate=2", Augmentation(rotate=2, flip=True), 4),
    ],
)
def test_text_names_views(text: str, expected: Augmentation, views: int) -> None:
    found = Augmentation.parse(text)
    assert (found, found.views) == (expected, views)
    assert Augmentation.parse(str(found)) == found
    assert Extraction(augment=text).augmentation == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is none of rotate=N, flip and brightness=A:B"),
        ("rotate", "'rotate' is none of"),
        ("rotate=x", "'rotate=x' is none of"),
        ("flip=1", "'flip=1' is none of"),
        ("shear=3", "'shear=3' is none of"),
        ("flip,", "'' is none of"),
        ("flip,flip", "names flip twice"),
        ("rotate=0", "rotate=0 must be a whole number from 2 to 72"),
        ("rotate=73", "rotate=73 must be"),
        ("rotate=1", "adds no view"),
        ("brightness=0.8", "must be two numbers"),
        ("brightness=0.8:nan", "must be two numbers"),
        ("brightness=1.2:0.8", "brightness=1.2:0.8 must be a factor between 0 and 1, and one above 1"),
        ("brightness=0:2", "must be a factor between 0 and 1"),
        ("brightness=0.5:11", "at most 10"),
    ],
)
def test_what_names_no_view_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Extraction(augment=text)
