"""Images with regions of interest of their own: each is searched in what is inspected of the others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Bank, Detector, Layout
from spade_faiss.bank.facts import facts_of
from spade_faiss.bank.manifest import read_manifest, write_manifest
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.roi import Roi
from spade_faiss.core.settings import Method
from spade_faiss.core.types import Bools
from spade_faiss.index.build import build_index
from spade_faiss.search import location
from spade_faiss.search.recipe import Recipe
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.verify import verify
from tests.support import oracle
from tests.support.oracle import Features, batch_of, levels_of, product
from tests.support.recipes import ALL, ENCODING, EXACT, FAISS, LOCATION, by_name, queried
from tests.support.regions import inspected_cells

SHAPES = {"fine": (9, 11, 40), "coarse": (5, 6, 24)}
INPUT = (40, 43)
DIM = 12
COUNT, QUERIES = 8, 3
TORCH = queried(replace(EXACT, name="exact-by-torch"), engine="torch")


def regions(seed: int, count: int) -> Bools:
    """A disc somewhere in each input; in the last one a single pixel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: INPUT[0], : INPUT[1]]
    found = [(y - rng.uniform(8, 32)) ** 2 + (x - rng.uniform(8, 32)) ** 2 < rng.uniform(40, 200) for _ in range(count)]
    found[-1] = (y == 18) & (x == 20)
    return np.stack(found)


@cache
def of_normals() -> Bools:
    return regions(1, COUNT)


@cache
def of_queries() -> Bools:
    return regions(2, QUERIES)


@cache
def normals() -> Features:
    return product(1, COUNT, SHAPES, DIM)


@cache
def queries() -> Features:
    return product(2, QUERIES, SHAPES, DIM, defect=True)


def inspected(masks: Bools, name: str) -> Bools:
    """(n, h, w), the locations whose cells hold a pixel that is inspected."""
    height, width, _ = SHAPES[name]
    return inspected_cells(masks, height, width)


def make_bank(path: Path, features: Features, masks: Bools, **settings: Any) -> Bank:
    layout = Layout(
        levels=tuple(levels_of(features)),
        embedding_dim=DIM,
        input_size=INPUT,
        own_rois=True,
        **{"dtype": "float32", **settings},
    )
    bank = Bank.create(path, layout)
    batch = batch_of(features, valid=masks)
    for part in (batch[:3], batch[3:]):
        bank.append(part)
    return bank


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of two shards. Do not change it."""
    return make_bank(tmp_path_factory.mktemp("own") / "bank", normals(), of_normals()).path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kappa", [1, 3])
@by_name([EXACT, FAISS, TORCH])
def test_galleries_hold_what_is_inspected_of_each_image(tmp_path: Path, recipe: Recipe, kappa: int, dtype: str) -> None:
    """Written out in float64, for test images and for normal ones among the others."""
    stored = {name: maps.astype(dtype).astype(np.float32) for name, maps in normals().levels.items()}
    asked = {name: maps.astype(dtype).astype(np.float32) for name, maps in queries().levels.items()}
    path = make_bank(tmp_path / "bank", Features(normals().embedding, stored), of_normals(), dtype=dtype).path
    detector = Detector.open(path, recipe=recipe, method=Method(k_image=3, k_gallery=4, kappa=kappa))
    found = detector.score_features(batch_of(Features(queries().embedding, asked), valid=of_queries()))
    own = detector.score_rows([0, 2])
    for scores, embedding, levels, masks, left_out in (
        (found, queries().embedding, asked, of_queries(), [None] * QUERIES),
        (own, normals().embedding[[0, 2]], {name: maps[[0, 2]] for name, maps in stored.items()}, of_normals()[[0, 2]], [0, 2]),
    ):
        for name, maps in levels.items():
            inside, gallery_inside = inspected(masks, name), inspected(of_normals(), name)
            assert np.isnan(scores.level_dist[name][~inside]).all()
            assert (scores.nearest[name]["row"][~inside] == -1).all()
            for image, without in enumerate(left_out):
                order = oracle.sq_distances(normals().embedding, embedding[image]).argsort(kind="stable")
                rows = [row for row in order.tolist() if row != without][:4]
                vectors = np.concatenate([stored[name][row][gallery_inside[row]] for row in rows])
                for y, x in np.argwhere(inside[image]):
                    gap = np.sort(oracle.sq_distances(vectors, maps[image, y, x]))
                    assert scores.level_dist[name][image, y, x] == pytest.approx(
                        np.sqrt(gap[:kappa]).mean(), rel=1e-4, abs=1e-5
                    )
                    at = scores.nearest[name][image, y, x]
                    assert gallery_inside[at["row"], at["y"], at["x"]]
                    true = ((stored[name][at["row"], at["y"], at["x"]].astype(np.float64) - maps[image, y, x]) ** 2).sum()
                    assert true == pytest.approx(gap[0], rel=1e-4, abs=1e-9)


def window_of(name: str, y: int, x: int, radius: int) -> Bools:
    height, width, _ = SHAPES[name]
    rows, columns = np.mgrid[:height, :width]
    within: Bools = (abs(rows - y) <= radius) & (abs(columns - x) <= radius)
    return within


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("kappa", [1, 3])
def test_windows_hold_what_is_inspected_of_each_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kappa: int, dtype: str, by_kernel: bool
) -> None:
    """Written out in float64: one that holds less than is asked for reaches further. Test images, and the bank's own."""
    if not by_kernel:
        monkeypatch.setattr(location, "usable_simd_level", lambda channels: None)
    settings: dict[str, Any] = {"int4": {"dtype": "int8", "bits": 4}}.get(dtype, {"dtype": dtype})
    bank = make_bank(tmp_path / "bank", normals(), of_normals(), **settings)
    detector = Detector.open(bank.path, recipe=queried(LOCATION, radius=0), method=Method(k_image=3, k_gallery=3, kappa=kappa))
    query = batch_of(queries(), valid=of_queries())
    # Codes are of turned vectors: what is stored is compared with queries that are turned alike.
    stored, asked = (
        {name: np.asarray(maps, np.float32).reshape(len(of), *SHAPES[name]) for name, maps in of.levels.items()}
        for of in (bank.read(np.arange(COUNT)), bank.prepared(query))
    )
    rows_of_own = [0, 2, COUNT - 1]
    found, own = detector.score_features(query), detector.score_rows(rows_of_own)
    wider = 0
    for scores, embedding, maps_of, masks, left_out in (
        (found, queries().embedding, asked, of_queries(), [None] * QUERIES),
        (own, normals().embedding[rows_of_own], stored, of_normals()[rows_of_own], rows_of_own),
    ):
        for name in stored:
            maps = maps_of[name] if left_out[0] is None else maps_of[name][rows_of_own]
            inside, gallery_inside = inspected(masks, name), inspected(of_normals(), name)
            assert np.isnan(scores.level_dist[name][~inside]).all()
            assert np.isfinite(scores.level_dist[name][inside]).all()
            assert (scores.nearest[name]["row"][~inside] == -1).all()
            for image, without in enumerate(left_out):
                order = oracle.sq_distances(normals().embedding, embedding[image]).argsort(kind="stable")
                rows = np.array([row for row in order.tolist() if row != without][:3])
                gallery = stored[name][rows]
                for y, x in np.argwhere(inside[image]):
                    windows = (gallery_inside[rows] & window_of(name, y, x, radius) for radius in range(11))
                    window = next(held for held in windows if held.sum() >= kappa)
                    wider += (gallery_inside[rows] & window_of(name, y, x, 0)).sum() < kappa
                    gap = np.sort(oracle.sq_distances(gallery[window], maps[image, y, x]))
                    assert scores.level_dist[name][image, y, x] == pytest.approx(
                        np.sqrt(gap[:kappa]).mean(), rel=1e-4, abs=1e-5
                    )
                    at = scores.nearest[name][image, y, x]
                    assert window[(rows == at["row"]).argmax(), at["y"], at["x"]]
    assert wider > 20


def test_windows_without_the_kernel_find_the_same(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores() -> list[Any]:
        detector = Detector.open(made, recipe=LOCATION, method=Method(k_image=3, k_gallery=4, kappa=2))
        return [detector.score_features(batch_of(queries(), valid=of_queries())), detector.score_rows(range(COUNT))]

    by_kernel = scores()
    monkeypatch.setattr(location, "usable_simd_level", lambda channels: None)
    for found, expected in zip(scores(), by_kernel, strict=True):
        np.testing.assert_array_equal(found.maps, expected.maps)
        for name in SHAPES:
            np.testing.assert_array_equal(found.level_dist[name], expected.level_dist[name])
            np.testing.assert_array_equal(found.nearest[name], expected.nearest[name])


def test_maps_are_made_of_what_is_inspected(made: Path) -> None:
    found = Detector.open(made).score_features(batch_of(queries(), valid=of_queries()))
    maps = np.zeros((QUERIES, *INPUT))
    for name, dist in found.level_dist.items():
        weight = oracle.fuse({name: inspected(of_queries(), name).astype(np.float64)}, INPUT, 4.0)
        maps += (
            oracle.fuse({name: np.nan_to_num(dist.astype(np.float64))}, INPUT, 4.0) / np.maximum(weight, 1e-12) / len(SHAPES)
        )
    np.testing.assert_allclose(found.maps[of_queries()], maps[of_queries()], rtol=1e-4)
    assert (found.maps[~of_queries()] == 0).all()
    alone = [
        Detector.open(made).score_features(batch_of(queries(), valid=of_queries())[i : i + 1]).maps[0] for i in range(QUERIES)
    ]
    np.testing.assert_array_equal(np.stack(alone), found.maps)


@pytest.mark.parametrize("pool", [1, 3])
@by_name([EXACT, FAISS, LOCATION])
def test_what_lies_outside_changes_no_score(tmp_path: Path, recipe: Recipe, pool: int) -> None:
    def other(features: Features, masks: Bools, seed: int) -> Features:
        rng = np.random.default_rng(seed)
        levels = {
            name: np.where(inspected(masks, name)[..., None], maps, rng.normal(0, 100, maps.shape).astype(np.float32))
            for name, maps in features.levels.items()
        }
        return Features(features.embedding, levels)

    found = []
    for seed in range(2):
        bank = make_bank(tmp_path / str(seed), other(normals(), of_normals(), seed), of_normals(), pool=pool)
        query = batch_of(other(queries(), of_queries(), 10 + seed), valid=of_queries())
        found.append(Detector.open(bank.path, recipe=recipe, method=Method(k_image=3, k_gallery=4)).score_features(query))
    for name in ("image_score", "maps", "statistics"):
        values = [getattr(scores, name) for scores in found]
        if recipe in (EXACT, LOCATION):
            np.testing.assert_array_equal(values[0], values[1])
        else:  # the center that is subtracted before products depends on the bank, and so does their rounding
            np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


@by_name([EXACT, LOCATION])
def test_more_neighbors_than_are_inspected_are_refused(made: Path, recipe: Recipe) -> None:
    """The last normal image has one inspected location, and an image may have it alone for its gallery."""
    few = Features(normals().embedding[-1:], {name: maps[-1:] for name, maps in normals().levels.items()})
    query = batch_of(few, valid=of_normals()[-1:])
    found = Detector.open(made, recipe=recipe, method=Method(k_gallery=1, kappa=1)).score_features(query)
    assert found.map_score[0] == 0
    with pytest.raises(InputError, match="kappa=2 is larger than what is inspected of an image's gallery at level 'fine'"):
        Detector.open(made, recipe=recipe, method=Method(k_gallery=1, kappa=2)).score_features(query)


def test_what_has_no_way_to_search_regions_is_refused(made: Path) -> None:
    bank = Bank.open(made)
    for recipe in (recipe for recipe in ALL if recipe not in (EXACT, FAISS, LOCATION)):
        with pytest.raises(InputError, match=rf"recipe {recipe.name!r} takes one region of interest for all images"):
            Detector.open(made, recipe=recipe)
    for recipe in ENCODING:
        with pytest.raises(InputError, match="takes one region of interest for all images"):
            build_index(bank, recipe)
    for method in (Method(fusion="concat"), Method(levels=("fine+coarse",))):
        for recipe in (EXACT, LOCATION):
            with pytest.raises(InputError, match="would be searched as one, which takes one region of interest"):
                Detector.open(made, recipe=recipe, method=method)
    with pytest.raises(InputError, match="give it as valid="):
        Detector.open(made).score_features(batch_of(queries()))
    nothing = of_queries().copy()
    nothing[1] = False
    with pytest.raises(InputError, match="nothing of 'image 1' is inspected"):
        bank.append(batch_of(queries(), valid=nothing))
    with pytest.raises(InputError, match="own_rois=True says that images have regions of interest of their own"):
        replace(bank.layout, roi=Roi.of(of_normals()[0]))


def test_a_bank_without_its_regions_is_damaged(tmp_path: Path) -> None:
    """As one that was written by hand: scoring says so, rather than search everything."""
    layout = Layout(levels=tuple(levels_of(normals())), embedding_dim=DIM, input_size=INPUT, dtype="float32")
    bank = Bank.create(tmp_path / "bank", layout)
    bank.append(batch_of(normals()))
    manifest = read_manifest(bank.path)
    write_manifest(bank.path, replace(manifest, layout=replace(layout, own_rois=True)))
    with pytest.raises(BankError, match=r"the image in row .* has no region of interest"):
        Detector.open(bank.path).score_features(batch_of(queries(), valid=of_queries()))


@by_name([EXACT, LOCATION])
def test_a_bank_keeps_the_regions_of_its_images(tmp_path: Path, recipe: Recipe) -> None:
    bank = make_bank(tmp_path / "bank", normals(), of_normals())
    bank.remove([bank.ids[1]])
    bank.compact()
    for row, own in enumerate(np.delete(of_normals(), 1, axis=0)):
        np.testing.assert_array_equal(bank.inspected(row), own)
    assert verify(bank.path, deep=True).problems == ()
    assert facts_of(bank)["own_rois"] is True
    calibration = calibrate(Detector.open(bank.path, recipe=recipe, method=Method(k_image=3, k_gallery=3)))
    assert sum(calibration.pixels.counts) == np.delete(of_normals(), 1, axis=0).sum()
