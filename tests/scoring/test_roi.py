"""Regions of interest in a detector: what lies outside is in no gallery and in no score, whichever way a bank is searched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector, Layout, Level, Scores
from spade_faiss.bank.facts import facts_of
from spade_faiss.core.errors import InputError
from spade_faiss.core.roi import Roi
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.types import Bools
from spade_faiss.features.roi import mask_of
from spade_faiss.index.build import build_index
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.search.recipe import Recipe, load_recipe
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.verify import verify
from tests.support import oracle
from tests.support.oracle import Features, batch_of, levels_of, product
from tests.support.recipes import ALL, CLUSTERS, ENCODING, EXACT, FAISS, GLOBAL, HISTORY, LOCATION, by_name, queried
from tests.support.regions import inspected_cells

SHAPES = {"fine": (9, 11, 16), "coarse": (5, 6, 24)}
INPUT = (40, 43)
DIM = 12
COUNT, QUERIES = 9, 3
TORCH = queried(replace(EXACT, name="exact-by-torch"), engine="torch")
Doubles = npt.NDArray[np.float64]


@cache
def region() -> Bools:
    """A disc, and a pixel far from it."""
    y, x = np.mgrid[: INPUT[0], : INPUT[1]]
    inside: Bools = (y - 17) ** 2 + (x - 20) ** 2 < 130
    inside[36, 2] = True
    return inside


@cache
def inspected(name: str) -> Bools:
    """Which locations of a level are inspected: those whose cell holds a pixel that is."""
    height, width, _ = SHAPES[name]
    found: Bools = inspected_cells(region()[np.newaxis], height, width)[0]
    assert 0 < found.sum() < found.size
    return found


@cache
def normals() -> Features:
    return product(1, COUNT, SHAPES, DIM)


@cache
def queries() -> Features:
    return product(2, QUERIES, SHAPES, DIM, defect=True)


def make_bank(path: Path, features: Features, **settings: Any) -> Bank:
    return oracle.bank_of(path, features, input_size=INPUT, shards=[4, 3], roi=Roi.of(region()), **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of three shards, with an index for each recipe that has one. Do not change it."""
    bank = make_bank(tmp_path_factory.mktemp("roi") / "bank", normals())
    for recipe in ENCODING:
        build_index(bank, recipe)
    return bank.path


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank without a region of interest, of maps in which the inspected locations stand side by side, and nothing else."""
    bank = oracle.bank_of(tmp_path_factory.mktemp("cut") / "bank", side_by_side(normals()), input_size=INPUT, shards=[4, 3])
    for recipe in ENCODING:
        build_index(bank, recipe)
    return bank.path


def side_by_side(features: Features) -> Features:
    return Features(features.embedding, {name: maps[:, inspected(name)][:, None] for name, maps in features.levels.items()})


def assert_same(found: Scores, expected: Scores) -> None:
    """The scores of inspected locations are those of the bank that holds nothing else, to the bit."""
    np.testing.assert_array_equal(found.image_score, expected.image_score)
    np.testing.assert_array_equal(found.neighbor_ids, expected.neighbor_ids)
    for name in SHAPES:
        inside, cells = inspected(name), np.argwhere(inspected(name))
        np.testing.assert_array_equal(found.level_dist[name][:, inside], expected.level_dist[name][:, 0])
        assert np.isnan(found.level_dist[name][:, ~inside]).all()
        nearest, cut_out = found.nearest[name][:, inside], expected.nearest[name][:, 0]
        for field in ("neighbor", "row"):
            np.testing.assert_array_equal(nearest[field], cut_out[field])
        np.testing.assert_array_equal(np.stack([nearest["y"], nearest["x"]], axis=-1), cells[cut_out["x"]])
        assert (found.nearest[name][:, ~inside]["row"] == -1).all()


@pytest.mark.parametrize("kappa", [1, 3])
@by_name([recipe for recipe in [*ALL, TORCH] if recipe != LOCATION])
def test_a_gallery_holds_what_is_inspected_and_nothing_else(made: Path, cut: Path, recipe: Recipe, kappa: int) -> None:
    method = Method(k_image=3, k_gallery=4, kappa=kappa)
    found, expected = (Detector.open(path, recipe=recipe, method=method) for path in (made, cut))
    assert_same(found.score_features(batch_of(queries())), expected.score_features(batch_of(side_by_side(queries()))))
    # Normal images, each against the others: what calibrations are made of.
    assert_same(found.score_rows([0, 5]), expected.score_rows([0, 5]))


@by_name([EXACT, FAISS, CLUSTERS])
def test_all_vectors_that_are_inspected_can_be_asked_for(made: Path, recipe: Recipe) -> None:
    """`kappa` may be as large as the gallery: sorted, the distances are those of brute force, whichever engine finds them."""
    most = COUNT * int(inspected("coarse").sum())
    method = Method(k_gallery="all", kappa=most, levels=("coarse",))
    found = Detector.open(made, recipe=recipe, method=method).score_features(batch_of(queries())[:1])
    gallery = normals().levels["coarse"][:, inspected("coarse")].reshape(-1, SHAPES["coarse"][2])
    for (y, x), dist in np.ndenumerate(found.level_dist["coarse"][0]):
        if inspected("coarse")[y, x]:
            expected = np.sqrt(oracle.sq_distances(gallery, queries().levels["coarse"][0, y, x])).mean()
            assert dist == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match=f"kappa={most + 1} is larger than the gallery, {most} vectors at level 'coarse'"):
        Detector.open(made, recipe=recipe, method=replace(method, kappa=most + 1))


@pytest.mark.parametrize("kappa", [1, 3])
def test_scores_are_those_of_the_definition(made: Path, kappa: int) -> None:
    """Written out in float64: galleries of inspected vectors, maps of inspected locations, statistics of inspected pixels."""
    found = Detector.open(made, method=Method(k_image=3, k_gallery=4, kappa=kappa)).score_features(batch_of(queries()))
    level_dist: dict[str, Doubles] = {}
    for name, (height, width, channels) in SHAPES.items():
        level_dist[name] = np.zeros((QUERIES, height, width))
        for image in range(QUERIES):
            rows = oracle.sq_distances(normals().embedding, queries().embedding[image]).argsort()[:4]
            gallery = normals().levels[name][rows][:, inspected(name)].reshape(-1, channels)
            for y, x in np.argwhere(inspected(name)):
                nearest = np.sort(oracle.sq_distances(gallery, queries().levels[name][image, y, x]))[:kappa]
                level_dist[name][image, y, x] = np.sqrt(nearest).mean()
    maps = np.zeros((QUERIES, *INPUT))
    for name, dist in level_dist.items():
        # Each pixel is the mean of inspected locations: their weights are those that they have where all are inspected.
        weight = oracle.fuse({name: inspected(name)[None].astype(np.float64)}, INPUT, 4.0)
        maps += oracle.fuse({name: dist}, INPUT, 4.0) / np.maximum(weight, 1e-12) / len(SHAPES)
        np.testing.assert_allclose(found.level_dist[name][:, inspected(name)], dist[:, inspected(name)], rtol=1e-4)
    np.testing.assert_allclose(found.maps[:, region()], maps[:, region()], rtol=1e-4)
    assert (found.maps[:, ~region()] == 0).all()
    np.testing.assert_allclose(found.map_score, maps[:, region()].max(axis=1), rtol=1e-4)
    alone = map_statistics(found.maps, np.broadcast_to(region(), found.maps.shape), 0.01)
    np.testing.assert_array_equal(found.statistics, alone)
    assert all(region()[y, x] for y, x in found.peak)


def test_a_constant_map_stays_constant_up_to_the_border_of_the_region(tmp_path: Path) -> None:
    """The smoothing does not take the outside for normal, so that a defect at the border scores as one in the middle."""
    base = normals().levels["fine"].copy()
    base[:] = base[0, 0, 0]
    bank = make_bank(tmp_path / "bank", Features(normals().embedding, {**normals().levels, "fine": base}))
    query = Features(queries().embedding, {**queries().levels, "fine": base[:QUERIES] + np.float32(1)})
    found = Detector.open(bank.path, method=Method(levels=("fine",))).score_features(batch_of(query))
    np.testing.assert_allclose(found.maps[:, region()], np.sqrt(SHAPES["fine"][2]), rtol=1e-5)


@pytest.mark.parametrize("kappa", [1, 2])
def test_a_window_holds_what_is_inspected(made: Path, kappa: int) -> None:
    detector = Detector.open(made, recipe=LOCATION, method=Method(k_image=3, k_gallery=4, kappa=kappa))
    found = detector.score_features(batch_of(queries()))
    for name, inside in ((name, inspected(name)) for name in SHAPES):
        for image in range(QUERIES):
            rows = oracle.sq_distances(normals().embedding, queries().embedding[image]).argsort()[:4]
            for y, x in np.argwhere(inside):
                near = [(v, u) for v, u in np.argwhere(inside) if abs(v - y) <= 2 and abs(u - x) <= 2]
                gallery = np.concatenate([normals().levels[name][rows, v, u] for v, u in near])
                dist = np.sqrt(np.sort(oracle.sq_distances(gallery, queries().levels[name][image, y, x]))[:kappa]).mean()
                assert found.level_dist[name][image, y, x] == pytest.approx(dist, rel=1e-4)


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("fusion", ["mean", "concat"])
@by_name([EXACT, LOCATION, CLUSTERS, HISTORY, GLOBAL])
def test_what_lies_outside_changes_no_score(tmp_path: Path, recipe: Recipe, fusion: str, pool: int) -> None:
    """To the bit: in normal images and in test images, pooled or not, each level by itself or all as one."""

    def other(features: Features, seed: int) -> Features:
        rng = np.random.default_rng(seed)
        levels = {}
        for name, maps in features.levels.items():
            levels[name] = np.where(inspected(name)[..., None], maps, rng.normal(0, 100, maps.shape).astype(np.float32))
        return Features(features.embedding, levels)

    found = []
    for seed in range(2):
        bank = make_bank(tmp_path / str(seed), other(normals(), seed), pool=pool, normalize="l2")
        chosen = recipe
        if fusion == "concat":
            chosen = replace(recipe, build=replace(recipe.build, levels=("fine+coarse",) if recipe in ENCODING else ()))
        build_index(bank, chosen)
        detector = Detector.open(bank.path, recipe=chosen, method=Method(k_image=3, k_gallery=4, fusion=fusion))
        found.append(detector.score_features(batch_of(other(queries(), 10 + seed))))
    for name in ("image_score", "maps", "statistics"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].maps.any()


def test_pooling_averages_over_what_is_inspected(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", normals(), pool=3)
    for name, maps in normals().levels.items():
        inside = inspected(name)
        for number, (y, x) in enumerate(np.argwhere(inside)):
            window = np.s_[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            expected = maps[5][window][inside[window]].astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(bank.level_map(name, 5)[number], expected, rtol=1e-5)


def test_levels_as_one_take_the_nearest_inspected_location_for_those_outside(tmp_path: Path) -> None:
    """Of a rectangle it is what the place is moved to, row and column each by itself; then the level is resized as ever."""
    mask = np.zeros(INPUT, np.bool_)
    mask[9:27, 13:31] = True
    bank = oracle.bank_of(tmp_path / "bank", normals(), input_size=INPUT, roi=Roi.of(mask))
    fine, coarse = (mask_of(level.roi) for level in bank.layout.levels if level.roi is not None)
    edges = [(np.flatnonzero(coarse.any(axis=axis)).min(), np.flatnonzero(coarse.any(axis=axis)).max()) for axis in (1, 0)]
    rows, columns = (np.arange(size).clip(*edge) for size, edge in zip(SHAPES["coarse"][:2], edges, strict=True))

    def as_one(features: Features) -> Doubles:
        moved = features.levels["coarse"][:, rows][:, :, columns]
        both = [features.levels["fine"].astype(np.float64), oracle.upsample(moved, SHAPES["fine"][:2])]
        found: Doubles = np.concatenate(both, axis=-1)[:, fine]
        return found

    found = Detector.open(bank.path, method=Method(k_gallery="all", fusion="concat")).score_features(batch_of(queries()))
    gallery = as_one(normals()).reshape(-1, 40)
    for image, vectors in enumerate(as_one(queries())):
        dist = [np.sqrt(oracle.sq_distances(gallery, vector).min()) for vector in vectors]
        np.testing.assert_allclose(found.level_dist["concat"][image][fine], dist, rtol=1e-4, atol=1e-5)


def test_half_precision_and_small_memory(tmp_path: Path) -> None:
    """Blocks are decoded in memory that is used again; nothing depends on what the cache holds."""
    bank = make_bank(tmp_path / "bank", normals(), dtype="float16")
    scores = [
        Detector.open(bank.path, run=Run(memory=memory)).score_features(batch_of(queries())) for memory in ("2GiB", "97MiB")
    ]
    np.testing.assert_array_equal(scores[0].maps, scores[1].maps)
    halves = {name: maps.astype(np.float16).astype(np.float32) for name, maps in normals().levels.items()}
    rounded = {name: maps.astype(np.float16).astype(np.float32) for name, maps in queries().levels.items()}
    whole = make_bank(tmp_path / "whole", Features(normals().embedding, halves))
    expected = Detector.open(whole.path).score_features(batch_of(Features(queries().embedding, rounded)))
    np.testing.assert_allclose(scores[0].maps, expected.maps, rtol=1e-5)


def test_margins_and_a_region_leave_out_what_either_does(tmp_path: Path) -> None:
    valid = np.zeros((COUNT, *INPUT), np.bool_)
    valid[:, 10:] = True
    bank = Bank.create(tmp_path / "bank", layout_of(Roi.of(region())))
    bank.append(batch_of(normals(), valid=valid))
    found = Detector.open(bank.path).score_features(batch_of(queries(), valid=valid[:QUERIES]))
    shown = valid[0] & region()
    assert (found.maps[:, ~shown] == 0).all()
    assert (found.maps[:, shown] > 0).all()
    stored = bank.read(np.arange(COUNT)).valid
    assert stored is not None
    np.testing.assert_array_equal(stored, np.broadcast_to(shown, stored.shape))


def test_a_bank_keeps_its_region(made: Path, tmp_path: Path) -> None:
    """Through removal, compaction, additions and a copy; `verify` finds nothing."""
    bank = Bank.open(shutil.copytree(made, tmp_path / "bank"))
    bank.remove([bank.ids[1], bank.ids[6]])
    bank.compact()
    bank.append(batch_of(queries(), ids=["x", "y", "z"]))
    assert bank.layout.roi == Roi.of(region())
    rest = [row for row in range(COUNT) if row not in (1, 6)]
    for name in SHAPES:
        expected = [*normals().levels[name][rest], *queries().levels[name]]
        for row, maps in enumerate(expected):
            np.testing.assert_array_equal(bank.level_map(name, row), maps[inspected(name)])
    assert verify(bank.path, deep=True).problems == ()
    facts = facts_of(bank)
    assert facts["roi"] == Roi.of(region()).facts()
    assert facts["roi"]["share"] == pytest.approx(region().mean())


def test_other_regions_are_other_banks(made: Path, tmp_path: Path) -> None:
    shifted = Roi.of(np.roll(region(), 1, axis=1))
    for roi, said in ((shifted, "roi.sha256="), (None, "roi=")):
        with pytest.raises(InputError, match=said) as error:
            Bank.open_or_create(made, layout_of(roi))
        assert len(str(error.value)) < 800
    # The indexes of a bank are of its region: those of another are built anew.
    bank = Bank.create(tmp_path / "bank", layout_of(shifted))
    bank.append(batch_of(normals()))
    shutil.copytree(made / "indexes/ivf", tmp_path / "bank/indexes/ivf")
    build_index(bank, next(recipe for recipe in ENCODING if recipe.name == "ivf"))
    assert verify(bank.path, deep=True).problems == ()


def layout_of(roi: Roi | None) -> Layout:
    return Layout(levels=tuple(levels_of(normals())), embedding_dim=DIM, input_size=INPUT, dtype="float32", roi=roi)


def test_the_pixel_threshold_counts_what_is_inspected(made: Path, tmp_path: Path) -> None:
    """The zeros outside would lower it: most of a picture would never be above."""
    path = shutil.copytree(made, tmp_path / "bank")
    detector = Detector.open(path, recipe=load_recipe("exact"), method=Method(k_image=3, k_gallery=3))
    calibration = calibrate(detector)
    assert sum(calibration.pixels.counts) == COUNT * region().sum()


def test_a_level_says_what_is_inspected() -> None:
    whole = Level("fine", 16, stride=4, height=9, width=11)
    assert (whole.locations, whole.stored_shape, whole.cells.tolist()) == (99, (9, 11, 16), list(range(99)))
    part = layout_of(Roi.of(region())).levels[0]
    assert part.locations == inspected("fine").sum()
    assert part.stored_shape == (part.locations, 16)
    np.testing.assert_array_equal(part.cells, np.flatnonzero(inspected("fine")))
