"""Every search method behind the detector: true distances, whatever the batch, the memory and the threads."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.core.declaring import ALL as EVERY
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Method, Run
from spade_faiss.index.build import build_index
from spade_faiss.search.recipe import Recipe
from tests.support.oracle import Features, bank_of, batch_of, names, product, sq_distances
from tests.support.recipes import ALL, ENCODING, GLOBAL, HISTORY, IVF, LOCATION, by_name, queried

SHAPES = {"fine": (9, 11, 16), "coarse": (5, 6, 12)}
INPUT = (40, 43)
DIM = 16
NORMALS = 12


def normals() -> Features:
    return product(1, NORMALS, SHAPES, DIM)


def queries(n: int = 3) -> Features:
    return product(2, n, SHAPES, DIM, defect=True)


@pytest.fixture(scope="module", params=["float32", "float16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of 12 normals with everything built. Do not change it."""
    path: Path = tmp_path_factory.mktemp("methods") / "bank"
    bank = bank_of(path, normals(), input_size=INPUT, shards=[5, 3], dtype=request.param)
    for recipe in ENCODING:
        build_index(bank, recipe)
    return path


@by_name(ALL)
def test_a_detector_with_each_recipe(folder: Path, recipe: Recipe) -> None:
    """Its distances are those to the patches that it names, no nearer than the nearest, and near them."""
    everywhere = Method(k_gallery=EVERY) if recipe is GLOBAL else Method()
    detector, exact = Detector.open(folder, recipe=recipe), Detector.open(folder, method=everywhere)
    scores, reference = detector.score_features(batch_of(queries())), exact.score_features(batch_of(queries()))
    # The image search is the same.
    np.testing.assert_array_equal(scores.image_score, reference.image_score)
    np.testing.assert_array_equal(scores.neighbor_ids, reference.neighbor_ids)
    stored = np.dtype(detector.bank.layout.dtype)
    for name, dist in scores.level_dist.items():
        ours, theirs = normals().levels[name].astype(stored), queries().levels[name].astype(stored)
        for image, y, x in np.ndindex(dist.shape):
            nearest = scores.nearest[name][image, y, x]
            row = nearest["row"]
            shown = scores.neighbor_ids[image].tolist()
            # The image is named by its column where it is one of those shown.
            column = shown.index(names(NORMALS)[row]) if names(NORMALS)[row] in shown else -1
            assert nearest["neighbor"] == column
            patch = ours[row, nearest["y"], nearest["x"]]
            np.testing.assert_allclose(dist[image, y, x] ** 2, sq_distances(patch[None], theirs[image, y, x]), rtol=1e-4)
        if recipe is not HISTORY:
            assert (dist >= reference.level_dist[name] * (1 - 1e-4)).all()
        assert dist.mean() <= 1.5 * reference.level_dist[name].mean()
    assert np.isfinite(scores.maps).all()
    assert scores.maps.std() > 0


@by_name([queried(LOCATION, radius=10), queried(IVF, nprobe=8)])
@pytest.mark.parametrize("kappa", [1, 3])
def test_a_detector_that_looks_everywhere_scores_as_exact(folder: Path, recipe: Recipe, kappa: int) -> None:
    scores = Detector.open(folder, recipe=recipe, method=Method(kappa=kappa)).score_features(batch_of(queries()))
    reference = Detector.open(folder, method=Method(kappa=kappa)).score_features(batch_of(queries()))
    for name, dist in reference.level_dist.items():
        # Vectors within rounding of each other are told apart by exact search alone: at a norm of 12, a distance of 1e-3.
        np.testing.assert_allclose(
            scores.level_dist[name], dist, rtol=1e-4, atol=0 if recipe.build.gallery == "location" else 3e-4
        )


@by_name(ALL)
def test_a_detector_does_not_depend_on_batch_nor_memory(folder: Path, recipe: Recipe) -> None:
    detector = Detector.open(folder, recipe=recipe, method=Method(kappa=2))
    together = detector.score_features(batch_of(queries(5)))
    small = Detector.open(folder, recipe=recipe, method=Method(kappa=2), run=Run(memory=detector._working_bytes(1)))
    assert (small.plan.batch, small.plan.cache_bytes) == (1, 0)
    assert detector.plan.batch > 1
    # A cache that holds some of the blocks.
    some = Detector.open(folder, recipe=recipe, method=Method(kappa=2), run=Run(memory=detector._working_bytes(16) + 20_000))
    for other in (small, some):
        alone = other.score_features(batch_of(queries(5)))
        np.testing.assert_array_equal(alone.maps, together.maps)
        for name, dist in together.level_dist.items():
            np.testing.assert_array_equal(alone.level_dist[name], dist)
            np.testing.assert_array_equal(alone.nearest[name], together.nearest[name])
    one = detector.score_features(batch_of(queries(5)[3:4]))
    np.testing.assert_array_equal(one.maps[0], together.maps[3])


@by_name(ALL)
def test_a_detector_is_shared_by_threads(folder: Path, recipe: Recipe) -> None:
    batches = [batch_of(product(seed, 1 + seed % 3, SHAPES, DIM, defect=True)) for seed in range(5, 9)]
    expected = [Detector.open(folder, recipe=recipe).score_features(batch) for batch in batches]
    shared = Detector.open(folder, recipe=recipe)  # nothing read yet: the threads race for the first look at everything
    with ThreadPoolExecutor(4) as pool:
        for found, scores in zip(pool.map(shared.score_features, batches * 3), expected * 3, strict=True):
            for name, dist in scores.level_dist.items():
                np.testing.assert_array_equal(found.level_dist[name], dist)
                np.testing.assert_array_equal(found.nearest[name], scores.nearest[name])


@by_name([LOCATION, *ENCODING])
def test_a_normal_image_scores_near_zero(folder: Path, recipe: Recipe) -> None:
    """All but near duplicates of the same vector are told apart by any method."""
    scores = Detector.open(folder, recipe=recipe).score_features(batch_of(normals()[:3]))
    reference = Detector.open(folder, recipe=recipe).score_features(batch_of(queries()))
    assert not scores.neighbor_dist[:, 0].any()
    for name, dist in scores.level_dist.items():
        assert (dist == 0).mean() > 0.9
        assert dist.max() < 0.05 * reference.level_dist[name].mean()


@by_name(ALL)
def test_concatenated_levels(folder: Path, tmp_path: Path, recipe: Recipe) -> None:
    """What is encoded has to be encoded of the joined level."""
    if recipe in ENCODING:
        with pytest.raises(BankError, match=r"holds fine, coarse, and not fine\+coarse; build it with: spade-faiss index"):
            Detector.open(folder, recipe=recipe, method=Method(fusion="concat"))
        folder = shutil.copytree(folder, tmp_path / "joined")
        build_index(Bank.open(folder), recipe.with_levels(["fine+coarse"]))
    scores = Detector.open(folder, recipe=recipe, method=Method(fusion="concat")).score_features(batch_of(queries()))
    assert list(scores.level_dist) == ["concat"]
    method = Method(fusion="concat", k_gallery=EVERY if recipe is GLOBAL else 5)
    reference = Detector.open(folder, method=method).score_features(batch_of(queries()))
    dist, exact = scores.level_dist["concat"], reference.level_dist["concat"]
    if recipe is not HISTORY:
        assert (dist >= exact * (1 - 1e-4)).all()
    assert dist.mean() <= 1.5 * exact.mean()


def test_a_query_setting_needs_no_building(folder: Path) -> None:
    means = []
    for nprobe in ("1", "8"):
        detector = Detector.open(folder, recipe=IVF.with_query({"nprobe": nprobe}))
        means.append(float(detector.score_features(batch_of(queries())).level_dist["fine"].mean()))
    assert means[0] > means[1]
    with pytest.raises(InputError, match="recipe 'ivf': query: settings: unknown key 'radius'"):
        Detector.open(folder, recipe=IVF.with_query({"radius": "8"}))


def test_kappa_of_a_corner_behind_the_detector(folder: Path) -> None:
    detector = Detector.open(folder, recipe=queried(LOCATION, radius=0), method=Method(kappa=6))
    with pytest.raises(InputError, match="kappa=6 is larger than the smallest window, 5 vectors at level 'fine'"):
        detector.score_features(batch_of(queries()))


@by_name(ALL)
def test_defects_stand_out_whatever_the_method(folder: Path, recipe: Recipe) -> None:
    """The patch that was changed is further from the gallery than its surroundings."""
    scores = Detector.open(folder, recipe=recipe).score_features(batch_of(queries()))
    dist = scores.level_dist["fine"]
    changed = np.zeros(dist.shape[1:], np.bool_)
    changed[9 // 2 : 9 // 2 + 3, 11 // 3 : 11 // 2 + 1] = True
    assert dist[:, changed].mean() > 2 * dist[:, ~changed].mean()
