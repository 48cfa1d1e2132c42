"""A conformance suite for search methods: what every `GallerySearch` must do, as tests that a subclass inherits under pytest.

A complete example, a search of all vectors by direct distances, with its tests:

    import numpy as np

    from spade_faiss.search.distances import direct_sq_dist
    from spade_faiss.search.protocol import NoSettings, SearchMethod
    from spade_faiss.search.running_best import RunningBest
    from spade_faiss.testing import GallerySearchTests, open_method


    class DirectSearch:
        def __init__(self, blocks, workers, build, query, encoded):
            self.blocks = blocks
            self.locations = blocks.level.locations

        def __call__(self, xq, neighbors, kappa):
            best = RunningBest(len(xq), xq.shape[1], kappa, self.locations)
            everywhere = np.tile(np.arange(self.locations), (xq.shape[1], 1))
            for image, row in ((image, row) for image, rows in enumerate(neighbors.tolist()) for row in rows):
                sq_dist = direct_sq_dist(xq[image], self.blocks(row), everywhere)
                best.merge(image, slice(None), row, everywhere, sq_dist)
            return best.hits()

        def working_bytes(self, images, k_gallery, kappa):
            found = RunningBest.nbytes(images, self.locations, kappa) + self.blocks.block_bytes
            return found + 12 * self.locations**2 + RunningBest.merge_bytes(self.locations, self.locations, kappa)


    METHOD = SearchMethod(definition="All vectors, directly.", build=NoSettings, query=NoSettings, open=DirectSearch)


    class TestDirectSearch(GallerySearchTests):
        exact = True
        orders_locations = True

        def open_search(self, blocks, workers):
            return open_method(METHOD, blocks, workers)
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import Arrays
from spade_faiss.features.bit_packing import MOST_NUMBER_BITS, pack
from spade_faiss.features.codes import Decoder
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.protocol import Encoded, GallerySearch, Hits, Pack, SearchMethod
from spade_faiss.search.workers import Workers
from spade_faiss.testing.cases import SearchCase, Shape, structured_case, whole_number_case

__all__ = [
    "EncodedInMemory",
    "GallerySearchTests",
    "SearchCase",
    "assert_same_hits",
    "open_method",
    "structured_case",
    "whole_number_case",
]

B = TypeVar("B")
Q = TypeVar("Q")

# What Python's own objects may take in a call that is measured.
_SLACK_BYTES = 200_000


class EncodedInMemory:
    """What a method stores of one level, in memory, see `Encoded`.

    Args:
        method: the method; it has `train` and `encode`.
        blocks: the level's blocks.
        build: the build settings.

    Raises:
        ValueError: if the encoded arrays of two blocks differ in shape or type.
    """

    def __init__(self, method: SearchMethod[B, Q], blocks: Blocks, build: B) -> None:
        assert method.train is not None
        assert method.encode is not None
        self._trained = method.train(blocks, build)
        self._rows = [method.encode(blocks.read(row), self._trained, build) for row in range(len(blocks))]
        self.requested: set[int] = set()
        self._pack = None if method.pack is None else partial(self._packed, method.pack, build)
        for arrays in (self._trained, *self._rows):
            for array in arrays.values():
                array.flags.writeable = False  # as views of a file are
        kinds = [{name: (array.shape, array.dtype) for name, array in arrays.items()} for arrays in self._rows]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"blocks of one level are encoded as arrays of different shapes or types: {kinds}")

    def _packed(self, pack: Callable[[Arrays, Arrays, B], Arrays], build: B, rows: list[int]) -> Arrays:
        stacked = {name: np.stack([self._rows[row][name] for row in rows]) for name in self._rows[0]}
        return pack(stacked, self._trained, build)

    @property
    def trained(self) -> Arrays:
        """What was learned."""
        return self._trained

    def __call__(self, row: int) -> Arrays:
        """What a block is encoded as; `requested` takes note of the row."""
        self.requested.add(row)
        return self._rows[row]

    def packs(self) -> list[Pack]:
        """Two packs, of which the first holds more images, for a method that packs."""
        assert self._pack is not None
        rows = np.arange(len(self._rows))
        parts = [part for part in np.split(rows, [-(-2 * len(rows) // 3)]) if len(part)]
        return [Pack(part, self._pack(part.tolist())) for part in parts]


def open_method(
    method: SearchMethod[B, Q], blocks: Blocks, workers: Workers, build: B | None = None, query: Q | None = None
) -> GallerySearch:
    """Open the search of one level; a method that stores something trains and encodes first, in memory.

    Args:
        method: the method.
        blocks: the level's blocks.
        workers: the threads that search.
        build: the build settings; the defaults if None.
        query: the query settings; the defaults if None.
    """
    build, query = method.build() if build is None else build, method.query() if query is None else query
    encoded: Encoded | None = None if method.train is None else EncodedInMemory(method, blocks, build)
    return method.open(blocks, workers, build, query, encoded)


class GallerySearchTests:
    """The tests. Subclass it in a test module under a name that starts with `Test`, and implement `open_search`.

    Attributes:
        exact: whether the vectors that are found are the nearest of those that `compared` names.
        rtol: for an exact search, how far above the smallest a squared distance may be, relative to it.
        orders_locations: whether of equal vectors in one image the one at the smaller location is found; the protocol leaves it
            open. That of the smaller bank row is always found.
        shapes: the shapes of the maps, height, width and channels.
    """

    exact: bool = False
    rtol: float = 2e-4
    orders_locations: bool = False
    shapes: tuple[Shape, ...] = ((5, 7, 16), (7, 3, 40), (1, 9, 16))

    def open_search(self, blocks: Blocks, workers: Workers) -> GallerySearch:
        """Open the search to test over the blocks of one level."""
        raise NotImplementedError

    def compared(self, case: SearchCase, image: int, location: int) -> npt.NDArray[np.bool_]:
        """Which vectors a location of a test image is compared with, (rows, HW); override it for another definition.

        By default they are all vectors of the image's neighbors.
        """
        rows, locations, _ = case.vectors.shape
        mask = np.zeros((rows, locations), np.bool_)
        mask[case.neighbors[image]] = True
        return mask

    def test_distances_are_those_of_brute_force(self) -> None:
        """Distances are true and ascending; those of an exact search are the smallest, those of any other are not smaller."""
        for shape in self.shapes:
            case = structured_case(1, shape=shape)
            search, most = self._open(case), self._most(case)
            for kappa in sorted({1, min(3, most), min(20, most)}):
                self._check(case, search(case.xq, case.neighbors, kappa), kappa)

    def test_every_vector_can_be_asked_for(self) -> None:
        """`kappa` may be as large as the number of vectors that a location is compared with: then all of them are found."""
        case = structured_case(2, n=2, shape=(2, 3, 16))
        most, search = self._most(case), self._open(case)
        for kappa in sorted({max(1, most - 1), most}):
            hits = search(case.xq, case.neighbors, kappa)
            self._check(case, hits, kappa)
        np.testing.assert_allclose(hits.sq_dist, self._brute(case, most), rtol=max(self.rtol, 1e-5), atol=1e-9)

    def test_ties_go_to_the_smaller_row(self) -> None:
        """Of vectors that are equal to the bit, the one in the smallest bank row is named."""
        for seed in range(5):
            case = whole_number_case(seed)
            search = self._open(case)
            for kappa in sorted({1, min(3, self._most(case))}):
                hits = search(case.xq, case.neighbors, kappa)
                if self.exact:
                    np.testing.assert_array_equal(hits.sq_dist, self._brute(case, kappa), err_msg=f"kappa={kappa}")
                for image, query in np.ndindex(hits.row.shape):
                    self._check_tie(case, hits, image, query)

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        """The same numbers come out for an image alone, in a part of the batch, and in all of it."""
        case = structured_case(3, n=6, rows=9, k=6)
        search = self._open(case)
        for kappa in self._kappas(case):
            together = search(case.xq, case.neighbors, kappa)
            for images in [*(slice(image, image + 1) for image in range(6)), slice(0, 4), slice(4, 6)]:
                part = case.part(images)
                assert_same_hits(search(part.xq, part.neighbors, kappa), _part(together, images))

    def test_the_order_of_neighbors_does_not_matter(self) -> None:
        """A gallery is a set."""
        case = structured_case(4, n=3, rows=13, k=12)
        search, rng = self._open(case), np.random.default_rng(0)
        for kappa in self._kappas(case):
            expected = search(case.xq, case.neighbors, kappa)
            for neighbors in (rng.permuted(case.neighbors, axis=1), case.neighbors[:, ::-1]):
                assert_same_hits(search(case.xq, neighbors, kappa), expected)

    def test_the_number_of_threads_does_not_matter(self) -> None:
        """Neither that of the workers, nor the one that FAISS would use by itself."""
        case = structured_case(5, n=5, rows=9, k=7, shape=(19, 20, 40))
        found = []
        for threads in (1, 2, 5):
            with _faiss_threads(threads):
                search = self.open_search(case.blocks, Workers(threads))
                found.append(search(case.xq, case.neighbors, self._kappas(case)[-1]))
        for hits in found[1:]:
            assert_same_hits(hits, found[0])

    def test_threads_share_a_search(self) -> None:
        """Calls at the same time return what they return one after the other."""
        case = structured_case(6, n=8, rows=9, k=6)
        search, parts = self._open(case), [case.part(slice(image, image + 2)) for image in range(7)]
        with ThreadPoolExecutor(4) as pool:  # the first calls race for whatever is made once
            together = list(pool.map(lambda part: search(part.xq, part.neighbors, 1), parts * 3))
        alone = self._open(case)
        for hits, part in zip(together, parts * 3, strict=True):
            assert_same_hits(hits, alone(part.xq, part.neighbors, 1))

    def test_arguments_are_left_alone(self) -> None:
        """They may be read-only; what is returned is the caller's own."""
        case = structured_case(7)
        arguments: list[npt.NDArray[Any]] = [case.maps, case.xq, case.neighbors]
        before = [array.copy() for array in arguments]
        for array in arguments:
            array.flags.writeable = False
        hits = self._open(case)(case.xq, case.neighbors, self._kappas(case)[-1])
        for array, copy in zip(arguments, before, strict=True):
            np.testing.assert_array_equal(array, copy)
        returned: list[npt.NDArray[Any]] = [hits.sq_dist, hits.row, hits.location]
        for array in returned:
            assert array.flags.writeable, "what is returned is read-only"
            assert not any(np.shares_memory(array, other) for other in arguments), "what is returned shares the caller's memory"

    def test_blocks_may_be_stored_as_float16_or_float32_or_codes(self) -> None:
        """The same numbers give the same results, whatever the cache holds of them; memory of a block may be used again."""
        for n, threads, shape in ((3, 1, (5, 7, 16)), (6, 3, (13, 11, 40))):
            case = structured_case(8, n=n, rows=12, k=12, shape=shape)
            scale = (np.abs(case.vectors).max(axis=(0, 1)) / 127).astype(np.float32)
            codes = np.rint(case.vectors / scale).astype(np.int8)
            bits = (3 + np.arange(len(scale)) % (MOST_NUMBER_BITS - 2)).astype(np.uint8)
            steps = (127 * scale / (1 << bits)).astype(np.float32)
            packed = pack(2 * np.floor(case.vectors / steps / 2) + 1, bits)
            kappa = self._kappas(case)[-1]
            for stored in (
                ArraySource(case.vectors.astype(np.float16)),
                ArraySource(codes, Decoder(scale)),
                ArraySource(packed, Decoder(steps, bits)),
            ):
                vectors = np.stack([stored.read(row) for row in range(len(stored))])
                decoded = Blocks(case.level, ArraySource(vectors))
                expected = self.open_search(decoded, Workers(threads))(case.xq, case.neighbors, kappa)
                for capacity in (0, 3 * decoded.block_bytes, 100 * decoded.block_bytes):
                    blocks = Blocks(case.level, stored, BlockCache(capacity))
                    search = self.open_search(blocks, Workers(threads))
                    for _ in range(2):
                        assert_same_hits(search(case.xq, case.neighbors, kappa), expected)

    def test_working_bytes_are_an_upper_bound(self) -> None:
        """A call takes no more than it says, as far as memory is allocated by Python and NumPy."""
        case = structured_case(9, n=5, rows=9, k=7, shape=(23, 25, 24))
        search = self._open(case)
        for kappa in self._kappas(case):
            search(case.xq, case.neighbors, kappa)  # makes what is made once
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                search(case.xq, case.neighbors, kappa)
                taken = tracemalloc.get_traced_memory()[1] - before
            finally:
                tracemalloc.stop()
            planned = search.working_bytes(5, 7, kappa)
            assert taken <= planned + _SLACK_BYTES, (
                f"a call with kappa={kappa} takes {taken} bytes, working_bytes says {planned}"
            )

    def test_working_bytes_grow_with_the_call(self) -> None:
        """More images, more neighbors or a larger kappa never take less; what is returned is part of it."""
        case = structured_case(10)
        search, locations = self._open(case), case.xq.shape[1]
        sizes = [1, 2, 3, 7, 16]
        for images in sizes:
            for k_gallery in sizes:
                planned = search.working_bytes(images, k_gallery, 1)
                for more in ((images + 1, k_gallery, 1), (images, k_gallery + 1, 1), (images, k_gallery, 2)):
                    assert search.working_bytes(*more) >= planned, f"{more} takes less than {(images, k_gallery, 1)}"
                assert planned > images * locations * (4 + 8 + 8)

    def _open(self, case: SearchCase) -> GallerySearch:
        return self.open_search(case.blocks, Workers(2))

    def _most(self, case: SearchCase) -> int:
        """The largest kappa that every location of every test image can ask for."""
        n, locations, _ = case.xq.shape
        return min(int(self.compared(case, image, location).sum()) for image in range(n) for location in range(locations))

    def _kappas(self, case: SearchCase) -> list[int]:
        return sorted({1, min(3, self._most(case))})

    def _brute(self, case: SearchCase, kappa: int) -> npt.NDArray[np.float64]:
        """(n, HW, kappa), the smallest squared distances to what a location is compared with, ascending, in float64."""
        n, locations, _ = case.xq.shape
        dist = np.empty((n, locations, kappa))
        vectors = case.vectors.astype(np.float64)
        for image, location in np.ndindex(n, locations):
            compared = vectors[self.compared(case, image, location)]
            dist[image, location] = np.sort(np.square(compared - case.xq[image, location]).sum(axis=1))[:kappa]
        return dist

    def _check(self, case: SearchCase, hits: Hits, kappa: int) -> None:
        n, locations, _ = case.xq.shape
        what = f"shape={case.maps.shape[1:]}, kappa={kappa}"
        shapes = [(n, locations, kappa), (n, locations), (n, locations)]
        for name, shape, dtype in zip(("sq_dist", "row", "location"), shapes, ("float32", "int64", "int64"), strict=True):
            values = getattr(hits, name)
            assert (values.shape, values.dtype.name) == (shape, dtype), f"{name} is {values.dtype} {values.shape}; {what}"
        assert np.isfinite(hits.sq_dist).all(), f"a distance is not finite; {what}"
        assert (np.diff(hits.sq_dist, axis=2) >= 0).all(), f"distances are not ascending; {what}"
        for image, location in np.ndindex(n, locations):
            at = hits.row[image, location], hits.location[image, location]
            assert self.compared(case, image, location)[at], f"vector {at} is none to compare with; {what}"
        named = np.square(case.xq.astype(np.float64) - case.vectors[hits.row, hits.location]).sum(axis=2)
        message = f"a distance is not that of the vector that is named; {what}"
        np.testing.assert_allclose(hits.sq_dist[..., 0], named, rtol=1e-5, atol=1e-9, err_msg=message)
        brute = self._brute(case, kappa)
        assert (hits.sq_dist >= brute * (1 - 1e-5) - 1e-9).all(), f"a distance is below the smallest; {what}"
        if self.exact:
            message = f"a nearer vector was missed; {what}"
            np.testing.assert_allclose(hits.sq_dist, brute, rtol=self.rtol, atol=1e-9, err_msg=message)

    def _check_tie(self, case: SearchCase, hits: Hits, image: int, query: int) -> None:
        at = int(hits.row[image, query]), int(hits.location[image, query])
        equal = (case.vectors == case.vectors[at]).all(axis=2) & self.compared(case, image, query)
        if not self.orders_locations:  # only those at the same location must be told apart
            equal[:, np.arange(equal.shape[1]) != at[1]] = False
        row, location = np.argwhere(equal)[0].tolist()
        assert at == (row, location), f"of equal vectors {at} is named, and not {(row, location)}"


def assert_same_hits(found: Hits, expected: Hits) -> None:
    """Raise AssertionError unless two searches found the same, to the bit."""
    for name in ("sq_dist", "row", "location"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def _part(hits: Hits, images: slice) -> Hits:
    return Hits(hits.sq_dist[images], hits.row[images], hits.location[images])


@contextmanager
def _faiss_threads(threads: int) -> Iterator[None]:
    """Limit the threads that FAISS uses by itself; the limit before is put back."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
