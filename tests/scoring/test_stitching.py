"""Pictures that are scored in tiles, against plain loops over all of their pixels and tiles."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import gaussian_filter

from spade_faiss import Bank, Detector, FeatureBatch, Level
from spade_faiss.bank.origin import Origin
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.extraction import Preprocess, Source
from spade_faiss.core.settings import Method
from spade_faiss.features.batch import concatenate
from spade_faiss.features.layout import Layout
from spade_faiss.features.tiles import TileGrid, tile_id
from spade_faiss.index.build import build_index
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.scoring.scores import join
from spade_faiss.search.recipe import Build, Recipe
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.suspects import suspects
from tests.support.banks import forget_mappings

TILE, OVERLAP = 12, 4
SOURCE = Source(backbone="net", weights_sha256="ab12", preprocess=Preprocess(tile=TILE, overlap=OVERLAP))
LEVEL = Level("own", channels=2, stride=1, height=TILE, width=TILE)
LAYOUT = Layout(levels=(LEVEL,), embedding_dim=3, input_size=(TILE, TILE), dtype="float32")
WIDTH, HEIGHT = 31, 26  # 4 x 3 tiles, nothing is aligned by chance
Floats = npt.NDArray[np.float32]


def features_of(name: str, values: Floats) -> FeatureBatch:
    """The tiles of a picture (H, W, 2) whose feature map is the picture: a level of stride 1 without a receptive field."""
    height, width, _ = values.shape
    places = TileGrid(width, height, TILE, OVERLAP).places
    padded = np.pad(values, ((TILE, TILE), (TILE, TILE), (0, 0)), mode="edge")
    maps = np.stack([padded[TILE + y : 2 * TILE + y, TILE + x : 2 * TILE + x] for x, y, *_ in places.tolist()])
    return FeatureBatch(
        [tile_id(name, place) for place in places.tolist()],
        np.concatenate([maps.mean(axis=(1, 2)), maps.max(axis=(1, 2, 3))[:, None]], axis=1),
        {"own": maps},
        SOURCE,
        pictures=[name] * len(places),
        places=places,
    )


def pictures(seed: int, n: int, width: int = WIDTH, height: int = HEIGHT) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(height, width, 2)).astype(np.float32) for _ in range(n)]


def bank_of(path: Path, values: Sequence[Floats], source: Source = SOURCE) -> Bank:
    bank = Bank.create(path, LAYOUT, Origin(source=source))
    for number, picture in enumerate(values):
        bank.append(features_of(f"normal {number}", picture))
    return bank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of five pictures of one size. Do not change it."""
    return bank_of(tmp_path_factory.mktemp("tiles") / "bank", pictures(1, 5)).path


def nearest_tiles(query: FeatureBatch, tile: int, bank: FeatureBatch, allowed: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    rows = np.flatnonzero(allowed)
    sq_dist = np.square(bank.embedding[rows].astype(np.float64) - query.embedding[tile]).sum(axis=1)
    return rows[np.argsort(sq_dist, kind="stable")[:k]]


def expected_scores(
    query: FeatureBatch, bank: FeatureBatch, allowed: Sequence[npt.NDArray[Any]], k: int, size: tuple[int, int], sigma: float
) -> tuple[float, npt.NDArray[np.float64], list[str]]:
    """The image score, the map and the neighbors of a picture: each pixel is searched in the tile that is nearest to it."""
    assert query.places is not None
    neighbors = [nearest_tiles(query, tile, bank, allowed[tile], k) for tile in range(len(query))]
    dist = [
        np.sqrt(np.square(bank.embedding[rows].astype(np.float64) - query.embedding[tile]).sum(axis=1))
        for tile, rows in enumerate(neighbors)
    ]
    scores = [float(values.mean()) for values in dist]
    found = np.empty(size)
    for y, x in np.ndindex(*size):
        off = [np.hypot(y + 0.5 - top - TILE / 2, x + 0.5 - left - TILE / 2) for left, top, *_ in query.places.tolist()]
        tile = int(np.argmin(np.round(off, 9)))
        left, top = query.places[tile, :2]
        gallery = bank.levels["own"][neighbors[tile]].reshape(-1, 2).astype(np.float64)
        own = query.levels["own"][tile, y - top, x - left]
        found[y, x] = np.sqrt(np.square(gallery - own).sum(axis=1).min())
    worst = int(np.argmax(scores))
    return max(scores), gaussian_filter(found, sigma) if sigma else found, [bank.pictures[row] for row in neighbors[worst]]


@pytest.mark.parametrize("batch", [16, 5])
@pytest.mark.parametrize("sigma", [0.0, 1.5])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (TILE, TILE), (7, 20), (5, 6)])
def test_a_picture_scores_as_a_loop_over_its_pixels_says(folder: Path, size: tuple[int, int], sigma: float, batch: int) -> None:
    (picture,) = pictures(2, 1, size[1], size[0])
    query, normals = features_of("query", picture), concatenate([features_of("", values) for values in pictures(1, 5)])
    normals = replace(normals, pictures=[f"normal {row // 12}" for row in range(60)])
    detector = Detector.open(folder, method=Method(k_image=3, k_gallery=3, sigma=sigma))
    detector.plan = replace(detector.plan, batch=batch)
    found = detector.score_features(query)
    score, expected, neighbors = expected_scores(query, normals, [np.ones(60, bool)] * len(query), 3, size, sigma)
    assert found.ids == ["query"]
    assert found.sizes is not None
    assert found.sizes.tolist() == [list(size)]
    np.testing.assert_allclose(found.image_score, [score], rtol=1e-5)
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.statistics, map_statistics(found.maps, None, 0.01))
    assert found.neighbor_ids[0].tolist() == neighbors
    # What is said of levels is said of the tile that has the strongest pixel.
    assert found.corners is not None
    (top, left), (y, x) = found.corners[0], found.peak[0]
    assert 0 <= y - top < TILE
    assert 0 <= x - left < TILE
    if sigma == 0:
        assert found.level_dist["own"][0, y - top, x - left] == found.maps.max()


def test_many_pictures_of_many_sizes(folder: Path) -> None:
    sizes = [(HEIGHT, WIDTH), (9, 40), (30, 13)]
    queries = [features_of(f"q{i}", pictures(3 + i, 1, size[1], size[0])[0]) for i, size in enumerate(sizes)]
    detector = Detector.open(folder, method=Method(k_image=2, k_gallery=2))
    each = [detector.score_features(query) for query in queries]
    found = detector.score_features(concatenate(queries))
    assert found.ids == ["q0", "q1", "q2"]
    assert found.maps.shape == (3, 30, 40)
    for i, (own, size) in enumerate(zip(found.own_maps(), sizes, strict=True)):
        assert own.shape == size
        np.testing.assert_array_equal(own, each[i].maps[0])
        assert found.maps[i].sum() == pytest.approx(own.sum(), rel=1e-5)
        assert (found.image_score[i], found.map_score[i]) == (each[i].image_score[0], each[i].map_score[0])
        assert found.peak[i].tolist() == each[i].peak[0].tolist()
    np.testing.assert_array_equal(join(each).maps, found.maps)


def test_a_picture_of_one_tile_scores_as_a_whole_picture(tmp_path: Path) -> None:
    normals, (query,) = pictures(4, 6, TILE, TILE), pictures(5, 1, TILE, TILE)
    tiled = bank_of(tmp_path / "tiled", normals)
    whole_source = replace(SOURCE, preprocess=Preprocess(resize=TILE, size=TILE))
    whole = Bank.create(tmp_path / "whole", LAYOUT, Origin(source=whole_source))
    for number, values in enumerate([*normals, query]):
        name = f"normal {number}" if number < 6 else "query"
        batch = replace(features_of(name, values), ids=[name], source=whole_source, pictures=(), places=None)
        if number < 6:
            whole.append(batch)
    method = Method(k_image=2, k_gallery=3)
    expected = Detector.open(whole.path, method=method).score_features(batch)
    found = Detector.open(tiled.path, method=method).score_features(features_of("query", query))
    for name in ("ids", "image_score", "neighbor_ids", "neighbor_dist"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-5)
    np.testing.assert_allclose(found.statistics, expected.statistics, rtol=1e-5)
    np.testing.assert_array_equal(found.nearest["own"], expected.nearest["own"])
    np.testing.assert_array_equal(found.level_dist["own"], expected.level_dist["own"])


def test_a_defect_across_a_seam_leaves_none(tmp_path: Path) -> None:
    """The map of a disc on a flat picture is the smoothed disc, wherever it lies: no seam of a tile is in it."""
    bank = bank_of(tmp_path / "bank", [np.zeros((HEIGHT, WIDTH, 2), np.float32)] * 2)
    detector = Detector.open(bank.path, method=Method(k_image=1, k_gallery=1, sigma=2.0))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for center in [(13, 15), (10, 10), (7, 21), (25, 0)]:
        disc = ((y - center[0]) ** 2 + (x - center[1]) ** 2 <= 20).astype(np.float32)
        found = detector.score_features(features_of("disc", np.stack([disc * 3, disc * 4], axis=-1)))
        np.testing.assert_allclose(found.maps[0], gaussian_filter(5.0 * disc.astype(np.float64), 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k_gallery", [2, ALL])
def test_same_place_restricts_neighbors_to_the_place_of_the_tile(folder: Path, k_gallery: int | str) -> None:
    method = Method(k_image=2, k_gallery=k_gallery, tile_neighbors="same-place", sigma=0.0)
    detector = Detector.open(folder, method=method)
    query = features_of("query", pictures(6, 1)[0])
    normals = concatenate([features_of(f"normal {i}", values) for i, values in enumerate(pictures(1, 5))])
    assert query.places is not None
    assert normals.places is not None
    there = [(normals.places == place).all(axis=1) for place in query.places]
    assert [int(rows.sum()) for rows in there] == [5] * 12
    score, _, neighbors = expected_scores(query, normals, there, 2, (HEIGHT, WIDTH), 0.0)
    _, expected, _ = expected_scores(query, normals, there, 5 if k_gallery == ALL else 2, (HEIGHT, WIDTH), 0.0)
    found = detector.score_features(query)
    np.testing.assert_allclose(found.image_score, [score], rtol=1e-5)
    assert found.neighbor_ids[0].tolist() == neighbors
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-5)
    # Each row against the others of its place, those of its own picture left out.
    own = detector.score_rows([12])
    others = [rows & (np.arange(60) // 12 != 1) for rows in there]
    score, _, neighbors = expected_scores(normals[12:24], normals, others, 2, (HEIGHT, WIDTH), 0.0)
    _, expected, _ = expected_scores(normals[12:24], normals, others, 4 if k_gallery == ALL else 2, (HEIGHT, WIDTH), 0.0)
    np.testing.assert_allclose(own.image_score, [score], rtol=1e-5)
    assert own.neighbor_ids[0].tolist() == neighbors
    np.testing.assert_allclose(own.maps[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"0 normal images in .* have a tile at \(0, 0\) of 20 x 26 pixels, k=2"):
        detector.score_features(features_of("query", pictures(6, 1, width=20)[0]))


@pytest.mark.parametrize("batch", [16, 5])
def test_a_picture_is_left_out_with_all_of_its_tiles(folder: Path, tmp_path: Path, batch: int) -> None:
    method = Method(k_image=3, k_gallery=3)
    detector = Detector.open(folder, method=method)
    detector.plan = replace(detector.plan, batch=batch)
    found = detector.score_rows([0, 24])
    assert found.ids == ["normal 0", "normal 2"]
    for place, left_out in enumerate((0, 2)):
        values = pictures(1, 5)
        without = Bank.create(tmp_path / str(left_out), LAYOUT, Origin(source=SOURCE))
        for number in range(5):
            if number != left_out:
                without.append(features_of(f"normal {number}", values[number]))
        expected = Detector.open(without.path, method=method).score_features(features_of("query", values[left_out]))
        np.testing.assert_array_equal(found.image_score[place], expected.image_score[0])
        np.testing.assert_array_equal(found.maps[place], expected.maps[0])
        assert found.neighbor_ids[place].tolist() == expected.neighbor_ids[0].tolist()


def test_pictures_are_calibrated_with_suspected_and_removed_as_a_whole(folder: Path, tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank", [*pictures(1, 5), *pictures(8, 2, width=20)])
    detector = Detector.open(bank.path, method=Method(k_image=2, k_gallery=2))
    every = detector.score_rows(bank.pictures.originals.tolist())
    made = calibrate(detector)
    names = tuple(f"normal {i}" for i in range(7))
    assert (made.images, made.available) == (names, 7)
    assert list(made.image_score) == every.image_score.tolist()
    assert list(made.map_score) == every.map_score.tolist()
    assert sum(made.pixels.counts) == 5 * HEIGHT * WIDTH + 2 * HEIGHT * 20
    held_out = [features_of(f"new {i}", values) for i, values in enumerate(pictures(9, 3))]
    split = calibrate(detector, holdout=concatenate(held_out))
    assert split.images == ("new 0", "new 1", "new 2")
    assert list(split.image_score) == [float(detector.score_features(query).image_score[0]) for query in held_out]
    ranked = suspects(detector, out=tmp_path / "suspects")
    assert dict(zip(ranked.ids, ranked.image_score, strict=True)) == dict(zip(names, every.image_score, strict=True))
    bank.remove(["normal 1"])
    assert len(bank) == 12 * 4 + 2 * 6
    assert bank.tile_places is not None
    assert bank.tile_places[12:24].tolist() == TileGrid(WIDTH, HEIGHT, TILE, OVERLAP).places.tolist()
    bank.compact()
    forget_mappings()
    reopened = Bank.open(bank.path)
    assert reopened.tile_places is not None
    np.testing.assert_array_equal(reopened.tile_places, bank.tile_places)
    assert reopened.pictures.ids == [name for name in names if name != "normal 1"]


def test_without_maps(folder: Path) -> None:
    query = features_of("query", pictures(2, 1)[0])
    found = Detector.open(folder, method=Method(k_image=2, localize="none")).score_features(query)
    expected = Detector.open(folder, method=Method(k_image=2)).score_features(query)
    assert np.isnan(found.maps).all()
    assert np.isnan(found.statistics).all()
    assert found.image_score == expected.image_score


def test_what_tiles_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    detector = Detector.open(folder, method=Method(k_image=2, k_gallery=2))
    query = features_of("query", pictures(2, 1)[0])
    backwards = concatenate([query[place : place + 1] for place in reversed(range(12))])
    assert query.places is not None
    for wrong, message in (
        (query[:5], r"image 'query' has 12 tiles, 5 of them were given"),
        (query[5:], r"image 'query' has 12 tiles, of which 0 were given"),
        (backwards, r"image 'query' has 12 tiles, of which 0 were given"),
        (
            concatenate([query[:5], features_of("other", pictures(2, 1)[0])]),
            r"image 'query' has 12 tiles, of which 5 were given",
        ),
        (replace(query, places=None), "holds tiles of images, these features are of whole images"),
        (replace(query, places=query.places + 1), "has no tile at"),
        (replace(query, places=query.places.astype(np.int64)), "places is int64"),
    ):
        with pytest.raises(InputError, match=message):
            detector.score_features(wrong)
    with pytest.raises(InputError, match="localize='flagged' is not for banks of tiles"):
        Detector.open(folder, method=Method(localize="flagged", flag_above=1.0))
    whole = Bank.create(tmp_path / "whole", LAYOUT)
    with pytest.raises(InputError, match="the bank has whole images"):
        whole.append(replace(query, source=None))
    whole.append(replace(query, source=None, places=None))
    with pytest.raises(InputError, match="tile_neighbors='same-place' is of banks of tiles"):
        Detector.open(whole.path, method=Method(tile_neighbors="same-place"))
    recipe = Recipe(name="all", build=Build(gallery="history", settings={}))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    build_index(Bank.open(copy), recipe)
    with pytest.raises(InputError, match="tile_neighbors='same-place' is not for a recipe that searches the whole bank"):
        Detector.open(copy, recipe=recipe, method=Method(tile_neighbors="same-place"))


def test_a_bank_that_lies_about_its_tiles_is_refused(tmp_path: Path) -> None:
    """Whoever made it: places that no picture of that size has, or none at all."""
    query = features_of("a", pictures(2, 1)[0])
    assert query.places is not None
    for number, places in enumerate((query.places + np.int32(1), query.places * np.int32(1 << 16), None)):
        bank = Bank.create(tmp_path / str(number), LAYOUT, Origin(source=SOURCE))
        bank.append_prepared(replace(query, places=places))
        with pytest.raises(BankError, match=r"is damaged: .*extract a new bank"):
            Detector.open(bank.path, method=Method(k_image=2, k_gallery=2))
    other = Bank.create(tmp_path / "other", LAYOUT, Origin(source=replace(SOURCE, preprocess=Preprocess(tile=16, overlap=4))))
    other.append_prepared(replace(query, places=TileGrid(50, 40, 16, 4).places[:12]))
    with pytest.raises(BankError, match=r"its maps are of \(12, 12\) pixels, its tiles of \(16, 16\)"):
        Detector.open(other.path, method=Method(k_image=2, k_gallery=2))
