"""A picture is searched in the product that its nearest normals name, as if the bank held no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss import Detector, FeatureBatch, InputError, Method, Scores, build_index, load_recipe
from spade_faiss.bank.bank import Bank
from spade_faiss.features.batch import concatenate
from spade_faiss.scoring.routing import VOTERS, vote
from spade_faiss.scoring.scores import join
from spade_faiss.search.native.extension import usable_simd_level
from tests.support.product_banks import bank_of_one, bank_of_products, shots

COUNTS = {"cap": 40, "pen": 50, "loose": 35}
METHOD = Method(k_image=3, k_gallery=4)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Do not change it."""
    return bank_of_products(tmp_path_factory.mktemp("products") / "bank", COUNTS)


def queries() -> FeatureBatch:
    """Two pictures of each product, in turns."""
    parts = [shots(product, [f"new {product} {number}"], seed=5 + number) for number in range(2) for product in COUNTS]
    return concatenate(parts)


def same(found: Scores, expected: Scores, at: list[int]) -> None:
    """Some scores equal others, bit for bit; rows are of other banks."""
    np.testing.assert_array_equal(found.image_score[at], expected.image_score)
    np.testing.assert_array_equal(found.maps[at], expected.maps)
    np.testing.assert_array_equal(found.neighbor_ids[at], expected.neighbor_ids)
    for level, nearest in expected.nearest.items():
        for field in ("neighbor", "y", "x"):
            np.testing.assert_array_equal(found.nearest[level][at][field], nearest[field])


@pytest.mark.parametrize("recipe", ["exact", "clusters", "global", "hnsw", "ivf", "compact", "history", "location"])
def test_each_recipe_searches_a_product_as_a_bank_of_it_alone(bank: Bank, tmp_path: Path, recipe: str) -> None:
    build_index(bank, load_recipe(recipe))
    detector = Detector.open(bank.path, recipe=recipe, method=METHOD)
    found = detector.score_features(queries())
    assert found.routes is not None
    assert found.routes.product.tolist() == [*COUNTS, *COUNTS]
    for place, (product, count) in enumerate(COUNTS.items()):
        alone = bank_of_one(tmp_path / product, product, count)
        # The search of its embeddings is exact, whatever index there is of all of them.
        build_index(alone, load_recipe(recipe).within_product)
        at = [place, place + len(COUNTS)]
        one = concatenate([queries()[i : i + 1] for i in at])
        expected = Detector.open(alone, recipe=load_recipe(recipe).within_product, method=METHOD).score_features(one)
        same(found, expected, at)
        named = Detector.open(bank.path, recipe=recipe, method=METHOD, product=product)
        same(named.score_features(one), expected, [0, 1])
        rows = found.nearest["blocks.1"][at]["row"]
        assert np.isin(rows, bank.rows_of(product)).all(), "rows are those of the whole bank"


def test_adding_a_product_changes_no_score_of_another(tmp_path: Path) -> None:
    """Nor any file of its index."""
    bank = bank_of_products(tmp_path / "bank", COUNTS)
    build_index(bank, load_recipe("global"))
    folder = bank.path.joinpath(*bank.part("pen").place)
    files = {path: path.read_bytes() for path in folder.rglob("*.h5")}
    before = Detector.open(bank.path, recipe="global", method=METHOD).score_features(queries())
    bank.append(shots("none of them", [f"more {i}" for i in range(200)]), product="more")
    build_index(bank, load_recipe("global"))
    after = Detector.open(bank.path, recipe="global", method=METHOD).score_features(queries())
    same(after, before, list(range(6)))
    assert files
    assert {path: path.read_bytes() for path in folder.rglob("*.h5")} == files


def test_a_picture_of_none_of_the_products_is_told(bank: Bank) -> None:
    detector = Detector.open(bank, method=METHOD)
    foreign = detector.score_features(shots("none of them", ["x", "y"]))
    assert foreign.routes is not None
    assert foreign.routes.none.all()
    ordinary = detector.score_features(concatenate([shots(name, [f"{name} {i}" for i in range(40)], 9) for name in COUNTS]))
    assert ordinary.routes is not None
    # Each p-value up to alpha is had by about that share of normal pictures, in each product: 9 of 40 are far beyond 5 %.
    low = (ordinary.routes.p_none <= 0.05).reshape(len(COUNTS), -1).sum(axis=1)
    assert low.max() < 9
    assert 0.3 < np.median(ordinary.routes.p_none) < 0.7


def test_a_product_of_few_pictures_is_named_as_well(tmp_path: Path) -> None:
    """It has fewer pictures than neighbors vote, and fewer than are usually asked for."""
    bank = bank_of_products(tmp_path / "bank", {"cap": 30, "pen": 2})
    assert VOTERS > 2
    found = Detector.open(bank).score_features(concatenate([shots("pen", ["p"], 3), shots("cap", ["c"], 3)]))
    assert found.routes is not None
    assert found.routes.product.tolist() == ["pen", "cap"]
    # One neighbor, so that each of the two can be scored against the other; the rest of the line is of `cap` alone.
    assert found.neighbor_ids[0, 0].startswith("pen/")
    assert found.neighbor_ids[0, 1:].tolist() == [""] * 4
    assert np.isnan(found.neighbor_dist[0, 1:]).all()
    assert all(name.startswith("cap/") for name in found.neighbor_ids[1])
    assert np.isfinite(found.image_score).all()
    assert np.isfinite(found.maps).all()


def test_products_may_be_named_one_by_one(bank: Bank) -> None:
    detector, query = Detector.open(bank, method=METHOD), queries()
    found = detector.score_features(query, products=["pen", None, None, "cap", None, None])
    assert found.routes is not None
    assert found.routes.product.tolist() == ["pen", "pen", "loose", "cap", "pen", "loose"]
    assert np.isnan(found.routes.confidence).tolist() == [True, False, False, True, False, False]
    expected = detector.of_product("pen").score_features(query[:1])
    np.testing.assert_array_equal(found.maps[:1], expected.maps)
    with pytest.raises(InputError, match="holds no images of product 'cup'"):
        detector.score_features(query[:1], products=["cup"])
    with pytest.raises(InputError, match="give the product of each"):
        detector.score_features(query, products=["pen"])
    with pytest.raises(InputError, match="without products"):
        Detector.open(bank_of_one(bank.path.parent / "alone", "cap", 5), method=METHOD).of_product("cap")


def test_normal_pictures_are_left_out_of_their_own_product(bank: Bank) -> None:
    detector = Detector.open(bank, method=METHOD)
    rows = [3, 41, 92, 4]
    found = detector.score_rows(rows)
    assert found.routes is not None
    assert found.routes.product.tolist() == ["cap", "pen", "loose", "cap"]
    expected = detector.of_product("cap").score_rows([3, 4])
    np.testing.assert_array_equal(found.maps[[0, 3]], expected.maps)
    assert not {"cap/003", "pen/001"} & set(found.neighbor_ids.ravel().tolist())


def test_which_batch_a_picture_is_in_does_not_matter(bank: Bank) -> None:
    detector = Detector.open(bank, method=METHOD)
    together, query = detector.score_features(queries()), queries()
    for i in range(len(query)):
        same(together, detector.score_features(query[i : i + 1]), [i])


def test_votes_by_hand() -> None:
    """A neighbor at twice the distance has a sixteenth of the nearest one's vote."""
    found = vote(np.array([[1, 4, 4]], np.float32), np.array([[1, 0, 0]]), 3)
    np.testing.assert_allclose(found, [[2 / 18, 16 / 18, 0]])
    # A picture that is in the bank is at no distance from itself: it alone votes.
    np.testing.assert_allclose(vote(np.array([[0, 0, 1e-9]], np.float32), np.array([[2, 2, 0]]), 3), [[0, 0, 1]])


@pytest.mark.parametrize("settings", [{"image_scores": ("knn",)}, {"k_gallery": "all"}])
def test_the_method_is_that_of_each_product(bank: Bank, settings: dict[str, Any]) -> None:
    found = Detector.open(bank, method=Method(k_image=3, **settings)).score_features(queries())
    assert np.isfinite(found.maps).all()


def test_what_was_passed_over_is_known_of_products_that_counted_it(tmp_path: Path) -> None:
    """Five neighbors are nearly all of a small product, and few of a large one, whose search passes nothing over."""
    bank = bank_of_products(tmp_path / "bank", {"cap": 8, "pen": 60})
    build_index(bank, load_recipe("clusters"))
    detector = Detector.open(bank, recipe="clusters", method=Method(k_image=3, k_gallery=5))
    for order in (("cap", "pen"), ("pen", "cap")):
        batch = concatenate([shots(product, [f"new {product}"], seed=7) for product in order])
        found = detector.score_features(batch)
        for shares in found.passed_over.values():
            assert np.isnan(shares[order.index("pen")])
            assert np.isfinite(shares[order.index("cap")]) or usable_simd_level() is None
    one = join([detector.score_features(batch[:1]), detector.score_features(batch[1:])])
    assert one.passed_over.keys() == found.passed_over.keys()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A product has fewer images than are usually asked for. Do not change it."""
    return bank_of_products(tmp_path_factory.mktemp("uneven") / "bank", {"cap": 40, "pen": 3})


def test_a_small_product_is_searched_with_all_of_its_images(uneven: Bank) -> None:
    """By what is usual for the bank alone; one of its three is left for a calibration, and the bank says so."""
    detector = Detector.open(uneven.path)
    assert {name: config.k_image for name, config in detector.product_configs.items()} == {"cap": 5, "pen": 2}
    found = detector.score_features(shots("pen", ["new"], seed=5))
    expected = np.linalg.norm(shots("pen", ["new"], seed=5).embedding - uneven.part("pen").embedding(np.arange(3)), axis=1)
    np.testing.assert_allclose(found.image_score, [np.sort(expected)[:2].mean()], rtol=1e-5)
    notice = uneven.few_images_notice
    assert "'pen' (k_image=2)" in notice
    assert "the product 'pen' holds 3 normal images" in uneven.part("pen").few_images_notice
    assert "cap" not in notice
    assert f"spade-faiss add IMAGES --bank {uneven.path} --product NAME" in notice
    assert not bank_of_products(uneven.path.parent / "enough", {"cap": 6, "pen": 7}).few_images_notice


@pytest.mark.parametrize("name", ["k_image", "k_gallery"])
def test_what_is_asked_for_is_not_lowered_for_a_small_product(uneven: Bank, name: str) -> None:
    three = Method(k_image=3, k_gallery=3)
    asked = replace(three, k_image=4) if name == "k_image" else replace(three, k_gallery=4)
    said = f"{name}=4 is larger than the number of normal images, 3 of product 'pen' in .*add IMAGES --bank .* --product pen"
    for product in (None, "pen"):
        with pytest.raises(InputError, match=said):
            Detector.open(uneven.path, method=asked, product=product)
    # As many as there are can be asked for.
    whole, alone = Detector.open(uneven.path, method=three), Detector.open(uneven.path, method=three, product="pen")
    assert whole.product_configs["pen"] == whole.of_product("pen").scoring_config == alone.scoring_config
    assert alone.scoring_config.k_image == 3
