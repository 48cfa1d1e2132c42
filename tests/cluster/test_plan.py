"""The plan of a job: pieces that together are the list, cut where batches end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.cluster.plan import plan_pieces
from spade_faiss.core.errors import InputError


@given(count=st.integers(0, 3000), batch=st.integers(1, 40), most=st.integers(1, 500), workers=st.integers(1, 70))
def test_pieces_are_the_list_and_end_where_batches_end(count: int, batch: int, most: int, workers: int) -> None:
    pieces = plan_pieces(count, batch=batch, most=most, workers=workers)
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


def test_nothing_to_do_is_no_piece() -> None:
    assert plan_pieces(0, batch=16, most=10, workers=3) == []


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="workers"):
        plan_pieces(1, batch=1, most=1, workers=0)


def test_a_piece_says_where_it_is() -> None:
    assert str(plan_pieces(40, batch=16, most=1, workers=1)[1]) == "piece 1 (number 17 to 32)"
