"""The cache of blocks drops the least recently used, and counts right, by hand and under threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.search.cache import BlockCache

Floats = npt.NDArray[np.float32]


def numbers(count: int) -> Floats:
    return np.zeros(count, np.float32)


def held(cache: BlockCache[Floats], keys: str) -> str:
    """Those of the keys that the cache holds; asking for one is a use of it."""
    return "".join(key for key in keys if cache.get((key, 0)) is not None)


def test_the_least_recently_used_blocks_make_room() -> None:
    cache: BlockCache[Floats] = BlockCache(100)
    for key, count in (("a", 10), ("b", 10), ("c", 5)):
        cache.put((key, 0), numbers(count))  # 40 + 40 + 20 bytes: full to the last
    assert held(cache, "abc") == "abc"
    assert held(cache, "a") == "a"  # now b was not used for longest
    cache.put(("d", 0), numbers(1))
    assert held(cache, "bcad") == "cad"
    # 60 bytes more than fit: c, used before a and d, makes room first, then a; that is enough.
    cache.put(("e", 0), numbers(24))
    assert held(cache, "abcde") == "de"


def test_a_key_is_a_level_and_a_row() -> None:
    cache: BlockCache[Floats] = BlockCache(1000)
    block = numbers(3)
    cache.put(("a", 1), block)
    assert cache.get(("a", 1)) is block
    assert cache.get(("a", 0)) is None
    assert cache.get(("b", 1)) is None


def test_what_is_there_is_not_counted_twice() -> None:
    """Two threads may decode the same block: the second one's copy is not added, nor its bytes."""
    cache: BlockCache[Floats] = BlockCache(100)
    first = numbers(10)
    cache.put(("a", 0), first)
    for _ in range(10):
        cache.put(("a", 0), numbers(10))
    cache.put(("b", 0), numbers(15))
    assert held(cache, "ab") == "ab"
    assert cache.get(("a", 0)) is first


def test_a_block_that_does_not_fit_throws_nothing_out() -> None:
    cache: BlockCache[Floats] = BlockCache(100)
    cache.put(("a", 0), numbers(25))
    cache.put(("b", 0), numbers(26))
    assert held(cache, "ab") == "a"


def test_no_capacity_holds_nothing() -> None:
    cache: BlockCache[Floats] = BlockCache()
    cache.put(("a", 0), numbers(1))
    assert held(cache, "a") == ""
    cache.capacity = 4  # as the detector does, once it knows
    cache.put(("a", 0), numbers(1))
    assert held(cache, "a") == "a"


@given(st.integers(0, 60), st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_the_cache_is_a_list_by_use(capacity: int, calls: list[tuple[bool, int]]) -> None:
    """Against a plain list, the longest unused first; a key's size is its number."""
    cache, listed = BlockCache[Floats](4 * capacity), list[int]()
    for is_put, key in calls:
        if is_put:
            cache.put(("x", key), numbers(key))
            if key not in listed and key <= capacity:
                listed.append(key)
                while sum(listed) > capacity:
                    listed.pop(0)
        else:
            assert (cache.get(("x", key)) is not None) == (key in listed)
            if key in listed:
                listed.remove(key)
                listed.append(key)
    assert [key for _, key in cache._blocks] == listed
    assert cache._bytes == 4 * sum(listed)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_threads_keep_the_count_right() -> None:
    cache, threads = BlockCache[Floats](1000), 8
    together = threading.Barrier(threads)

    def hammer(seed: int) -> None:
        rng = np.random.default_rng(seed)
        together.wait(60)
        for key in rng.integers(0, 60, 3000).tolist():
            if (block := cache.get(("x", key))) is None:
                cache.put(("x", key), np.full(key, key, np.float32))
            else:
                assert block.shape == (key,)
                assert (block == key).all()

    with ThreadPoolExecutor(threads) as pool:
        for task in [pool.submit(hammer, seed) for seed in range(threads)]:
            task.result()
    assert cache._bytes == sum(block.nbytes for block in cache._blocks.values()) <= 1000
    assert cache._blocks


def test_what_is_not_there_is_made_once() -> None:
    cache, made = BlockCache[Floats](100), list[int]()

    def make() -> Floats:
        made.append(1)
        return numbers(10)

    first = cache.get_or_make(("a", 0), make)
    assert cache.get_or_make(("a", 0), make) is first
    assert made == [1]
    cache.clear()
    assert cache.get_or_make(("a", 0), make) is not first
    assert made == [1, 1]
