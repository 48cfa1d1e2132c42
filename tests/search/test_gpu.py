"""On a CUDA card: what it finds is what the CPU finds, to the bit where nothing but additions in one order is left to chance.

`make gpu-proof` runs these, and so does `make test-gpu`; without a card they are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss import Backbone, Detector, doctor
from spade_faiss.core.device import Device
from spade_faiss.core.settings import Run
from spade_faiss.diagnostics.checks import RED
from spade_faiss.index.gpu import CardIndex, to_card
from spade_faiss.search.accelerator import Accelerator
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.engines.products import TorchProduct
from spade_faiss.search.engines.torch import TorchSearch, direct_sq_dist
from spade_faiss.search.recipe import load_recipe, recipe_names
from spade_faiss.search.workers import Workers
from spade_faiss.testing import assert_same_hits
from tests.support.oracle import bank_of, batch_of, product
from tests.support.searches import Case
from tests.support.torch_searches import blocks_of, check, crowded, larger
from tests.support.torch_searches import run as run_here

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")]

SHAPES = {"fine": (9, 11, 24), "coarse": (5, 6, 40)}


def run(case: Case, kappa: int = 1, *, tile_bytes: int = 1 << 26, cache_bytes: int = 0, how: TorchProduct | None = None) -> Any:
    accelerator = Accelerator(torch.device("cuda:0"), tile_bytes, cache_bytes)
    search = TorchSearch(blocks_of(case), Workers(2), accelerator, how or TorchProduct())
    return search(case.xq, case.neighbors, kappa)


@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_same_bits_as_on_the_cpu(k: int, kappa: int) -> None:
    case = larger(1, 3, 50, k, channels=256)
    expected = run_here(case, kappa)
    for tile_bytes, cache_bytes in ((1 << 26, 0), (1 << 20, 0), (1 << 26, 1 << 28), (1 << 26, 1 << 20)):
        assert_same_hits(run(case, kappa, tile_bytes=tile_bytes, cache_bytes=cache_bytes), expected)
    check(case, expected, kappa)


def test_what_rounding_hides_is_looked_at() -> None:
    case = crowded()
    assert_same_hits(run(case, 3), run_here(case, 3))


def test_a_product_is_off_by_less_than_is_assumed() -> None:
    """Otherwise nothing would be certified; TF32 would be off by a thousand times as much."""
    rng = np.random.default_rng(0)
    for channels in (24, 256, 1024, 1792):
        xb = torch.from_numpy(rng.normal(size=(3136, channels)).astype(np.float32)).cuda()
        q = torch.from_numpy(rng.normal(size=(1000, channels)).astype(np.float32)).cuda()
        norm, how = q.square().sum(1), TorchProduct()
        nearest = how.prepare(xb)(q, norm, 1).nearest.double()
        true = torch.cdist(q.double(), xb.double()).square().amin(1)
        bound = how.rounding(channels) * (norm + (norm.sqrt() + true.sqrt().float()) ** 2)
        assert bool(((nearest - true).abs() <= bound).all())


def test_direct_distances_are_those_of_the_cpu() -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 7, 256, 1000):
        q, x = (torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((99, channels), (99, 16, channels)))
        assert torch.equal(direct_sq_dist(q.cuda(), x.cuda()).cpu(), direct_sq_dist(q, x))


@pytest.mark.parametrize("kappa", [1, 3])
def test_bfloat16_finds_the_same(kappa: int) -> None:
    for case in (larger(10, 3, 7, 5, channels=256), crowded()):
        assert_same_hits(run(case, kappa, how=TorchProduct(half=True)), run_here(case, kappa))


def test_memory_that_ends() -> None:
    """An allocation that fails on the card: smaller steps, the same results."""
    case = larger(3, 3, 9, 5, channels=64)
    expected = run_here(case)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (48 << 20)) / total)
    try:
        huge = larger(4, 60, 9, 5, channels=64)
        assert_same_hits(run(huge, tile_bytes=1 << 30), run_here(huge))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same_hits(run(case), expected)


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name in ("exact", "location")])
def test_a_detector_on_a_card(tmp_path: Path, recipe: str) -> None:
    bank_of(tmp_path / "bank", product(1, 30, SHAPES, 16), input_size=(40, 43), dtype="float16")
    query = batch_of(product(2, 5, SHAPES, 16, defect=True))
    here = Detector.open(tmp_path / "bank", recipe=recipe).score_features(query)
    there = Detector.open(tmp_path / "bank", recipe=recipe, run=Run(device="cuda")).score_features(query)
    assert there.neighbor_ids.tolist() == here.neighbor_ids.tolist()
    np.testing.assert_allclose(there.image_score, here.image_score, rtol=1e-5)
    np.testing.assert_allclose(there.maps, here.maps, rtol=1e-4)


@pytest.mark.skipif(not hasattr(import_faiss(), "StandardGpuResources"), reason="FAISS's GPU build is not installed")
def test_an_image_index_on_a_card() -> None:
    rng = np.random.default_rng(0)
    index = import_faiss().IndexFlatL2(64)
    index.add(rng.normal(size=(1000, 64)).astype(np.float32))
    xq = rng.normal(size=(9, 64)).astype(np.float32)
    there = to_card(index, Device("cuda"))
    assert isinstance(there, CardIndex)
    (D, I), (expected, ids) = there.search(xq, 7), index.search(xq, 7)
    np.testing.assert_allclose(D, expected, rtol=1e-4)
    np.testing.assert_array_equal(I, ids)


def test_a_backbone_on_a_card(backbone: Backbone) -> None:
    from spade_faiss import load_backbone

    there = load_backbone("efficientnet_lite0", preprocess=backbone.source.preprocess, device="cuda")
    assert there.source == backbone.source
    x = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    (embedding, levels), (expected, maps) = there(x), backbone(x)
    np.testing.assert_allclose(embedding, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    for name, level in levels.items():
        np.testing.assert_allclose(level, maps[name], rtol=1e-3, atol=1e-3 * np.abs(maps[name]).max())


def test_the_doctor_is_content() -> None:
    found = doctor("cuda")
    assert found.state != RED, [check for check in found.checks if check.state == RED]
    speed = next(check for check in found.checks if check.name == "speed")
    assert load_recipe("exact").with_query({"engine": speed.numbers["fastest"]})
