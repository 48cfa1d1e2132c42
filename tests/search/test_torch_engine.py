"""The exact search as torch operations, on the CPU: the winners of brute force in float64, whatever the steps and memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss import Detector
from spade_faiss.core.device import CPU
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from spade_faiss.search.accelerator import Accelerator, Uploaded, open_accelerator
from spade_faiss.search.engines.faiss import FaissSearch
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.engines.products import GROUP, TorchProduct
from spade_faiss.search.engines.torch import TorchSearch, direct_sq_dist
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe
from spade_faiss.search.workers import Workers
from spade_faiss.testing import assert_same_hits
from tests.support.oracle import bank_of, batch_of, product
from tests.support.searches import Case, brute, cases, structured
from tests.support.torch_searches import blocks_of, check, crowded, larger, run, search_of
from tests.support.vectors import brute as all_distances
from tests.support.vectors import near_duplicates

# Steps of a size that neither 42 locations nor the queries of several images are a multiple of.
SMALL = 6_000


@pytest.mark.parametrize(("k", "tile_bytes"), [(1, 1), *((k, size) for k in (1, 5, 50) for size in (SMALL, 30_001, 1 << 24))])
def test_brute_force(k: int, tile_bytes: int) -> None:
    case = larger(1, 2, 50, k)
    check(case, run(case, tile_bytes=tile_bytes), 1)


@pytest.mark.parametrize("kappa", [1, 3, 42, 43, 100, 4 * 42])
def test_several_nearest(kappa: int) -> None:
    """Up to all vectors of the gallery, and past those of one block."""
    case = structured(1, 5, 6, 4)
    for tile_bytes in (SMALL, 1 << 24):
        check(case, run(case, kappa, tile_bytes=tile_bytes), kappa)


@pytest.mark.parametrize("channels", [24, 1024])
@pytest.mark.parametrize("half", [False, True])
def test_sums_that_err_to_one_side_hide_no_location(half: bool, channels: int) -> None:
    """Additions of equal numbers round alike: products of equal vectors differed by more than was allowed for."""
    blocks = np.stack([np.full((196, channels), value, np.float32) for value in (1, 3, 2, 2, 2)])
    xq = np.stack([np.full((196, channels), value, np.float32) for value in (1.001, 1.002, 2.999)])
    case = Case(blocks, xq, np.tile(np.arange(5), (3, 1)))
    hits = run(case, how=TorchProduct(half=half))
    assert hits.row.tolist() == [[0] * 196, [0] * 196, [1] * 196]
    assert not hits.location.any()


def test_half_precision_blocks_are_decoded_on_the_device() -> None:
    case = larger(3, 2, 8, 5)
    stored = case.blocks.astype(np.float16)
    decoded = replace(case, blocks=stored.astype(np.float32))
    search = search_of(blocks_of(decoded, stored), cache_bytes=3 * stored[0].nbytes)
    hits = search(case.xq, case.neighbors, 1)
    check(decoded, hits, 1)
    assert_same_hits(hits, run(decoded))
    cached = search._accelerator.cache._blocks
    assert [block.tensor.dtype for block in cached.values()] == [torch.float16] * 3


@given(cases(), st.data())
def test_whole_numbers_are_exact_and_ties_go_to_the_first(case: Case, data: st.DataObject) -> None:
    kappa = data.draw(st.integers(1, case.neighbors.shape[1] * case.xq.shape[1]))
    hits = run(case, kappa, tile_bytes=data.draw(st.sampled_from([1, 500, 1 << 20])))
    dist, nearest = brute(case, kappa)
    np.testing.assert_array_equal(hits.sq_dist, dist)
    for image, location in np.ndindex(hits.row.shape):
        at = int(hits.row[image, location]), int(hits.location[image, location])
        assert at == min(nearest[image][location])


@pytest.mark.parametrize("kappa", [1, 3])
def test_what_rounding_hides_is_looked_at(kappa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = crowded()
    found = run(case, kappa)
    check(case, found, kappa)
    assert_same_hits(found, run(case, kappa, tile_bytes=SMALL))
    assert not found.sq_dist[0, :20, 0].any()
    # The data does need it: the first candidates alone are others.
    monkeypatch.setattr(TorchProduct, "rounding", lambda self, channels: -1.0)
    first = run(case, kappa)
    assert (first.sq_dist >= found.sq_dist).all()
    assert (first.location != found.location).any()


def test_near_duplicates() -> None:
    xq, xb = near_duplicates()
    case = Case(xb[None], xq[None], np.zeros((1, 1), np.int64))
    np.testing.assert_allclose(run(case, 3).sq_dist[0], np.sort(all_distances(xq, xb), axis=1)[:, :3], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kappa", [1, 3])
def test_results_do_not_depend_on_steps_batch_order_or_cache(kappa: int) -> None:
    case = structured(4, 7, 8, 5)
    expected = run(case, kappa)
    for settings in ({"tile_bytes": 1}, {"tile_bytes": SMALL}, {"cache_bytes": 1 << 20}, {"cache_bytes": 2000}):
        assert_same_hits(run(case, kappa, **settings), expected)
    assert_same_hits(run(Case(case.blocks, case.xq, case.neighbors[:, ::-1].copy()), kappa), expected)
    for image in range(7):
        alone = run(Case(case.blocks, case.xq[image : image + 1], case.neighbors[image : image + 1]), kappa)
        for name in ("sq_dist", "row", "location"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(expected, name)[image])


def test_it_is_the_search_of_the_cpu() -> None:
    """FaissSearch may take a rival within 1e-4 for the nearest, and any of equal vectors in an image."""
    case = larger(6, 3, 7, 5)
    there, here = FaissSearch(blocks_of(case), Workers(2))(case.xq, case.neighbors, 2), run(case, 2)
    np.testing.assert_allclose(here.sq_dist, there.sq_dist, rtol=2e-4, atol=1e-12)
    assert (here.sq_dist <= there.sq_dist * (1 + 1e-6)).all()
    assert np.mean(here.row == there.row) > 0.99


class Scarce(TorchProduct):
    """A product on a device whose memory ends: larger ones than `most` fail, after the first."""

    def __init__(self, most: int) -> None:
        super().__init__()
        object.__setattr__(self, "most", most)
        object.__setattr__(self, "failed", [])
        object.__setattr__(self, "steps", [])

    def prepare(self, xb: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, int], Any]:
        nominate = super().prepare(xb)

        def limited(q: torch.Tensor, norm: torch.Tensor, kappa: int) -> Any:
            self.steps.append(len(q) * len(xb))  # type: ignore[attr-defined]
            if len(q) * len(xb) > self.most and len(self.steps) > 1:  # type: ignore[attr-defined]
                self.failed.append(len(q))  # type: ignore[attr-defined]
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
            return nominate(q, norm, kappa)

        return limited


@pytest.mark.parametrize("kappa", [1, 3])
def test_out_of_memory_means_smaller_steps_and_the_same_results(kappa: int, caplog: pytest.LogCaptureFixture) -> None:
    """A block whose search failed half-way is begun anew: nothing of it may count twice."""
    case = structured(8, 5, 6, 4)
    expected = run(case, kappa)
    scarce = Scarce(most=2000)
    search = search_of(blocks_of(case), tile_bytes=30_001, cache_bytes=1 << 20, how=scarce)
    with caplog.at_level(logging.WARNING):
        assert_same_hits(search(case.xq, case.neighbors, kappa), expected)
    assert len(scarce.failed) == 1  # type: ignore[attr-defined]
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "cpu is out of memory: going on in smaller steps (CUDA out of memory. Tried to allocate 2 GiB)"
    )
    assert search._accelerator.tile_bytes == 7500


def test_out_of_memory_again_is_an_error() -> None:
    case = structured(8, 5, 6, 4)
    with pytest.raises(InputError, match=r"out of memory even in smaller steps .* use --device cpu"):
        run(case, tile_bytes=30_001, how=Scarce(most=0))


def test_a_kept_block_is_read_and_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = structured(9, 4, 6, 4)
    copied: list[int] = []
    before = Accelerator.upload

    def upload(self: Accelerator, array: Any) -> Uploaded:
        copied.append(array.nbytes)
        return before(self, array)

    monkeypatch.setattr(Accelerator, "upload", upload)
    search = search_of(blocks_of(case), cache_bytes=6 * case.blocks[0].nbytes)
    for _ in range(3):
        search(case.xq, case.neighbors, 1)
    assert copied.count(case.blocks[0].nbytes) == len(np.unique(case.neighbors))


def test_direct_distances_depend_on_nothing_but_the_vectors() -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 2, 3, 7, 40, 257):
        q, x = (torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((9, channels), (9, 5, channels)))
        together = direct_sq_dist(q, x)
        truth = np.square(x.numpy().astype(np.float64) - q.numpy()[:, None]).sum(-1)
        np.testing.assert_allclose(together.numpy(), truth, rtol=1e-6)
        for i, j in np.ndindex(9, 5):
            assert direct_sq_dist(q[i : i + 1], x[i : i + 1, j : j + 1])[0, 0] == together[i, j]
    assert not direct_sq_dist(q, q[:, None]).any()


@pytest.mark.parametrize("kappa", [1, 3])
def test_a_rounded_product_finds_the_same(kappa: int) -> None:
    """What bfloat16 loses is known, and allowed for."""
    for case in (larger(10, 3, 7, 5, channels=64), crowded(), structured(1, 5, 6, 4)):
        for settings in ({}, {"tile_bytes": SMALL}):
            assert_same_hits(run(case, kappa, how=TorchProduct(half=True), **settings), run(case, kappa))


def test_half_of_what_a_rounded_product_loses_is_too_little() -> None:
    """In each channel the query loses the same, and its nearest row lies along that: it seems farther than the origin is."""
    channels = 64
    q = np.full(channels, 1.0038)  # 1 in bfloat16
    blocks = np.zeros((1, 80, channels))
    blocks[0, 64:72] = np.where(np.arange(channels) < 26, 2 + 2**-6, 2)  # as it is in bfloat16
    blocks[0, 16:40] = 50  # out of the way
    # The center stays where it is.
    blocks[0, 40:64], blocks[0, 72:] = -50, -blocks[0, 64]
    case = Case(blocks.astype(np.float32), np.tile(q, (1, 80, 1)).astype(np.float32), np.zeros((1, 1), np.int64))
    assert np.square(case.blocks[0].astype(np.float64) - q).sum(1).argmin() == 64
    assert (run(case, how=TorchProduct(half=True)).location == 64).all()
    assert (run(case, how=TorchProduct(half=True, margin=0.5)).location != 64).all()


def test_groups_cover_a_block_that_they_do_not_divide() -> None:
    xb = torch.from_numpy(np.random.default_rng(1).normal(size=(2 * GROUP + 3, 4)).astype(np.float32))
    nominations = TorchProduct().prepare(xb)(xb[:5], xb[:5].square().sum(1), 1)
    for attempt in (0, 1, 9):
        rows, beyond = nominations.candidates(torch.arange(5), attempt)
        assert rows.max() < len(xb)
    assert all(set(line[line >= 0].tolist()) == set(range(len(xb))) for line in rows)
    assert beyond.isinf().all()


# The engine as a setting


def engine(**settings: int | float | str) -> Any:
    chosen = resolve_recipe(Recipe(name="r", build=Build(), query=Query(settings=settings)))
    case = structured(1, 2, 3, 2)
    return chosen.method.open(blocks_of(case), Workers(1), chosen.build, chosen.query, None)


def test_the_engine_is_a_query_setting() -> None:
    assert isinstance(engine(), NativeSearch if usable_simd_level() else FaissSearch)
    assert isinstance(engine(engine="faiss"), FaissSearch)
    assert isinstance(engine(engine="torch"), TorchSearch)
    assert engine(engine="torch", product="bfloat16")._product == TorchProduct(half=True)
    for settings, message in (
        ({"engine": "cuda"}, "engine='cuda' is not one of auto, native, faiss, torch$"),
        ({"product": "bfloat16"}, "product='bfloat16' needs a device, or engine='torch'"),
        ({"engine": "native", "product": "bfloat16"}, "product='bfloat16' needs engine='torch'"),
    ):
        with pytest.raises(InputError, match=message):
            engine(**settings)


@pytest.mark.parametrize("fusion", ["mean", "concat"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_detector_searches_by_torch(tmp_path: Any, dtype: str, fusion: str) -> None:
    shapes = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
    bank_of(tmp_path / "bank", product(1, 9, shapes, 16), input_size=(40, 43), dtype=dtype)
    query = batch_of(product(2, 3, shapes, 16, defect=True))
    by_torch = load_recipe("exact").with_query({"engine": "torch"})
    here = Detector.open(tmp_path / "bank", recipe=by_torch, method=Method(fusion=fusion)).score_features(query)
    there = Detector.open(tmp_path / "bank", method=Method(fusion=fusion)).score_features(query)
    np.testing.assert_allclose(here.maps, there.maps, rtol=1e-4)
    assert isinstance(Detector.open(tmp_path / "bank", recipe=by_torch)._searches["fine"].search, TorchSearch)


def test_rounded_products_of_the_process_are_refused() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(InputError, match=r"set to 'high' precision .* needs 'highest'"):
            open_accelerator(CPU)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_memory_is_counted(tmp_path: Any) -> None:
    """What a search says that it holds covers what torch allocates for it, apart from what every call needs."""
    case = larger(2, 4, 6, 5, channels=96)
    search = search_of(blocks_of(case), tile_bytes=1 << 19)
    search(case.xq, case.neighbors, 1)  # what is made once
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        search(case.xq, case.neighbors, 1)
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0 < most <= search.working_bytes(4, 5, 1)
