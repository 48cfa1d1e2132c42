"""Tiles: where they lie, by hand and by properties, and which of them is the most central, by a loop over pixels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features import tiles
from spade_faiss.features.decoding import MAX_PIXELS
from spade_faiss.features.placement import Placement, place
from spade_faiss.features.tiles import TileGrid, check_places, cut_out, grid_of, largest_image, tile_id

TILED = Preprocess(tile=448, overlap=64)


def test_grids_worked_out_by_hand() -> None:
    # 3552 pixels are left after the first tile: nine steps of at most 448 - 64 = 384.
    grid = TileGrid.of((4000, 3000), TILED)
    assert grid.lefts == (0, 355, 710, 1065, 1420, 1776, 2131, 2486, 2841, 3196, 3552)
    assert grid.tops == (0, 364, 729, 1093, 1458, 1822, 2187, 2552)
    assert len(grid) == 88
    assert TileGrid.of((448, 832), TILED).tops == (0, 384)
    assert TileGrid.of((448, 833), TILED).tops == (0, 192, 385)
    assert TileGrid.of((448, 448), TILED).places.tolist() == [[0, 0, 448, 448]]
    assert TileGrid(7, 12, 10, 2).places.tolist() == [[-1, 0, 7, 12], [-1, 2, 7, 12]]
    assert [tile.rows for tile in TileGrid(10, 12, 10, 2)] == [slice(0, 6), slice(6, 12)]


def test_a_picture_lies_in_the_middle_of_a_tile_that_is_larger() -> None:
    (tile,) = TileGrid(5, 8, 10, 3)
    assert (tile.left, tile.top) == (-2, -1)
    assert (tile.rows, tile.columns) == (slice(0, 8), slice(0, 5))


@given(width=st.integers(1, 60), height=st.integers(1, 60), tile=st.integers(1, 24), share=st.integers(0, 12))
def test_each_pixel_is_of_the_tile_in_which_it_is_the_most_central(width: int, height: int, tile: int, share: int) -> None:
    overlap = share % (tile // 2 + 1)
    grid = TileGrid(width, height, tile, overlap)
    tiles = list(grid)
    for starts, length in ((grid.lefts, width), (grid.tops, height)):
        if length > tile:
            assert (starts[0], starts[-1]) == (0, length - tile)
            assert all(0 < second - first <= tile - overlap for first, second in pairwise(starts))
    owner = np.full((height, width), -1)
    for number, found in enumerate(tiles):
        assert (owner[found.rows, found.columns] == -1).all()
        owner[found.rows, found.columns] = number
    for y, x in np.ndindex(height, width):
        off = [
            max(abs(2 * y + 1 - 2 * found.top - tile), abs(2 * x + 1 - 2 * found.left - tile))
            if found.top <= y < found.top + tile and found.left <= x < found.left + tile
            else 1 << 20
            for found in tiles
        ]
        rows, columns = (
            [abs(2 * at + 1 - 2 * start - tile) for start in starts] for at, starts in ((y, grid.tops), (x, grid.lefts))
        )
        # The most central by rows and by columns, the first of equal ones; no other tile holds the pixel further inside.
        expected = rows.index(min(rows)) * len(grid.lefts) + columns.index(min(columns))
        assert owner[y, x] == expected
        assert off[expected] == min(off)


@given(width=st.integers(1, 40), height=st.integers(1, 40), tile=st.integers(1, 24))
def test_a_tile_is_cut_out_as_if_the_border_went_on(width: int, height: int, tile: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    padded = np.pad(picture, ((tile, tile), (tile, tile), (0, 0)), mode="edge")
    for left, top, *_ in TileGrid(width, height, tile, tile // 2).places.tolist():
        expected = padded[tile + top : 2 * tile + top, tile + left : 2 * tile + left]
        np.testing.assert_array_equal(cut_out(picture, left, top, tile), expected)


def test_places_and_grids() -> None:
    grid = TileGrid.of((1000, 500), TILED)
    assert grid_of(grid.places[3:5], TILED) == grid
    assert tile_id("a/b.png", grid.places[1]) == "a/b.png@276,0"
    assert largest_image(np.concatenate([grid.places, TileGrid.of((400, 400), TILED).places])) == 500_000
    assert largest_image(np.empty((0, 4), np.int32)) == 0
    with pytest.raises(InputError, match="an image has one"):
        grid_of(np.array([[0, 0, 448, 448], [0, 0, 500, 448]], np.int32), TILED)
    check_places(grid.places, TILED)
    check_places(np.concatenate([grid.places, TileGrid.of((900, 40), TILED).places, grid.places]), TILED)
    check_places(grid.places[:0], TILED)
    assert tiles._MOST_PIXELS == MAX_PIXELS
    for wrong, preprocess, message in (
        ([[1, 0, 1000, 500]], TILED, r"an image of 1000 x 500 pixels has no tile at \(1, 0\)"),
        ([[0, 0, 0, 500]], TILED, "of an image of 0 x 500 pixels, which none can have"),
        ([[0, 0, 10_000, 10_001]], TILED, "10000 x 10001 pixels, which none can have"),
        ([[0, 0, 1 << 21, 1]], TILED, "which none can have"),
        (
            [*grid.places.tolist(), [552, 51, 1000, 500], [0, 0, 448, 448]],
            TILED,
            r"1000 x 500 pixels has no tile at \(552, 51\)",
        ),
        ([[0, 0, 448, 448]], Preprocess(), "the bank has whole images"),
        ([[0, 0, 448, 448]], None, "the bank has whole images"),
    ):
        with pytest.raises(InputError, match=message):
            check_places(np.array(wrong, np.int32), preprocess)


def test_a_picture_keeps_its_size_unless_it_is_resized() -> None:
    assert place(4000, 3000, TILED) == Placement((4000, 3000), (4000, 3000), (0, 0), (4000, 3000))
    smaller = place(4000, 3000, Preprocess(tile=448, resize=600))
    assert smaller == Placement((4000, 3000), (800, 600), (0, 0), (800, 600))
    assert smaller.visible_share == 1
    assert smaller.padding == ((0, 0), (0, 0))
    with pytest.raises(InputError, match="more than the 100000000 allowed; lower resize"):
        place(100, 10_000, Preprocess(tile=448, resize=1001))
