"""Weights of levels in the mean of their score maps: by hand, for every way of searching, and where they are remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.bank.origin import Origin
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess, Source
from spade_faiss.core.presets import Preset, Usual
from spade_faiss.core.settings import Method
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.layout import Layout
from spade_faiss.features.tiles import TileGrid, tile_id
from spade_faiss.index.build import build_index
from spade_faiss.scoring.config import ScoringConfig
from spade_faiss.scoring.fusion import score_maps
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe, load_recipe
from tests.support.oracle import Features, bank_of, batch_of, levels_of, product, upsample
from tests.support.recipes import ALL, ENCODING, by_name

SHAPES = {"fine": (9, 11, 16), "mid": (6, 7, 8), "coarse": (5, 6, 24)}
INPUT, DIM, COUNT = (40, 43), 12, 9
WEIGHTS = (0.5, 2.0, 1.25)


@pytest.fixture(scope="module")
def queries() -> Features:
    return product(2, 3, SHAPES, DIM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that has every index. Do not change it."""
    bank = bank_of(tmp_path_factory.mktemp("weights") / "bank", product(1, COUNT, SHAPES, DIM), input_size=INPUT)
    for recipe in ENCODING:
        build_index(bank, recipe)
    return bank.path


def test_the_mean_is_weighted_and_only_ratios_count() -> None:
    levels = [np.full((2, 3, 4), 1, np.float32), np.full((2, 1, 1), 4, np.float32), np.full((2, 9, 5), 10, np.float32)]
    for weights in ((1.0, 2.0, 5.0), (3.0, 6.0, 15.0)):
        np.testing.assert_allclose(score_maps(levels, (11, 13), 4.0, weights), (1 + 8 + 50) / 8, rtol=1e-6)


def test_equal_weights_are_those_of_none_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    levels = [rng.random((2, 5, 6), np.float32), rng.random((2, 3, 3), np.float32), rng.random((2, 2, 2), np.float32)]
    plain = score_maps(levels, (20, 24), 1.5)
    np.testing.assert_array_equal(score_maps(levels, (20, 24), 1.5, (0.3, 0.3, 0.3)), plain)
    assert not np.array_equal(score_maps(levels, (20, 24), 1.5, (0.3, 0.3, 0.4)), plain)


def test_a_location_that_is_not_inspected_weighs_nothing() -> None:
    level = np.array([[[np.nan, 2.0], [2.0, np.nan]]], np.float32)
    found = score_maps([level, np.full((1, 1, 1), 5, np.float32)], (6, 6), 1.0, (3.0, 1.0))
    np.testing.assert_allclose(found, (3 * 2 + 5) / 4, rtol=1e-6)


@by_name(ALL)
def test_every_way_of_searching_weighs_the_maps_of_levels(folder: Path, queries: Features, recipe: Recipe) -> None:
    """What levels found stays; the map is the weighted mean of it, computed in double here."""
    plain, weighted = (
        Detector(Bank.open(folder), recipe, Method(k_image=3, k_gallery=3, sigma=0.0, level_weights=weights)).score_features(
            batch_of(queries)
        )
        for weights in ((), WEIGHTS)
    )
    for name, dist in plain.level_dist.items():
        np.testing.assert_array_equal(weighted.level_dist[name], dist)
    maps = [upsample(dist.astype(np.float64)[..., None], INPUT)[..., 0] for dist in plain.level_dist.values()]
    expected = np.average(maps, axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(weighted.maps, expected, rtol=1e-5)
    assert not np.allclose(weighted.maps, plain.maps, rtol=1e-2)
    np.testing.assert_array_equal(weighted.image_score, plain.image_score)


def test_one_that_is_left_out_and_batches_of_any_size_are_weighted_alike(folder: Path, queries: Features) -> None:
    detector = Detector.open(folder, method=Method(k_image=3, k_gallery=3, levels=("fine", "mid+coarse"), level_weights=(1, 3)))
    assert detector.method.level_weights == (1.0, 3.0)
    together = detector.score_features(batch_of(queries))
    for number in range(len(queries)):
        alone = detector.score_features(batch_of(queries)[number : number + 1])
        np.testing.assert_array_equal(alone.maps[0], together.maps[number])
    own = detector.score_rows([2, 5])
    np.testing.assert_array_equal(own.maps, score_maps(list(own.level_dist.values()), INPUT, 4.0, (1.0, 3.0)))


def test_maps_of_tiles_are_weighted(tmp_path: Path) -> None:
    """Nothing is smoothed, so that each pixel is that of the tile in which it is the most central."""
    source = Source(backbone="net", weights_sha256="ab12", preprocess=Preprocess(tile=12, overlap=4))
    places = TileGrid(20, 12, 12, 4).places
    shapes = {"fine": (6, 6, 4), "coarse": (3, 3, 5)}

    def tiles(seed: int, name: str) -> FeatureBatch:
        ids = [tile_id(name, place) for place in places.tolist()]
        found = product(seed, len(places), shapes, DIM)
        return batch_of(found, ids, source=source, pictures=[name] * len(places), places=places)

    layout = Layout(
        levels=tuple(levels_of(product(0, 1, shapes, DIM))), embedding_dim=DIM, input_size=(12, 12), dtype="float32"
    )
    bank = Bank.create(tmp_path / "bank", layout, Origin(source=source))
    for number in range(4):
        bank.append(tiles(number, f"normal {number}"))
    plain = Method(k_image=2, k_gallery=2, sigma=0.0)
    by_level = [
        Detector.open(bank, method=replace(plain, levels=(name,))).score_features(tiles(9, "new")).maps for name in shapes
    ]
    method = replace(plain, level_weights=(1.0, 4.0))
    found = Detector.open(bank, method=method).score_features(tiles(9, "new"))
    assert found.maps.shape == (1, 12, 20)
    np.testing.assert_allclose(found.maps, (by_level[0] + 4 * by_level[1]) / 5, rtol=1e-5)


def test_a_bank_remembers_them_and_one_without_is_written_as_before(folder: Path, tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank", product(1, COUNT, SHAPES, DIM), input_size=INPUT)
    assert "level_weights" not in json.loads((bank.path / "manifest.json").read_bytes())["usual"]["method"]
    bank.choose(Usual(method=Method(k_image=3, k_gallery=3, level_weights=WEIGHTS)))
    assert Bank.open(bank.path).usual.method.level_weights == WEIGHTS
    assert Detector.open(bank.path).method.level_weights == WEIGHTS


def test_a_preset_of_numbered_levels_leaves_out_the_weight_of_a_level_that_there_is_not() -> None:
    preset = Preset(name="p", method=Method(levels=("#1", "#2+#3", "#4"), level_weights=WEIGHTS))
    assert preset.usual(["a", "b", "c"]).method.level_weights == WEIGHTS[:2]
    assert preset.usual(["a", "b", "c"]).method.levels == ("a", "b+c")


def test_a_calibration_is_of_its_weights() -> None:
    def config(**settings: object) -> ScoringConfig:
        return ScoringConfig.of(resolve_recipe(load_recipe("exact")), Method(**settings))  # type: ignore[arg-type]

    assert config().key == "ba157434204eddcc"
    assert len({config().key, config(level_weights=(1, 2, 3)).key, config(level_weights=(1, 2, 4)).key}) == 3
    assert config(level_weights=(1, 2.5)).options(Usual()) == "--level-weights 1.0,2.5"


def test_what_they_cannot_be(folder: Path) -> None:
    for weights in ((1.0, 0.0), (1.0, float("nan")), (-1.0,), (1e9,), [1.0], 2.0, ("1",), (True,)):
        with pytest.raises(InputError, match="level_weights="):
            Method(level_weights=weights)  # type: ignore[arg-type]
    few: list[tuple[tuple[float, ...], tuple[str, ...]]] = [((1.0, 2.0), ()), ((1.0, 1.0, 1.0), ("fine",))]
    for given, levels in few:
        with pytest.raises(InputError, match=rf"level_weights=.* has {len(given)} values for {len(levels) or 3} levels"):
            Detector.open(folder, method=Method(k_image=3, k_gallery=3, levels=levels, level_weights=given))
    with pytest.raises(InputError, match="has 3 values for 1 levels"):
        Detector.open(folder, method=Method(k_image=3, k_gallery=3, fusion="concat", level_weights=WEIGHTS))
