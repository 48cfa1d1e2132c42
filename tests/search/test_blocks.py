"""Blocks are read, cached, announced, released and sampled as they should."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss.features.batch import Level
from spade_faiss.search import blocks as module
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from tests.support.searches import CountingSource

Floats = npt.NDArray[np.float32]

HEIGHT, WIDTH, CHANNELS = 3, 4, 2
CELLS = HEIGHT * WIDTH
BLOCK_BYTES = CELLS * CHANNELS * 4


def level(name: str = "level") -> Level:
    return Level(name, CHANNELS, stride=1, height=HEIGHT, width=WIDTH)


def maps(count: int) -> Floats:
    """Every vector is another one: its first number names the row, its second the location."""
    row, location = np.mgrid[:count, :CELLS]
    return np.stack([row, location], axis=-1).astype(np.float32)


def source_of(count: int, *, stored: bool = False) -> CountingSource:
    return CountingSource(maps(count), stored=stored)


def test_a_block_is_decoded_once_while_there_is_room() -> None:
    source = source_of(4)
    blocks = Blocks(level(), source, BlockCache(2 * BLOCK_BYTES))
    for row in (0, 1, 0, 1, 2, 1, 0):  # 2 throws 0 out
        np.testing.assert_array_equal(blocks(row), maps(4)[row])
    assert source.read_rows == [0, 1, 2, 0]
    assert (len(blocks), blocks.block_bytes) == (4, BLOCK_BYTES)


def test_without_a_cache_every_block_is_read_again() -> None:
    source = source_of(2)
    blocks = Blocks(level(), source)
    for _ in range(3):
        np.testing.assert_array_equal(blocks(1), maps(2)[1])
    assert source.read_rows == [1, 1, 1]


def test_what_is_not_cached_is_decoded_into_memory_that_is_there() -> None:
    """Maps of float16 are decoded, those of float32 are views."""
    halves, memory = ArraySource(maps(3).astype(np.float16)), np.empty((CELLS, CHANNELS), np.float32)
    for cache in (None, BlockCache[Floats](BLOCK_BYTES - 1)):
        blocks = Blocks(level(), halves, cache)
        assert blocks(1, memory) is memory
        np.testing.assert_array_equal(memory, maps(3)[1])
    # What is cached must not be written over by the next one.
    blocks = Blocks(level(), halves, BlockCache(3 * BLOCK_BYTES))
    cached = [blocks(row, memory) for row in range(3)]
    assert not any(np.shares_memory(block, memory) for block in cached)
    np.testing.assert_array_equal(cached, maps(3))
    assert [blocks(row, memory) is cached[row] for row in range(3)] == [True] * 3
    # Without memory to decode into, or where nothing is decoded, it is read.
    assert not np.shares_memory(Blocks(level(), halves)(2), memory)
    views = maps(3)
    assert np.shares_memory(Blocks(level(), ArraySource(views))(2, memory), views)


def test_blocks_as_they_are_stored() -> None:
    for stored in (maps(3), maps(3).astype(np.float16)):
        found = Blocks(level(), ArraySource(stored)).stored(1)
        assert found.dtype == stored.dtype
        assert np.shares_memory(found, stored)
    # A source that does not store them as one array decodes them, once while there is room.
    source = source_of(3)
    blocks = Blocks(level(), source, BlockCache(3 * BLOCK_BYTES))
    for _ in range(2):
        np.testing.assert_array_equal(blocks.stored(1), maps(3)[1])
    assert source.read_rows == [1]


def test_what_is_made_of_a_block_is_cached_beside_it() -> None:
    made = list[int]()

    def make() -> Floats:
        made.append(1)
        return np.ones(3, np.float32)

    blocks = Blocks(level(), source_of(3), BlockCache(100 * BLOCK_BYTES))
    for _ in range(2):
        blocks.cached("sums", 1, make)
    assert made == [1]
    blocks.cached("norms", 1, make)
    assert made == [1, 1]
    alone = Blocks(level(), source_of(3))
    for _ in range(2):
        alone.cached("sums", 1, make)
    assert made == [1, 1, 1, 1]


LOCATIONS = np.array([7, 0, 7, 11])


@pytest.mark.parametrize("cache", [None, 0, 10 * BLOCK_BYTES])
def test_some_locations_are_read_by_themselves_where_a_map_is_one_array(cache: int | None) -> None:
    source = source_of(3, stored=True)
    blocks = Blocks(level(), source, None if cache is None else BlockCache(cache))
    np.testing.assert_array_equal(blocks.take(1, LOCATIONS), maps(3)[1][LOCATIONS])
    assert (source.read_rows, source.stored_rows) == ([], [1])
    # What is here is not read again; taking does not bring it here.
    blocks(1)
    np.testing.assert_array_equal(blocks.take(1, LOCATIONS), maps(3)[1][LOCATIONS])
    assert source.stored_rows == ([1] if cache else [1, 1])
    assert source.read_rows == [1]


def test_some_locations_of_stored_halves_are_float32() -> None:
    taken = Blocks(level(), ArraySource(maps(3).astype(np.float16))).take(1, LOCATIONS)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, maps(3)[1][LOCATIONS])


@pytest.mark.parametrize("cache", [None, 0, 10 * BLOCK_BYTES])
def test_some_locations_come_from_the_whole_block_otherwise(cache: int | None) -> None:
    source = source_of(3)
    blocks = Blocks(level(), source, None if cache is None else BlockCache(cache))
    for _ in range(2):
        np.testing.assert_array_equal(blocks.take(1, LOCATIONS), maps(3)[1][LOCATIONS])
    assert source.read_rows == ([1] if cache else [1, 1])


def test_what_will_be_read_is_announced_unless_it_is_cached() -> None:
    source = source_of(3)
    blocks = Blocks(level(), source, BlockCache(BLOCK_BYTES))
    blocks.prefetch(1)
    blocks(1)
    blocks.prefetch(1)
    blocks.prefetch(0)
    assert source.prefetched == [1, 0]
    plain = Blocks(level(), source)
    plain(2)
    plain.prefetch(2)
    assert source.prefetched == [1, 0, 2]
    assert source.released == []


def test_a_source_need_not_listen() -> None:
    blocks = Blocks(level(), ArraySource(maps(1)))
    blocks.prefetch(0)
    blocks.release(0)
    assert blocks(0).shape == (CELLS, CHANNELS)


# Samples and the center


def places_of(sample: Floats) -> list[tuple[int, int]]:
    return [(int(row), int(location)) for row, location in sample]


@pytest.mark.parametrize(
    ("images", "count", "expected"),
    [
        (6, 18, 18),
        (6, 19, 24),  # as many of each
        (6, 1, 6),
        (6, 72, 72),
        (6, 10_000, 72),  # all there are
        (1, 5, 5),
        (520, 1000, 1000),  # of 500 images
        (520, 3, 500),
    ],
)
def test_a_sample_is_spread_over_the_images(images: int, count: int, expected: int) -> None:
    source = source_of(images)
    sample = Blocks(level(), source).sample(count, seed=1)
    assert (sample.shape, sample.dtype.name) == ((expected, CHANNELS), "float32")
    places = places_of(sample)
    assert len(set(places)) == expected  # none twice
    rows = [row for row, _ in places]
    assert len(set(rows)) == min(images, 500)
    assert {rows.count(row) for row in rows} == {expected // min(images, 500)}
    assert source.released == source.read_rows == sorted(set(rows))


def test_a_sample_is_the_same_at_every_call() -> None:
    """Whatever was read or cached before; another seed gives another one."""
    first = Blocks(level(), source_of(9)).sample(20, seed=1)
    cached = Blocks(level(), source_of(9, stored=True), BlockCache(100 * BLOCK_BYTES))
    cached(3)
    for _ in range(2):
        np.testing.assert_array_equal(cached.sample(20, seed=1), first)
    assert (cached.sample(20, seed=2) != first).any()


def test_a_sample_does_not_fill_the_cache() -> None:
    cache: BlockCache[Floats] = BlockCache(100 * BLOCK_BYTES)
    Blocks(level(), source_of(9), cache).sample(20, seed=1)
    assert not cache._blocks


def test_a_large_bank_is_sampled_from_some_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAMPLE_BLOCKS", 3)
    source = source_of(50)
    rows = {row for row, _ in places_of(Blocks(level(), source).sample(30, seed=1))}
    assert len(rows) == len(source.read_rows) == 3
    assert max(rows) > 10  # not merely the first


def test_the_center_is_the_mean_of_a_few_blocks_of_the_whole_bank() -> None:
    by_hand: list[tuple[int, list[int]]] = [(1, [0]), (3, [0, 1, 2]), (8, list(range(8))), (71, list(range(0, 71, 10)))]
    for count, rows in by_hand:
        source = source_of(count)
        blocks = Blocks(level(), source)
        np.testing.assert_allclose(blocks.center, [sum(rows) / len(rows), (CELLS - 1) / 2], rtol=1e-6)
        assert blocks.center.dtype == np.float32
        assert source.read_rows == rows
        # Once is enough.
        assert blocks.center is blocks.center
        assert source.read_rows == rows


def test_the_center_depends_on_the_bank_alone() -> None:
    rng = np.random.default_rng(1)
    stored = rng.normal(5, 1, (40, CELLS, CHANNELS)).astype(np.float32)
    expected = Blocks(level(), ArraySource(stored)).center
    cached = Blocks(level(), CountingSource(stored), BlockCache(1 << 20))
    for row in (3, 39, 0):
        cached(row)
    cached.sample(10, seed=3)
    np.testing.assert_array_equal(cached.center, expected)


# Blocks made from blocks


def doubled(made: list[int]) -> Callable[[int], Floats]:
    """Computes blocks of twice the channels, and notes which."""

    def compute(row: int) -> Floats:
        made.append(row)
        found: Floats = maps(3)[row].repeat(2, axis=1) * np.float32(2)
        return found

    return compute


def test_derived_blocks_share_the_cache() -> None:
    source, made = source_of(3), list[int]()
    blocks = Blocks(level(), source, BlockCache(3 * BLOCK_BYTES))
    derived = blocks.derived("doubled", doubled(made), 2 * CHANNELS)
    assert (derived.level.shape, derived.block_bytes, len(derived)) == ((HEIGHT, WIDTH, 2 * CHANNELS), 2 * BLOCK_BYTES, 3)
    for _ in range(2):
        np.testing.assert_array_equal(blocks(1), maps(3)[1])
        np.testing.assert_array_equal(derived(1), maps(3)[1].repeat(2, axis=1) * 2)
    assert (source.read_rows, made) == ([1], [1])
    # One budget for both: the next derived block makes both make room.
    derived(2)
    blocks(1)
    derived(1)
    assert (source.read_rows, made) == ([1, 1], [1, 2, 1])


def test_views_are_not_cached_but_what_is_made_of_them_is() -> None:
    source, made, cache = source_of(3), list[int](), BlockCache[Floats](10 * BLOCK_BYTES)
    source.decodes = False
    blocks = Blocks(level(), source, cache)
    derived = blocks.derived("doubled", doubled(made), 2 * CHANNELS)
    for _ in range(2):
        blocks(1)
        derived(1)
    assert (source.read_rows, made) == ([1, 1], [1])
    assert cache._bytes == derived.block_bytes
    blocks.prefetch(1)  # it will be read, whatever is cached of it
    assert source.prefetched == [1]


def test_derived_blocks_let_go_of_what_they_were_made_from() -> None:
    source = source_of(3)
    derived = Blocks(level(), source).derived("doubled", doubled([]), 2 * CHANNELS)
    derived.prefetch(1)
    derived.release(2)
    assert source.released == [2]
    assert derived.take(1, LOCATIONS).shape == (len(LOCATIONS), 2 * CHANNELS)


@pytest.mark.parametrize("name", ["codes", "by list"])
def test_no_name_of_a_level_is_that_of_derived_blocks(name: str) -> None:
    """Levels are named by the user: whatever the name, blocks of one cache are not taken for each other."""
    cache: BlockCache[Floats] = BlockCache(1 << 20)

    def blocks_of(level: Level, value: float) -> Blocks:
        return Blocks(level, CountingSource(np.full((1, CELLS, CHANNELS), value, np.float32)), cache)

    ours = blocks_of(level(), 1)
    derived = ours.derived(name, lambda row: np.full((CELLS, CHANNELS), 2, np.float32), CHANNELS)
    other = blocks_of(level(f"level {name}"), 3)
    assert [float(blocks(0)[0, 0]) for blocks in (ours, derived, other)] == [1, 2, 3]
