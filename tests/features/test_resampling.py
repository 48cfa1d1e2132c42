"""Resizing and smoothing, against what scipy makes of the unit vectors; and the kernel's against NumPy's, to the last bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage, sparse

from spade_faiss.features.resampling import axis_taps, resample
from spade_faiss.scoring import fusion
from spade_faiss.search.native.extension import import_native, is_built

Floats = npt.NDArray[np.float32]
SIGMAS = (0.0, 0.1, 0.5, 4.0, 7.3, 30.0)

needs_kernel = pytest.mark.skipif(not is_built(), reason="the kernel was not built")


def by_scipy(length: int, target: int, sigma: float) -> Floats:
    """(target, length), the weights of the cells."""
    resized = ndimage.zoom(np.eye(length), (target / length, 1), order=1, mode="nearest", grid_mode=True)
    return (resized if sigma < 0.125 else ndimage.gaussian_filter1d(resized, sigma, axis=0)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 14, 28, 37, 56, 224])
@pytest.mark.parametrize("target", [1, 2, 13, 56, 97, 224, 256])
def test_weights_are_those_of_scipy_to_the_last_bit(length: int, target: int) -> None:
    for sigma in SIGMAS:
        taps, expected = axis_taps(length, target, sigma), by_scipy(length, target, sigma)
        found = np.zeros_like(expected)
        for positions, weights, count, line in zip(taps.positions, taps.weights, taps.counts, found, strict=True):
            assert (np.diff(positions[:count]) > 0).all()
            line[positions[:count]] = weights[:count]
            assert not weights[count:].any()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("shape", "size"), [((3, 56, 56), (224, 224)), ((1, 5, 7, 3), (12, 31)), ((2, 40, 3), (17, 225))])
def test_sums_are_those_of_sparse_products(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for sigma in SIGMAS:
        rows = sparse.csr_array(by_scipy(shape[1], size[0], sigma)) @ np.moveaxis(maps, 1, 0).reshape(shape[1], -1)
        columns = np.moveaxis(rows.reshape(size[0], shape[0], shape[2], -1), 2, 0).reshape(shape[2], -1)
        both = (sparse.csr_array(by_scipy(shape[2], size[1], sigma)) @ columns).reshape(size[1], size[0], shape[0], *shape[3:])
        np.testing.assert_array_equal(resample(maps, size, sigma), np.moveaxis(both, (2, 1), (0, 1)))


@needs_kernel
@pytest.mark.parametrize("grid", [(56, 56), (14, 14), (1, 1), (5, 7), (300, 20)])
@pytest.mark.parametrize("size", [(224, 224), (9, 31), (1, 2), (8, 8)])
def test_the_kernel_smooths_to_the_same_bits(grid: tuple[int, int], size: tuple[int, int]) -> None:
    maps = np.random.default_rng(1).standard_normal((3, *grid)).astype(np.float32)
    for sigma in SIGMAS:
        expected = resample(maps, size, sigma)
        np.testing.assert_array_equal(fusion._smooth(maps, size, sigma), expected)
        np.testing.assert_array_equal(fusion._smooth(maps[1:2], size, sigma), expected[1:2])
        np.testing.assert_array_equal(
            fusion._smooth(maps.swapaxes(1, 2), size, sigma), resample(maps.swapaxes(1, 2), size, sigma)
        )


def test_without_the_kernel_maps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = np.random.default_rng(2).random((2, 14, 14)).astype(np.float32)
    dist[:, :3] = np.nan
    expected = fusion.score_maps([dist], (56, 56), 4.0)
    monkeypatch.setattr(fusion, "is_built", lambda: False)
    np.testing.assert_array_equal(fusion.score_maps([dist], (56, 56), 4.0), expected)


@needs_kernel
def test_the_kernel_refuses_what_does_not_fit() -> None:
    native, maps = import_native(), np.zeros((2, 3, 4), np.float32)
    axis = np.zeros((5, 1), np.int32), np.ones((5, 1), np.float32)
    assert native.resample(maps, *axis, *axis).shape == (2, 5, 5)
    assert native.resample(maps[:0], *axis, *axis).shape == (0, 5, 5)
    with pytest.raises(ValueError, match=r"maps must be \(n, h, w\)"):
        native.resample(maps[0], *axis, *axis)
    with pytest.raises(ValueError, match="float32, C-contiguous"):
        native.resample(maps.astype(np.float64), *axis, *axis)
    with pytest.raises(ValueError, match="positions must be those of cells"):
        native.resample(maps, np.full((5, 1), 3, np.int32), axis[1], *axis)
    with pytest.raises(ValueError, match="positions must be those of cells"):
        native.resample(maps, *axis, np.full((5, 1), -1, np.int32), axis[1])
    with pytest.raises(ValueError, match="weights must be as many as positions"):
        native.resample(maps, axis[0], np.ones((5, 2), np.float32), *axis)
    with pytest.raises(ValueError, match="int32"):
        native.resample(maps, axis[0].astype(np.int64), axis[1], *axis)
