"""What a card's memory is spent on, and what bounds a search there: numbers worked out by hand, and what must always hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.features.batch import Level
from spade_faiss.search.gpu_memory import (
    FAISS_BYTES,
    NETWORK_BYTES,
    Job,
    Machine,
    fit_tile,
    index_fits,
    plan_gpu,
    split_memory,
)

GiB = 1 << 30
WRN50 = (Level("layer1", 256, 4, 56, 56), Level("layer2", 512, 8, 28, 28), Level("layer3", 1024, 16, 14, 14))
# Of float16 values.
IMAGE_BYTES = 2 * (3136 * 256 + 784 * 512 + 196 * 1024)
CARD = Machine(
    name="a card",
    memory_bytes=24 * GiB,
    flops=40e12,
    memory_bytes_per_s=800e9,
    bus_bytes_per_s=20e9,
    disk_bytes_per_s=2e9,
    host_bytes=64 * GiB,
)
JOB = Job(levels=WRN50, embedding_dim=2048, normals=10_000, k_gallery=50)


def test_memory_is_divided() -> None:
    assert split_memory(24 * GiB).tile_bytes == GiB
    assert split_memory(4 * GiB).tile_bytes == GiB // 2
    assert split_memory(0).tile_bytes == 64 << 20
    assert split_memory(0).cache_bytes == 0
    assert split_memory(24 * GiB).cache_bytes == 24 * GiB - GiB - NETWORK_BYTES - FAISS_BYTES


@given(st.integers(0, 1 << 38))
def test_memory_is_never_spent_twice(free: int) -> None:
    memory = split_memory(free)
    assert memory.cache_bytes == 0 or memory.cache_bytes + memory.tile_bytes + NETWORK_BYTES + FAISS_BYTES == free


def test_a_step_worked_out_by_hand() -> None:
    # 4 bytes of each of 3136 products, 392 minima and 256 channels of a query; twice the block's 3136 x 256 floats.
    each, block = 4 * (3136 + 392 + 256), 2 * 4 * 3136 * 256
    assert fit_tile(block + 1000 * each, 10_000, 3136, 256, 8).queries == 1000
    assert fit_tile(block + 1000 * each - 1, 10_000, 3136, 256, 8).queries == 999
    assert fit_tile(block + 1000 * each, 700, 3136, 256, 8).queries == 700
    # Fewer than 256 queries at a time would be: half of the rows.
    assert fit_tile(block + 255 * each, 10_000, 3136, 256, 8).rows == 1568


@given(st.integers(0, 1 << 31), st.integers(1, 100_000), st.integers(1, 20_000), st.integers(1, 4096))
def test_a_step_fits_and_is_never_empty(tile_bytes: int, queries: int, rows: int, channels: int) -> None:
    tile = fit_tile(tile_bytes, queries, rows, channels, 8)
    assert 1 <= tile.queries <= queries
    assert 1 <= tile.rows <= rows
    held = 8 * tile.rows * channels + 4 * tile.queries * (tile.rows + -(-tile.rows // 8) + channels)
    assert held <= tile_bytes or tile.queries == 1
    larger = fit_tile(2 * tile_bytes, queries, rows, channels, 8)
    assert larger.queries * larger.rows >= tile.queries * tile.rows * 0.5


def test_an_index_takes_at_most_half_of_what_blocks_could_take() -> None:
    room = split_memory(24 * GiB).cache_bytes // 2
    assert index_fits(room, 24 * GiB)
    assert not index_fits(room + 1, 24 * GiB)
    assert not index_fits(1, 0)


def test_a_plan_worked_out_by_hand() -> None:
    plan = plan_gpu(CARD, JOB, 8)
    assert plan.flop == 2 * 50 * (3136**2 * 256 + 784**2 * 512 + 196**2 * 1024) == pytest.approx(287e9, rel=1e-2)
    assert plan.index_bytes == 10_000 * 2048 * 4
    room = 24 * GiB - GiB - NETWORK_BYTES - FAISS_BYTES - plan.index_bytes
    assert plan.cached == room // IMAGE_BYTES == 8091
    assert plan.blocks == pytest.approx(10_000 * (1 - 0.995**16))  # 770.6 for 16 images that ask for 800
    assert plan.bus_bytes == pytest.approx(770.6 / 16 * (1 - 0.8091) * IMAGE_BYTES + 2 * IMAGE_BYTES, rel=1e-3)
    assert plan.disk_bytes == 0  # 28 GB of blocks in 64 GiB of memory
    assert plan.seconds["compute"] == pytest.approx(287e9 / 40e12, rel=1e-2)
    assert plan.seconds["memory"] == pytest.approx(2 * 4 * 50 * (3136**2 + 784**2 + 196**2) / 800e9)
    assert plan.seconds["PCIe"] == plan.bus_bytes / 20e9
    assert plan.bound == "compute"


def test_what_bounds_a_search() -> None:
    assert plan_gpu(replace(CARD, memory_bytes_per_s=100e9), JOB, 8).bound == "memory"
    assert plan_gpu(replace(CARD, memory_bytes=4 * GiB, bus_bytes_per_s=2e9), JOB, 8).bound == "PCIe"
    assert plan_gpu(CARD, replace(JOB, normals=1_000_000), 8).bound == "disk"


@given(st.integers(0, 1 << 37), st.integers(1, 10**7), st.integers(1, 50), st.integers(0, 1 << 40))
def test_a_plan_never_promises_too_much(memory: int, normals: int, k: int, host: int) -> None:
    job = replace(JOB, normals=max(normals, k), k_gallery=k)
    plan = plan_gpu(replace(CARD, memory_bytes=memory, host_bytes=host), job, 8)
    assert 0 <= plan.cached <= job.normals
    if plan.cached:
        assert plan.cached * IMAGE_BYTES + plan.index_bytes + split_memory(memory).tile_bytes <= memory
    assert k * (1 - 1e-6) <= plan.blocks <= min(job.normals, plan.batch * k) * (1 + 1e-6)
    assert 0 <= plan.disk_bytes <= plan.bus_bytes
    more = plan_gpu(replace(CARD, memory_bytes=2 * memory, host_bytes=host), job, 8)
    assert more.index_bytes > plan.index_bytes or more.bus_bytes <= plan.bus_bytes * (1 + 1e-6)
