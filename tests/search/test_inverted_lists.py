"""Lists of codes: laid out as the kernel reads them, and searched for the least estimates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.distances import product_knn
from spade_faiss.search.engines.lists import NativeLists, NumpyLists
from spade_faiss.search.inverted_lists import ALIGN, Codes, check_lists, encode, pack_lists, quantize, starts_of
from spade_faiss.search.native.extension import import_native, usable_simd_level
from spade_faiss.search.native.gallery import map_gallery
from spade_faiss.search.protocol import Pack

IMAGES, LOCATIONS, D, LISTS = 9, 40, 20, 7
needs_kernel = pytest.mark.skipif(usable_simd_level() is None, reason="the kernel does not run here")


def levels_here() -> list[str]:
    """The SIMD levels of this machine; none without the kernel."""
    return [] if usable_simd_level() is None else [name for name, why in import_native().simd_levels() if not why]


class Made:
    """Vectors of which some are left out, in the lists of centroids, in two groups of images; one image was removed."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.centroids = rng.normal(size=(LISTS, D)).astype(np.float32)
        scale = rng.choice([0.01, 0.3, 2.0], (IMAGES * LOCATIONS, 1))
        around = self.centroids[rng.integers(0, LISTS, IMAGES * LOCATIONS)]
        self.x = (around + scale * rng.normal(size=(IMAGES * LOCATIONS, D))).astype(np.float32)
        self.x[5] = self.x[3]  # equal vectors
        self.blocks = Blocks(Level("level", D, 1, 5, 8), ArraySource(self.x.reshape(IMAGES, LOCATIONS, D)))
        _, nearest = product_knn(self.x, self.centroids, 1)
        self.list_of = nearest[:, 0].copy()
        self.codes = encode(self.x - self.centroids[self.list_of], np.zeros(len(self.x), np.float32))
        self.list_of[rng.permutation(len(self.x))[:20]] = LISTS  # left out
        self.packs = [self._pack(range(4)), self._pack(range(4, IMAGES))]
        self.packs[1].rows[2] = -1
        self.xq = np.concatenate([self.x[::7] + rng.normal(0, 0.1, self.x[::7].shape), self.x[:2]]).astype(np.float32)

    def _pack(self, rows: range) -> Pack:
        part = slice(rows.start * LOCATIONS, rows.stop * LOCATIONS)
        shape = (len(rows), LOCATIONS)
        whole = self.codes
        codes = Codes(
            whole.code[part].reshape(*shape, -1), whole.step[part].reshape(shape), whole.half_sq_norm[part].reshape(shape)
        )
        lists = self.list_of[part].reshape(shape).astype(np.uint32)
        return Pack(np.array(rows), pack_lists(lists, codes, LISTS))

    @property
    def allowed(self) -> list[npt.NDArray[np.bool_]]:
        may = [pack.rows >= 0 for pack in self.packs]
        may[0][1] = False
        return may

    def estimates(self, q: FloatArray, probed: IntArray) -> FloatArray:
        """Of all vectors, in float64; infinite where they may not be found."""
        values = self.centroids[np.minimum(self.list_of, LISTS - 1)] + self.codes.step[:, None] * (
            self.codes.code[:, :D].astype(np.float64) - 128
        )
        estimate: FloatArray = np.square(values - q).sum(axis=1)
        image = np.arange(len(self.x)) // LOCATIONS
        estimate[~np.isin(self.list_of, probed) | (image == 1) | (image == 6)] = np.inf
        return estimate

    def native(self, level: str) -> NativeLists:
        gallery = map_gallery(self.blocks)
        assert gallery is not None
        return NativeLists(level, gallery, self.centroids, self.packs)


def test_lists_are_laid_out_one_after_the_other_and_ascend() -> None:
    made = Made()
    for pack, images in zip(made.packs, (4, 5), strict=True):
        packed, starts = pack.arrays, starts_of(pack.arrays["sizes"])
        check_lists(packed, D, LISTS, images * LOCATIONS)
        assert (starts % ALIGN == 0).all()
        for number, size in enumerate(packed["sizes"].tolist()):
            rows = slice(starts[number], starts[number + 1])
            half = packed["half_sq_norm"][rows]
            assert (np.diff(half[:size]) >= 0).all()
            assert np.isinf(half[size:]).all()
            ids = packed["id"][rows][:size] + (0 if images == 4 else 4 * LOCATIONS)
            assert (made.list_of[ids] == number).all()
            width = made.codes.code.shape[1]
            code = packed["codes"][rows.start * width : rows.stop * width].reshape(-1, width)[:size]
            np.testing.assert_array_equal(code, made.codes.code[ids])
            np.testing.assert_array_equal(packed["step"][rows][:size], made.codes.step[ids])
        assert packed["sizes"].sum() == (made.list_of[: len(made.x)].reshape(IMAGES, -1)[pack.rows[0] :][:images] < LISTS).sum()


@pytest.mark.parametrize(
    "change",
    [
        {"codes": np.zeros(3, np.uint8)},
        {"step": np.zeros(3, np.float32)},
        {"half_sq_norm": np.zeros((0,), np.float64)},
        {"sizes": np.ones(LISTS + 1, np.uint32)},
        {"sizes": np.full(LISTS, 1000, np.uint32)},
        {"more": np.zeros(3, np.uint8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arrays_that_no_lists_have_are_refused(change: Arrays) -> None:
    """The kernel would read beyond their end."""
    packed = Made().packs[0].arrays
    with pytest.raises(InputError):
        check_lists({**packed, **change}, D, LISTS, 4 * LOCATIONS)


def test_quantized_vectors_are_within_half_a_step() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    x[0], x[1] = 0, 1e-35
    integers, step = quantize(x)
    assert np.abs(integers).max() == 127
    assert not integers[:2].any()
    assert (np.abs(integers * step[:, None] - x)[2:] <= 0.5001 * step[2:, None]).all()


def check_found(made: Made, D_found: FloatArray, ids: IntArray, nprobe: int, rerank: int) -> None:
    """Distances are true, and the candidates are those of the least estimates in the lists that were probed."""
    D_centroid, near = product_knn(made.xq, made.centroids, LISTS)
    for query, (q, found) in enumerate(zip(made.xq, ids, strict=True)):
        probed = near[query, :nprobe]
        if nprobe < LISTS:
            probed = probed[(np.arange(nprobe) < 4) | (D_centroid[query, :nprobe] <= 1.5 * D_centroid[query, 0])]
        estimate = made.estimates(q, probed)
        wanted = min(rerank, int(np.isfinite(estimate).sum()))
        found = found[found >= 0]
        assert len(found) == wanted
        assert len(set(found.tolist())) == wanted
        # The query is encoded, too: what is found estimates hardly more than what is best.
        assert estimate[found].max() <= np.sort(estimate)[wanted - 1] * 1.1 + 1e-3
        true = np.square(made.x[found].astype(np.float64) - q).sum(axis=1)
        np.testing.assert_allclose(D_found[query, :wanted], true, rtol=1e-5, atol=1e-8)
        assert (np.diff(D_found[query, :wanted]) >= 0).all()
        assert np.isinf(D_found[query, wanted:]).all()


@pytest.mark.parametrize("nprobe", [1, 3, 6, LISTS])
@pytest.mark.parametrize("level", [*levels_here(), "numpy"])
def test_the_least_estimates_of_the_nearest_lists_are_found(level: str, nprobe: int) -> None:
    made = Made()
    search = NumpyLists(made.blocks, made.centroids, made.packs) if level == "numpy" else made.native(level)
    for rerank in (1, 10, 400):
        D_found, ids = search(made.xq, made.xq, made.allowed, nprobe, rerank, rerank)
        check_found(made, D_found, ids, nprobe, rerank)


@needs_kernel
def test_what_is_found_depends_neither_on_other_queries_nor_on_the_simd_level() -> None:
    """One by one, all at a time, and in another order; among equal vectors the same."""
    made = Made()
    expected = made.native(levels_here()[-1])(made.xq, made.xq, made.allowed, 4, 6, 6)
    order = np.random.default_rng(0).permutation(len(made.xq))
    for level in levels_here():
        search = made.native(level)
        together = search(made.xq, made.xq, made.allowed, 4, 6, 6)
        shuffled = search(made.xq[order], made.xq[order], made.allowed, 4, 6, 6)
        single = [search(made.xq[i : i + 1], made.xq[i : i + 1], made.allowed, 4, 6, 6) for i in range(len(made.xq))]
        for number in range(2):
            np.testing.assert_array_equal(together[number], expected[number])
            np.testing.assert_array_equal(shuffled[number], expected[number][order])
            np.testing.assert_array_equal(np.concatenate([found[number] for found in single]), expected[number])


@pytest.mark.parametrize("kind", ["native", "numpy"])
def test_ids_beyond_the_images_are_refused(kind: str) -> None:
    """An index from anybody may name vectors that there are not."""
    made = Made()
    if kind == "native" and usable_simd_level() is None:
        pytest.skip("the kernel does not run here")
    made.packs[0].arrays["id"][:] = 4 * LOCATIONS
    search = made.native(levels_here()[0]) if kind == "native" else NumpyLists(made.blocks, made.centroids, made.packs)
    with pytest.raises(BankError, match="names vectors that the bank does not hold"):
        search(made.xq, made.xq, made.allowed, LISTS, 10, 1)
