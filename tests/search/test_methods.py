"""What holds for several search methods beside the conformance suite, and settings that they refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spade_faiss.core.errors import InputError
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Query, Recipe
from spade_faiss.search.workers import Workers
from spade_faiss.testing import EncodedInMemory, SearchCase, assert_same_hits
from tests.support.methods import Floats, Shape, case_of, run, search_of, whole_cases
from tests.support.recipes import (
    ALL,
    CLUSTERS,
    COMPACT,
    ENCODING,
    EXACT,
    HISTORY,
    IVF,
    LOCATION,
    OF_NEIGHBORS,
    built,
    by_name,
    queried,
)
from tests.support.searches import CountingSource


@by_name(OF_NEIGHBORS)
@given(case=whole_cases(), data=st.data())
@settings(max_examples=40)
def test_ties_between_images_go_to_the_smaller_row(recipe: Recipe, case: SearchCase, data: st.DataObject) -> None:
    """Vectors that are equal to the bit, in several images: of those, the one with the smallest row is named."""
    assume(case.maps.size > case.maps.shape[3])  # a single vector in all is not enough to learn from
    maps = case.maps.copy()
    for copy in range(1, len(maps)):
        maps[copy] = maps[data.draw(st.integers(0, copy))]
    case = SearchCase(maps, case.xq, case.neighbors)
    recipe = built(recipe, lists=1) if recipe is IVF else built(recipe, dims=2) if recipe is COMPACT else recipe
    kappa = data.draw(st.integers(1, min(3, case.neighbors.shape[1])))
    hits = run(case, queried(recipe, rerank=kappa) if recipe.build.gallery == "compact" else recipe, kappa)
    for image, query in np.ndindex(hits.row.shape):
        found = case.vectors[hits.row[image, query], hits.location[image, query]]
        holding = [row for row in case.neighbors[image] if (case.vectors[row, hits.location[image, query]] == found).all()]
        assert hits.row[image, query] == min(holding)


def smooth(seed: int, rows: int, shape: Shape) -> Floats:
    """Maps that change slowly from place to place and from image to image, without near duplicates."""
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    y, x = np.mgrid[:height, :width][..., None] / 3
    phase, mix = rng.uniform(0, 6, (rows, 1, 1, 4)), np.random.default_rng(0).normal(size=(8, channels))
    waves = [np.sin(y * [1, 2, 1.5, 0.5] + phase), np.cos(x * [2, 1, 0.7, 1.2] + phase[..., ::-1])]
    noise = 0.1 * rng.normal(size=(rows, *shape))
    return (np.concatenate(waves, axis=-1) @ mix + 3 + noise).astype(np.float32)


@by_name([EXACT, LOCATION, queried(IVF, nprobe=1), queried(COMPACT, rerank=1), HISTORY])
@pytest.mark.parametrize("shape", [(6, 9, 16), (14, 14, 40)])
def test_an_image_of_the_gallery_is_found_at_distance_zero(recipe: Recipe, shape: Shape) -> None:
    maps = smooth(1, 8, shape)
    neighbors = np.array([[5, 1, 0], [7, 6, 2]])
    case = SearchCase(maps, maps[[1, 2]].reshape(2, -1, shape[2]), neighbors)
    hits = run(case, recipe, 2)
    assert not hits.sq_dist[..., 0].any()
    assert (hits.row == np.array([[1], [2]])).all()
    np.testing.assert_array_equal(hits.location, np.tile(np.arange(shape[0] * shape[1]), (2, 1)))
    assert hits.sq_dist[..., 1].all()


@by_name(ALL)
def test_large_blocks_in_memory_that_is_used_again(recipe: Recipe) -> None:
    """Nothing of a block is read after the next one was decoded to its place, also where a job is spread over the workers."""
    threads = 3
    case = case_of(seed=9, n=6, rows=12, k=12, shape=(30, 29, 40))
    halves = case.vectors.astype(np.float16)
    search = search_of(recipe, Blocks(case.level, ArraySource(halves), BlockCache()), threads)
    decoded = ArraySource(halves.astype(np.float32))
    expected = search_of(recipe, Blocks(case.level, decoded), threads)(case.xq, case.neighbors, 2)
    for _ in range(2):
        assert_same_hits(search(case.xq, case.neighbors, 2), expected)


@by_name(OF_NEIGHBORS)
@pytest.mark.parametrize("stored", [False, True])
def test_only_what_was_asked_for_is_read(recipe: Recipe, stored: bool) -> None:
    case = case_of(seed=8, n=3, rows=9, k=3)
    neighbors = np.array([[0, 3, 5], [5, 3, 7], [3, 7, 0]])
    source = CountingSource(case.vectors, stored=stored)
    blocks, chosen = Blocks(case.level, source), resolve_recipe(recipe)
    encoded = EncodedInMemory(chosen.method, blocks, chosen.build) if chosen.method.train else None
    search = chosen.method.open(blocks, Workers(2), chosen.build, chosen.query, encoded)
    search(case.xq, neighbors, 1)  # what it learns of the bank, from whatever blocks, it learns once
    source.forget()
    if encoded is not None:
        encoded.requested.clear()
    search(case.xq, neighbors, 1)
    # Of windows in stored maps, the kernel knows where these are since the first search.
    read = source.prefetched if recipe is LOCATION and stored else [*source.read_rows, *source.stored_rows]
    assert set(read) == set(source.released) == {0, 3, 5, 7}
    if encoded is not None and recipe is not CLUSTERS:  # for the whole bank alone
        assert encoded.requested == {0, 3, 5, 7}
    if recipe is COMPACT and stored:
        assert source.read_rows == []  # a few vectors of a block are worth no more than their own reading


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 8), (3, 3, 8)])
@by_name([built(IVF, lists=1), queried(COMPACT, rerank=1), built(HISTORY, lists=1)])
def test_little_is_enough_to_learn_from(recipe: Recipe, shape: Shape) -> None:
    """One image of one location, or of the same vector everywhere."""
    maps = np.ones((1, *shape), np.float32)
    xq = np.concatenate([maps, maps + 1]).reshape(2, -1, shape[2])
    hits = run(SearchCase(maps, xq, np.zeros((2, 1), np.int64)), recipe)
    np.testing.assert_allclose(hits.sq_dist[..., 0], np.repeat([[0], [8]], shape[0] * shape[1], axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (queried(LOCATION, radius=-1), r"recipe 'location': query: settings: radius=-1 must be an integer of at least 0"),
        (built(LOCATION, radius=1), "recipe 'location': build: settings: unknown key 'radius'"),
        (built(IVF, lists=0), "lists=0 must be an integer of at least 1"),
        (built(IVF, train_vectors=7), "train_vectors=7 must be an integer of at least 8"),
        (queried(IVF, nprobe=0), "nprobe=0 must be an integer of at least 1"),
        (built(IVF, nprobe=1), "recipe 'ivf': build: settings: unknown key 'nprobe'"),
        (built(COMPACT, dims=1), "dims=1 must be an integer of at least 2"),
        (built(COMPACT, train_vectors=999), "train_vectors=999 must be an integer of at least 1000"),
        (queried(COMPACT, rerank=0), "rerank=0 must be an integer of at least 1"),
        (built(HISTORY, lists=257), "lists=257 must be at most 256"),
        (built(HISTORY, train_images=2), "train_images=2 must be an integer of at least 3"),
        (replace(IVF, query=Query(settings={"nprobe": 1.5})), "nprobe=1.5 is of type float, expected int"),
    ],
)
def test_settings_out_of_range(recipe: Recipe, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_recipe(recipe)


@by_name(ALL)
def test_a_method_says_what_it_finds(recipe: Recipe) -> None:
    method = resolve_recipe(recipe).method
    assert method.definition.endswith(".")
    assert (method.train is None) == (method.encode is None) == (recipe not in ENCODING)
