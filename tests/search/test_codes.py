"""A bank of codes is searched as the bank of the vectors that its codes stand for, to the bit, by every method and engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector, FeatureBatch
from spade_faiss.core.declaring import ALL as EVERY
from spade_faiss.core.roi import Roi
from spade_faiss.core.settings import Method
from spade_faiss.core.store import Store
from spade_faiss.features.layout import Layout
from spade_faiss.features.roi import cells_with_any
from spade_faiss.index.build import build_index
from spade_faiss.search.levels import open_blocks
from spade_faiss.search.native.extension import why_not
from spade_faiss.search.recipe import Query, Recipe
from spade_faiss.workflows.calibrate import calibrate
from tests.support.oracle import Features, bank_of, batch_of, levels_of, names, pixel_sq_distances, product
from tests.support.recipes import ALL, ENCODING, EXACT, FAISS, GLOBAL, HISTORY, LOCATION, by_name
from tests.support.vectors import brute

# The second is resized where both are joined; odd sizes, so that nothing is aligned by chance.
SHAPES = {"fine": (9, 11, 24), "coarse": (5, 6, 37)}
INPUT, DIM, NORMALS = (40, 43), 16, 12
STORES = ("int8", "pca13-int8", "int4", "pca13-int3")


def normals() -> Features:
    return product(1, NORMALS, SHAPES, DIM)


def queries() -> FeatureBatch:
    return batch_of(product(2, 3, SHAPES, DIM, defect=True))


@pytest.fixture(scope="module", params=STORES)
def banks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Bank]:
    """A bank of codes, and one that holds the vectors that these stand for as float32, both with everything built."""
    folder = tmp_path_factory.mktemp("codes")
    coded = bank_of(folder / "coded", normals(), input_size=INPUT, shards=[5, 3], **vars(Store.parse(request.param)))
    levels = tuple(replace(level, extracted=None, packed_bytes=None) for level in coded.layout.levels)
    plain = Bank.create(folder / "plain", Layout(levels=levels, embedding_dim=DIM, input_size=INPUT, dtype="float32"))
    for start, end in ((0, 5), (5, 8), (8, NORMALS)):
        plain.append(coded.read(np.arange(start, end)))
    for bank in (coded, plain):
        for recipe in ENCODING:
            build_index(bank, recipe.with_levels(["fine", "coarse", "fine+coarse"]))
    return coded, plain


def assert_same(banks: tuple[Bank, Bank], recipe: Recipe, method: Method) -> None:
    coded, plain = (Detector.open(bank, recipe=recipe, method=method) for bank in banks)
    found, expected = coded.score_features(queries()), plain.score_features(banks[0].prepared(queries()))
    np.testing.assert_array_equal(found.image_score, expected.image_score)
    np.testing.assert_array_equal(found.maps, expected.maps)
    for name, dist in expected.level_dist.items():
        assert dist.std() > 0
        np.testing.assert_array_equal(found.level_dist[name], dist)
        np.testing.assert_array_equal(found.nearest[name], expected.nearest[name])
    own, theirs = coded.score_rows([0, 7]), plain.score_rows([0, 7])
    np.testing.assert_array_equal(own.maps, theirs.maps)


def engines() -> list[Recipe]:
    native: list[dict[str, int | float | str]] = [
        {"engine": "native", "simd_level": name} for name, why in why_not().items() if not why
    ]
    settings: list[dict[str, int | float | str]] = [
        *native,
        {"engine": "faiss"},
        {"engine": "torch"},
        {"engine": "torch", "product": "bfloat16"},
    ]
    return [Recipe(name="-".join(map(str, each.values())), query=Query(settings=each)) for each in settings]


@by_name(engines())
@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_every_engine_searches_codes_as_vectors(banks: tuple[Bank, Bank], recipe: Recipe, fusion: str) -> None:
    assert_same(banks, recipe, Method(fusion=fusion, kappa=2))


@by_name(ALL)
def test_every_method_searches_codes_as_vectors(banks: tuple[Bank, Bank], recipe: Recipe) -> None:
    for levels in (("fine", "coarse"), ("fine+coarse",)):
        assert_same(banks, recipe, Method(k_gallery=EVERY if recipe in (GLOBAL, HISTORY) else 5, levels=levels))


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_exact_search_is_exact_for_what_is_stored(banks: tuple[Bank, Bank], fusion: str) -> None:
    """Against brute force in float64, between prepared queries and decoded vectors."""
    coded = banks[0]
    stored, query = coded.read(np.arange(NORMALS)), coded.prepared(queries())
    held, asked = (Features(np.asarray(of.embedding), dict(of.levels)) for of in (stored, query))
    scores = Detector.open(coded, recipe=EXACT, method=Method(fusion=fusion)).score_features(queries())
    rows = np.array([[coded.ids.index(name) for name in line] for line in scores.neighbor_ids])
    expected = pixel_sq_distances(held, asked, rows, 1, fusion)
    for name, dist in scores.level_dist.items():
        np.testing.assert_allclose(dist**2, expected[name][..., 0].reshape(dist.shape), rtol=1e-5)


def test_a_picture_of_the_bank_is_at_distance_0(banks: tuple[Bank, Bank]) -> None:
    """Of the first shard, which bytes were learned from, nothing is cut off; of packed codes, a few numbers are."""
    asked = batch_of(normals()[:3], names(NORMALS)[:3])
    if banks[0].layout.bits is not None:
        asked = banks[0].prepared(asked)
        stored = banks[0].read(np.arange(3))
        same = [np.isclose(asked.levels[name], stored.levels[name]).mean() for name in asked.levels]
        assert min(same) > 0.999
        return
    scores = Detector.open(banks[0], recipe=EXACT).score_features(asked)
    assert not scores.maps.any()


def test_calibrations_of_codes_and_vectors_agree(banks: tuple[Bank, Bank]) -> None:
    found, expected = (calibrate(Detector.open(bank, recipe=LOCATION)) for bank in banks)
    assert (found.image_score, found.map_score) == (expected.image_score, expected.map_score)
    assert found.pixels == expected.pixels


def test_codes_are_read_where_they_lie(banks: tuple[Bank, Bank]) -> None:
    """What the kernel is given of a map is a view of the file."""
    coded = banks[0]
    for level in coded.layout.levels:
        blocks = open_blocks(coded, level)
        view = blocks.stored(1)
        assert view.dtype == coded.layout.stored_dtype
        assert not view.flags.owndata
        assert np.shares_memory(view, coded.level_map(level.name, 1))


@pytest.mark.parametrize("store", ["pca13-int8", "int4"])
@pytest.mark.parametrize("own", [False, True])
def test_regions_of_interest_have_codes_of_what_is_inspected(tmp_path: Path, own: bool, store: str) -> None:
    """Each inspected location finds the nearest of the inspected vectors, in float64."""
    y, x = np.mgrid[: INPUT[0], : INPUT[1]]
    mask = (y - 18) ** 2 + (x - 22) ** 2 < 150
    region = {"own_rois": True} if own else {"roi": Roi.of(mask)}
    layout = replace(
        Layout(levels=tuple(levels_of(normals())), embedding_dim=DIM, input_size=INPUT, **vars(Store.parse(store))), **region
    )
    bank = Bank.create(tmp_path / "bank", layout)
    valid = np.broadcast_to(mask, (NORMALS, *INPUT)).copy() if own else None
    bank.append(batch_of(normals(), valid=valid))
    query = replace(queries(), valid=None if valid is None else valid[:3])
    held, asked = bank.read(np.arange(NORMALS)), bank.prepared(query)
    for recipe in (EXACT, FAISS):
        scores = Detector.open(bank, recipe=recipe).score_features(query)
        for level in bank.layout.levels:
            cells = np.flatnonzero(cells_with_any(mask[np.newaxis], level.height, level.width))
            assert 0 < len(cells) < level.height * level.width
            for image, line in enumerate(scores.neighbor_ids):
                rows = [bank.ids.index(name) for name in line]
                xb, xq = (np.asarray(of.levels[level.name]).reshape(len(of), -1, level.channels) for of in (held, asked))
                xb, xq = (of[:, cells] if own else of for of in (xb, xq))
                expected = np.sqrt(brute(xq[image], xb[rows].reshape(-1, level.channels)).min(axis=1))
                found = scores.level_dist[level.name][image].ravel()[cells]
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
