"""The plan of a job: pieces that together are the list, cut where batches end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.cluster.plan import least_images, plan_pieces
from spade_faiss.core.errors import InputError


@given(
    count=st.integers(0, 3000),
    batch=st.integers(1, 40),
    most=st.integers(1, 500),
    workers=st.integers(1, 70),
    least=st.integers(1, 400),
)
def test_pieces_are_the_list_and_end_where_batches_end(count: int, batch: int, most: int, workers: int, least: int) -> None:
    pieces = plan_pieces(count, batch=batch, most=most, workers=workers, least=least)
    items = list(range(count))
    assert [item for piece in pieces for item in piece.of(items)] == items
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert all(len(piece) > 0 for piece in pieces)
    assert all(piece.start % batch == 0 for piece in pieces)
    # One batch more than `most` at the most, because batches are not cut.
    assert all(len(piece) < most + batch for piece in pieces)


def test_each_worker_has_work_where_there_is_enough() -> None:
    assert len(plan_pieces(1000, batch=8, most=10_000, workers=5)) == 18  # ceil(1000 / (5 * 4) / 8) * 8 = 56 each
    assert [len(piece) for piece in plan_pieces(100, batch=16, most=10_000, workers=2)] == [16] * 6 + [4]


def test_a_piece_is_at_most_what_fills_a_shard() -> None:
    assert {len(piece) for piece in plan_pieces(100_000, batch=16, most=1000, workers=2)} == {1008, 208}


def test_no_worker_is_started_for_less_than_its_start_takes() -> None:
    """209 items of bottle are for one worker; with a batch less than two workers' worth, there is one, and then two."""
    plans = {count: plan_pieces(count, batch=32, most=1000, workers=4, least=256) for count in (209, 511, 512, 900, 1024)}
    sizes = {count: [len(piece) for piece in plan] for count, plan in plans.items()}
    assert sizes == {209: [209], 511: [511], 512: [256, 256], 900: [320, 320, 260], 1024: [64] * 16}
    assert [len(piece) for piece in plan_pieces(209, batch=32, most=100, workers=4, least=256)] == [128, 81]
    # Where the only worker there is has too little to do, it still says how far it is.
    assert len(plan_pieces(209, batch=32, most=1000, workers=1, least=256)) == 4


def test_large_features_pay_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of efficientnet_lite0 and of wide_resnet50_2."""
    monkeypatch.undo()  # what other tests of the folder run with
    assert (least_images(262_144), least_images(2_818_048)) == (256, 23)


def test_nothing_to_do_is_no_piece() -> None:
    assert plan_pieces(0, batch=16, most=10, workers=3) == []


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="workers"):
        plan_pieces(1, batch=1, most=1, workers=0)


def test_a_piece_says_where_it_is() -> None:
    assert str(plan_pieces(40, batch=16, most=1, workers=1)[1]) == "piece 1 (number 17 to 32)"
