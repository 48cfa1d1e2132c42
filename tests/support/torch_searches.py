"""Searches by the torch engine, and data that is hard for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss.features.batch import Level
from spade_faiss.search.accelerator import Accelerator
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.engines.products import TorchProduct
from spade_faiss.search.engines.torch import TorchSearch
from spade_faiss.search.protocol import Hits
from spade_faiss.search.workers import Workers
from tests.support.oracle import product
from tests.support.searches import Case, brute


def blocks_of(case: Case, stored: Any = None) -> Blocks:
    _, locations, channels = case.blocks.shape
    level = Level("level", channels, stride=1, height=1, width=locations)
    return Blocks(level, ArraySource(case.blocks if stored is None else stored))


def search_of(
    blocks: Blocks, *, tile_bytes: int = 1 << 24, cache_bytes: int = 0, how: TorchProduct | None = None
) -> TorchSearch:
    accelerator = Accelerator(torch.device("cpu"), tile_bytes, cache_bytes)
    return TorchSearch(blocks, Workers(2), accelerator, how or TorchProduct())


def run(case: Case, kappa: int = 1, **settings: Any) -> Hits:
    return search_of(blocks_of(case), **settings)(case.xq, case.neighbors, kappa)


def larger(seed: int, n: int, rows: int, k: int, channels: int = 24) -> Case:
    """Maps of 13 x 11."""
    shapes = {"level": (13, 11, channels)}
    rng = np.random.default_rng(seed)
    maps, tests = product(seed, rows, shapes, 4), product(seed + 1, n, shapes, 4, defect=True)
    flat = (maps.levels["level"].reshape(rows, 143, channels), tests.levels["level"].reshape(n, 143, channels))
    return Case(*flat, np.stack([rng.permutation(rows)[:k] for _ in range(n)]))


def check(case: Case, hits: Hits, kappa: int) -> None:
    dist, nearest = brute(case, kappa)
    np.testing.assert_allclose(hits.sq_dist, dist, rtol=2e-6, atol=1e-12)
    first = [[min(places) for places in line] for line in nearest]
    off = 0
    for image, location in np.ndindex(hits.row.shape):
        at = int(hits.row[image, location]), int(hits.location[image, location])
        if at != first[image][location]:
            # Two that float32 cannot tell apart.
            q, (row, there) = case.xq[image, location], first[image][location]
            rivals = [np.square(case.blocks[r, x].astype(np.float64) - q).sum() for r, x in (at, (row, there))]
            assert rivals[0] == pytest.approx(rivals[1], rel=1e-6)
            off += 1
    assert off < 0.01 * hits.row.size


def crowded() -> Case:
    """One vector all over the background, and many that differ from it by less than a product can tell."""
    rng = np.random.default_rng(5)
    blocks = np.tile(rng.normal(size=32), (4, 200, 1))
    blocks[:, 100:] *= 1 + 1e-4 * rng.normal(size=(4, 100, 32))
    xq = np.concatenate([blocks[0, 90:110], blocks[1, 95:105] + 0.01 * rng.normal(size=(10, 32))])[None]
    return Case(blocks.astype(np.float32), xq.astype(np.float32), np.array([[3, 0, 1]]))
