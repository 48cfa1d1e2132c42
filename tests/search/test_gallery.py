"""The kernel reads vectors where the bank stores them: bit for bit those of the blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout
from spade_faiss.features.resampling import taps, upsample
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.distances import direct_sq_dist
from spade_faiss.search.levels import open_blocks, searched_levels
from spade_faiss.search.native.extension import import_native, usable_simd_level
from spade_faiss.search.native.gallery import map_gallery

pytestmark = pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")

# Sizes that divide nothing, and channels that fill no register.
LEVELS = (
    Level("fine", channels=24, stride=4, height=13, width=10),
    Level("middle", channels=9, stride=8, height=6, width=5),
    Level("coarse", channels=17, stride=16, height=3, width=2),
)
IMAGES = 5


def make_bank(path: Path, dtype: str) -> Bank:
    rng = np.random.default_rng(7)
    layout = Layout(levels=LEVELS, embedding_dim=4, input_size=(52, 40), dtype=dtype)
    bank = Bank.create(path, layout)
    for part in range(2):  # several shards
        names = [f"{part}-{i}" for i in range(IMAGES)]
        maps = {level.name: rng.standard_normal((IMAGES, *level.shape)).astype(np.float32) for level in LEVELS}
        bank.append(FeatureBatch(names, rng.standard_normal((IMAGES, 4)).astype(np.float32), maps))
    bank.remove(["0-2"])
    return bank


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("names", [("fine",), ("coarse",), ("fine+middle",), ("middle+coarse",), ("coarse+fine+middle",)])
def test_vectors_and_distances_are_those_of_the_blocks(tmp_path: Path, dtype: str, names: tuple[str, ...]) -> None:
    bank = make_bank(tmp_path / "bank", dtype)
    (level,) = searched_levels(bank.layout.levels, "mean", names)
    blocks = open_blocks(bank, level)
    gallery = map_gallery(blocks)
    assert gallery is not None
    every = np.concatenate([blocks(row) for row in range(len(bank))])
    assert gallery.count == len(every) == (2 * IMAGES - 1) * level.height * level.width
    np.testing.assert_array_equal(gallery.vectors(np.arange(len(every))), every)

    rng = np.random.default_rng(0)
    xq = rng.standard_normal((6, level.channels)).astype(np.float32)
    ids = rng.integers(0, len(every), (6, 4))
    ids[2, 1] = -1
    found = gallery.sq_distances(xq, ids)
    assert found[2, 1] == np.inf
    ids[2, 1] = 0
    expected = direct_sq_dist(xq, every, ids)
    keep = np.isfinite(found)
    assert keep.sum() == found.size - 1
    np.testing.assert_allclose(found[keep], expected[keep], rtol=1e-6)


def test_distances_are_those_of_the_kernel() -> None:
    rng = np.random.default_rng(1)
    native, d = import_native(), 37
    maps = rng.standard_normal((2, 20, d)).astype(np.float32)
    blocks = Blocks(Level("level", channels=d, stride=1, height=4, width=5), ArraySource(maps))
    xq = rng.standard_normal((8, d)).astype(np.float32)
    packing = native.Packing(usable_simd_level(), np.zeros(d, np.float32))
    D, I, _, _ = native.search(
        native.QueryPack(packing, xq), xq, native.RowPack(packing, maps[1]), maps[1], np.full(8, np.inf, np.float32), 3
    )
    gallery = map_gallery(blocks)
    assert gallery is not None
    np.testing.assert_array_equal(gallery.sq_distances(xq, I + 20), D)


def test_taps_are_what_upsampling_does() -> None:
    maps = np.random.default_rng(2).standard_normal((1, 5, 1, 3)).astype(np.float32)
    found = taps(5, 12)
    assert found is not None
    positions, weights = found
    assert positions.shape == weights.shape == (12, 2)
    resized = upsample(maps, (12, 1))[0, :, 0]
    terms = np.where(positions[..., None] >= 0, weights[..., None] * maps[0, positions, 0], 0)
    np.testing.assert_array_equal(terms[:, 0] + terms[:, 1], resized)


def test_an_axis_that_shrinks_has_taps_too() -> None:
    assert taps(12, 5) is not None


def test_bad_arguments_are_refused() -> None:
    gallery = import_native().Gallery
    maps = [np.zeros((6, 3), np.float32)]
    with pytest.raises(ValueError, match="of one shape and type"):
        gallery(2, 3, [([*maps, np.zeros((5, 3), np.float32)], None, None)])
    with pytest.raises(ValueError, match="of the same images"):
        gallery(2, 3, [(maps, None, None), (maps * 2, None, None)])
    with pytest.raises(ValueError, match="positions of the stored map"):
        axis = (np.full((2, 2), 4, np.int32), np.ones((2, 2), np.float32))
        gallery(2, 3, [(maps, None, (2, 3), axis, axis)])
    with pytest.raises(ValueError, match="ids must be those of vectors"):
        gallery(2, 3, [(maps, None, None)]).vectors(np.array([6]))
    stored_codes, codes, scale = import_native().StoredCodes, [np.zeros((6, 3), np.int8)], np.ones(3, np.float32)
    np.testing.assert_array_equal(gallery(2, 3, [(codes, stored_codes(scale), None)]).vectors(np.array([5])), np.zeros((1, 3)))
    packed, bits = [np.zeros((6, 2), np.uint8)], np.array([7, 3, 1], np.uint8)
    found = gallery(2, 3, [(packed, stored_codes(scale, bits), None)]).vectors(np.array([5]))
    np.testing.assert_array_equal(found, [[-127, -7, -1]])
    for stored, wrong, message in (
        (codes, None, "float16 or float32"),
        (maps, stored_codes(scale), r"maps must be \(n, 3\) int8, C-contiguous, as their codes say"),
        (codes, stored_codes(scale[:2]), r"\(n, 2\) int8"),
        (codes, stored_codes(scale, bits), r"\(n, 2\) uint8"),
        ([np.zeros((6, 3), np.uint8)], stored_codes(scale, bits), r"\(n, 2\) uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery(2, 3, [(stored, wrong, None)])
    for arguments, message in (
        ((scale.astype(np.float64),), "scale must be"),
        ((scale[:0],), "scale must be"),
        ((scale, bits[:2]), "bits must be"),
        ((scale, bits.astype(np.int64)), "bits must be"),
        ((scale, np.array([7, 8, 1], np.uint8)), "bits must be from 1 to 7"),
        ((scale, np.array([7, 0, 1], np.uint8)), "bits must be from 1 to 7"),
    ):
        with pytest.raises(ValueError, match=message):
            stored_codes(*arguments)
