"""The whole bank as the gallery, chosen and joined levels, and averages at a map's border: against brute force in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector, FeatureBatch, Layout, Level
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.presets import Usual
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.layout import prepare
from spade_faiss.features.resampling import upsample
from spade_faiss.search.levels import searched_levels
from tests.support.oracle import Features, bank_of, batch_of, product

N, DIM, INPUT = 9, 6, (28, 36)
SHAPES = {"fine": (7, 9, 16), "mid": (7, 9, 5), "coarse": (3, 5, 24)}

Doubles = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def normals() -> Features:
    return product(1, N, SHAPES, DIM)


@pytest.fixture(scope="module")
def queries() -> FeatureBatch:
    return batch_of(product(2, 4, SHAPES, DIM, defect=True), [f"query {i}" for i in range(4)])


@pytest.fixture
def folder(tmp_path: Path, normals: Features) -> Path:
    return bank_of(tmp_path / "bank", normals, input_size=INPUT, shards=[4, 3]).path


def nearest(xq: npt.NDArray[np.floating], xb: npt.NDArray[np.floating]) -> Doubles:
    """(n, h, w), the distance of each location of each image (n, h, w, c) to the nearest vector of all images (m, h, w, c)."""
    n, h, w, c = xq.shape
    gallery = xb.reshape(-1, c).astype(np.float64)
    flat = xq.reshape(-1, c).astype(np.float64)
    return np.array([np.sqrt(((gallery - q) ** 2).sum(axis=1).min()) for q in flat]).reshape(n, h, w)


@pytest.mark.parametrize("engine", ["auto", "faiss", "torch"])
def test_every_location_meets_every_normal_image(folder: Path, normals: Features, queries: FeatureBatch, engine: str) -> None:
    from spade_faiss import load_recipe

    recipe = load_recipe("exact").with_query({"engine": engine})
    scores = Detector.open(folder, recipe=recipe, method=Method(k_image=3, k_gallery=ALL)).score_features(queries)
    for name in SHAPES:
        np.testing.assert_allclose(scores.level_dist[name], nearest(queries.levels[name], normals.levels[name]), rtol=1e-4)
    assert scores.neighbor_ids.shape == (4, 3)
    ids = Bank.open(folder).ids
    for name, found in scores.nearest.items():
        for image in range(4):
            for at in found[image].ravel():
                listed = scores.neighbor_ids[image, at["neighbor"]] if at["neighbor"] >= 0 else ids[at["row"]]
                assert listed == ids[at["row"]], name


def test_all_is_as_many_as_there_are(folder: Path, queries: FeatureBatch) -> None:
    every = Detector.open(folder, method=Method(k_gallery=ALL)).score_features(queries)
    counted = Detector.open(folder, method=Method(k_gallery=N)).score_features(queries)
    np.testing.assert_array_equal(every.maps, counted.maps)
    np.testing.assert_array_equal(every.image_score, counted.image_score)
    five = Detector.open(folder).score_features(queries)
    assert (every.maps < five.maps).any()
    assert (every.level_dist["fine"] <= five.level_dist["fine"]).all()


def test_batches_and_memory_do_not_matter(folder: Path, queries: FeatureBatch) -> None:
    whole = Detector.open(folder, method=Method(k_gallery=ALL))
    expected = whole.score_features(queries)
    small = Detector.open(folder, method=Method(k_gallery=ALL), run=Run(memory=whole._working_bytes(1)))
    assert small.plan.batch == 1
    np.testing.assert_array_equal(small.score_features(queries).maps, expected.maps)


def test_a_normal_image_is_left_out_of_its_own_gallery(folder: Path, normals: Features, tmp_path: Path) -> None:
    found = Detector.open(folder, method=Method(k_image=2, k_gallery=ALL)).score_rows([5, 0])
    for place, row in enumerate((5, 0)):
        others = [i for i in range(N) if i != row]
        xq = normals.levels["fine"][[row]]
        np.testing.assert_allclose(found.level_dist["fine"][[place]], nearest(xq, normals.levels["fine"][others]), rtol=1e-4)
    assert (found.level_dist["fine"] > 0).any()


def test_chosen_levels_are_searched_and_no_others(folder: Path, normals: Features, queries: FeatureBatch) -> None:
    scores = Detector.open(folder, method=Method(levels=("coarse", "fine"))).score_features(queries)
    every = Detector.open(folder).score_features(queries)
    assert list(scores.level_dist) == ["coarse", "fine"]
    for name in scores.level_dist:
        np.testing.assert_array_equal(scores.level_dist[name], every.level_dist[name])
    assert (scores.maps != every.maps).any()


def test_levels_apart_and_joined_in_one_run(folder: Path, normals: Features, queries: FeatureBatch) -> None:
    scores = Detector.open(folder, method=Method(k_gallery=ALL, levels=("fine", "mid+coarse"))).score_features(queries)
    assert list(scores.level_dist) == ["fine", "mid+coarse"]

    def joined(levels: dict[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate([levels["mid"], upsample(levels["coarse"], (7, 9))], axis=-1)

    expected = nearest(joined(dict(queries.levels)), joined(dict(normals.levels)))
    np.testing.assert_allclose(scores.level_dist["mid+coarse"], expected, rtol=1e-4)
    alone = Detector.open(folder, method=Method(k_gallery=ALL, levels=("mid", "coarse"), fusion="concat"))
    np.testing.assert_array_equal(alone.score_features(queries).level_dist["mid+coarse"], scores.level_dist["mid+coarse"])


def test_concat_of_all_levels_is_as_before(folder: Path, queries: FeatureBatch) -> None:
    levels = Bank.open(folder).layout.levels
    assert [level.name for level in searched_levels(levels, "concat")] == ["concat"]
    assert [level.name for level in searched_levels(levels, "mean")] == list(SHAPES)
    named = Detector.open(folder, method=Method(fusion="concat", levels=tuple(SHAPES))).score_features(queries)
    unnamed = Detector.open(folder, method=Method(fusion="concat")).score_features(queries)
    np.testing.assert_array_equal(named.maps, unnamed.maps)


def test_a_level_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no level 'blocks\.9'; the bank has fine, mid, coarse"):
        Detector.open(folder, method=Method(levels=("fine", "mid+blocks.9")))
    for levels in (("fine", "fine"), ("fine", "mid+fine"), ("",), ("fine+",)):
        with pytest.raises(InputError, match="must name each level once"):
            Method(levels=levels)


def test_the_scoring_config_says_which_levels(folder: Path) -> None:
    usual = Detector.open(folder).scoring_config
    chosen = Detector.open(folder, method=Method(k_gallery=ALL, levels=("fine", "mid+coarse"))).scoring_config
    assert usual.key != chosen.key
    assert chosen.options(Usual()) == "--k-gallery all --levels fine,mid+coarse"


def test_zeros_beyond_the_border_by_hand() -> None:
    level = Level("level", channels=1, stride=4, height=2, width=2)
    batch = FeatureBatch(["x"], np.ones((1, 1), np.float32), {"level": np.full((1, 2, 2, 1), 9, np.float32)})
    means = {}
    for border in ("valid", "zero"):
        layout = Layout(levels=(level,), embedding_dim=1, input_size=(8, 8), dtype="float32", pool=3, pool_border=border)
        means[border] = prepare(batch, layout).levels["level"].ravel().tolist()
    assert means == {"valid": [9, 9, 9, 9], "zero": [4, 4, 4, 4]}  # 4 of 9 cells of each window exist
    with pytest.raises(InputError, match="pool_border='mirror'"):
        Layout(levels=(level,), embedding_dim=1, input_size=(8, 8), pool_border="mirror")


def test_each_level_has_its_own_gallery(folder: Path, normals: Features, queries: FeatureBatch) -> None:
    """The finest in a few images, two others joined in all: as if each had been searched by itself."""
    levels = ("fine", "mid+coarse")
    mixed = Detector.open(folder, method=Method(k_image=3, k_gallery=(4, ALL), levels=levels)).score_features(queries)
    few = Detector.open(folder, method=Method(k_image=3, k_gallery=4, levels=levels)).score_features(queries)
    every = Detector.open(folder, method=Method(k_image=3, k_gallery=ALL, levels=levels)).score_features(queries)
    np.testing.assert_array_equal(mixed.level_dist["fine"], few.level_dist["fine"])
    np.testing.assert_array_equal(mixed.level_dist["mid+coarse"], every.level_dist["mid+coarse"])
    assert (mixed.level_dist["fine"] > every.level_dist["fine"]).any()
    assert mixed.neighbor_ids.shape == (4, 4)
    alone = Detector.open(folder, method=Method(k_image=3, k_gallery=(4, ALL), levels=levels)).score_rows([0, 5])
    by_few = Detector.open(folder, method=Method(k_image=3, k_gallery=4, levels=levels)).score_rows([0, 5])
    np.testing.assert_array_equal(alone.level_dist["fine"], by_few.level_dist["fine"])


def test_a_gallery_for_each_level_needs_as_many_numbers(folder: Path) -> None:
    with pytest.raises(InputError, match=r"k_gallery=\(4, 'all'\) has 2 values for 3 levels; give one for each"):
        Detector.open(folder, method=Method(k_gallery=(4, ALL)))
    with pytest.raises(InputError, match="k_gallery=0 must be"):
        Method(k_gallery=(4, 0))


def test_each_level_has_its_own_average() -> None:
    shapes = {"fine": (7, 9, 16), "coarse": (3, 5, 24)}
    batch = batch_of(product(3, 2, shapes, DIM), ["a", "b"])
    levels = tuple(Level(name, shape[2], 4, *shape[:2]) for name, shape in shapes.items())
    by_pool = {
        pool: prepare(batch, Layout(levels=levels, embedding_dim=DIM, input_size=INPUT, pool=pool, pool_border="zero"))
        for pool in (1, 3, (1, 3))
    }
    np.testing.assert_array_equal(by_pool[1, 3].levels["fine"], by_pool[1].levels["fine"])
    np.testing.assert_array_equal(by_pool[1, 3].levels["coarse"], by_pool[3].levels["coarse"])
    with pytest.raises(InputError, match=r"pool=\(1, 3, 3\) has 3 values for 2 levels"):
        Layout(levels=levels, embedding_dim=DIM, input_size=INPUT, pool=(1, 3, 3))
    with pytest.raises(InputError, match="pool=2 must be odd"):
        Layout(levels=levels, embedding_dim=DIM, input_size=INPUT, pool=(1, 2))
