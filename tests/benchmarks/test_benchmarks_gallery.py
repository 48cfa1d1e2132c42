"""The benchmark of the gallery search: its generated features are what they claim to be, and what it measures runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gallery
from benchmarks.features import INPUT_SIZE, SHAPES, Look, Product, Shape, load_queries, looks_of, save_queries, write_bank
from benchmarks.loops import published
from spade_faiss.scoring import level_search
from spade_faiss.scoring.fusion import to_distance
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.engines import faiss as faiss_exact
from tests.support.benchmark_shapes import TINY

NORMALS = 7


def setup_of(shape: str, folder: Path, recipes: tuple[str, ...] = ("exact", "location")) -> gallery.Setup:
    product = Product(TINY[shape])
    bank = write_bank(folder / f"{shape}.bank", product, NORMALS)
    features = gallery.Features(shape, bank.path, product.tests(4))
    return gallery.Setup(
        sets=[features],
        scratch=folder,
        recipes=recipes,
        ks=(2, 5),
        repeats=2,
        shapes={"wrn50": TINY[shape], "lite0": TINY[shape]},
        memory_normals=(5, 7),
        memory_tests=2,
        scaling_normals=(5,),
        scaling_tests=3,
    )


@pytest.fixture
def setup(tmp_path: Path) -> gallery.Setup:
    return setup_of("square", tmp_path)


@pytest.mark.parametrize("name", list(SHAPES))
def test_features_have_the_shapes_of_their_backbone_and_are_those_behind_a_relu(name: str) -> None:
    channels, embedding_dim = {"wrn50": ((256, 512, 1024), 2048), "lite0": ((24, 40, 112), 1280)}[name]
    batch = Product(SHAPES[name]).normals(0, 2)
    assert batch.embedding.shape == (2, embedding_dim)
    assert (batch.embedding >= 0).all()
    for side, count, maps in zip((56, 28, 14), channels, batch.levels.values(), strict=True):
        assert maps.shape == (2, side, side, count)
        assert maps.dtype == np.float16
        assert maps.min() == 0
        assert 0.2 < (maps == 0).mean() < 0.5
        assert 1 < maps.max() < 1000


def test_an_image_is_the_same_whatever_is_generated_with_it() -> None:
    together = Product(TINY["square"]).normals(0, 5)
    again = Product(TINY["square"])
    for number in (3, 1):
        alone = again.normals(number, 1)
        assert alone.ids == together.ids[number : number + 1]
        np.testing.assert_array_equal(alone.embedding[0], together.embedding[number])
        for name, maps in alone.levels.items():
            np.testing.assert_array_equal(maps[0], together.levels[name][number])
    other = Product(TINY["square"], seed=1).normals(0, 5)
    assert not np.array_equal(other.levels["fine"], together.levels["fine"])


def test_no_image_is_another_and_no_test_image_is_a_normal() -> None:
    product = Product(TINY["square"])
    images = np.concatenate([product.normals(0, 20).levels["coarse"], product.tests(20).levels["coarse"]])
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40
    assert not set(product.normals(0, 20).ids) & set(product.tests(20).ids)


def test_a_bank_is_extended_to_what_it_would_have_been(tmp_path: Path) -> None:
    product = Product(TINY["oblong"])
    write_bank(tmp_path / "grown.bank", product, 3)
    grown, whole = (write_bank(tmp_path / f"{name}.bank", product, 70) for name in ("grown", "whole"))
    assert len(grown) == len(whole) == 70
    assert grown.ids == whole.ids
    assert grown.layout.input_size == INPUT_SIZE
    for row in (2, 3, 66, 69):
        np.testing.assert_array_equal(grown.level_map("only", row), whole.level_map("only", row))


def test_test_images_survive_their_file(tmp_path: Path) -> None:
    tests = Product(TINY["square"]).tests(2)
    read = load_queries(save_queries(tests, tmp_path / "tests.npz"))
    np.testing.assert_array_equal(read.embedding, tests.embedding)
    assert list(read.levels) == ["fine", "coarse"]
    np.testing.assert_array_equal(read.levels["fine"], tests.levels["fine"])


@pytest.mark.parametrize("name", list(SHAPES))
def test_features_differ_by_as_much_as_real_ones(name: str, tmp_path: Path) -> None:
    # Measured on efficientnet_lite0 and MVTec AD's bottle: 1, 10, 50 and 90 % of all locations, within a third or so.
    ranges = (
        ((0, 0.001), (0.008, 0.025), (0.2, 0.36), (0.36, 0.64)),
        ((0.001, 0.02), (0.05, 0.13), (0.24, 0.43), (0.43, 0.76)),
        ((0.03, 0.09), (0.08, 0.19), (0.21, 0.42), (0.42, 0.8)),
    )
    product = Product(SHAPES[name])
    looks = looks_of(write_bank(tmp_path / "generated.bank", product, 20), product.tests(4))
    for look, expected in zip(looks.values(), ranges, strict=True):
        for value, (least, most) in zip(look["unlike"], expected, strict=True):
            assert least <= value <= most, look
        # Variance decays slowly, as it does in trained networks: neither one direction nor all alike.
        assert 0.1 < look["spectrum"][0] < 0.4
        assert 0.55 < look["spectrum"][3] < 0.9
    shares = [look["within"][2] for look in looks.values()]
    assert shares == sorted(shares), "on coarser levels, the nearest vector is nearer to the same place"


def test_the_calibration_measures_what_it_says(tmp_path: Path) -> None:
    calm = Look(unlike=(0.0,) * 6, decay=0.4, smooth=(0.2, 0.1), own=0.5, white=0.3)
    shape = Shape(TINY["oblong"].levels, (calm,), 16)
    product = Product(shape)
    look = looks_of(write_bank(tmp_path / "calm.bank", product, 8), product.tests(3))["only"]
    assert look["unlike"][2] < 0.1, "images that differ by gain and shift alone are all but equal"
    assert len(look["within"]) == 4
    assert look["within"] == sorted(look["within"])
    assert look["spectrum"][-1] == pytest.approx(1)


@pytest.mark.parametrize("rows", [40, 100, 250])
def test_published_loop_finds_the_nearest(rows: int) -> None:
    rng = np.random.default_rng(rows)
    xq, xb = rng.random((30, 6), np.float32), rng.random((rows, 6), np.float32)
    expected = np.linalg.norm(xq[:, None].astype(np.float64) - xb, axis=-1)
    nearest, seconds = published(xq, xb)
    np.testing.assert_allclose(nearest, expected.min(axis=1), rtol=1e-5)
    first, extrapolated = published(xq, xb, chunks=1)
    np.testing.assert_allclose(first, expected[:, :100].min(axis=1), rtol=1e-5)
    assert seconds > 0
    assert extrapolated > 0


@pytest.mark.parametrize("shape", list(TINY))
def test_speed_compares_everything_with_everything(shape: str, tmp_path: Path) -> None:
    rows = list(gallery.speed(setup_of(shape, tmp_path)))
    assert [(row["k"], row["batch"]) for row in rows] == [(2, 1), (2, 4), (5, 1), (5, 4)]
    ours, others = {"exact", "exact_uncached", "location"}, {"rebuilt", "knn", "knn_low_threshold"}
    for row in rows:
        peers = others | {"published"} if row["k"] == 2 else others
        assert set(row["s_per_image"]) == ours | peers
        assert [name for name, found in row["s_per_image"].items() if found["extrapolated"]] == sorted(peers - others)
        assert all(len(found["runs"]) == 2 for found in row["s_per_image"].values())
        assert set(row["times_that_of"]) == ours
        for ratios in row["times_that_of"].values():
            assert set(ratios) == peers | {"exact"}
            assert min(ratios.values()) > 0
        assert row["times_that_of"]["exact"]["exact"] == 1


def test_speed_puts_faiss_back_as_it_was(setup: gallery.Setup) -> None:
    faiss = import_faiss()
    before = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    list(gallery.speed(setup))
    list(gallery.equal(setup))
    assert (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()) == before


def test_quality_is_of_recipes_that_are_not_exact(setup: gallery.Setup) -> None:
    rows = list(gallery.quality(setup))
    assert [(row["k"], row["recipe"]) for row in rows] == [(2, "location"), (5, "location")]
    for row in rows:
        assert set(row["excess"]) == {"fine", "coarse"}
        assert all(level["least"] >= -gallery.TOLERANCE for level in row["excess"].values())
        assert row["map_change"]["max"] >= row["map_change"]["mean"] >= 0
        assert row["excess"]["fine"]["quantile 1.0"] > 0, "a window cannot be as good as everything"


def test_equal_sees_what_differs(setup: gallery.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in gallery.equal(setup):
        assert set(row["identical"].values()) == {True}
        assert len(row["identical"]) == 8
        assert row["off_float64"] <= gallery.TOLERANCE
    monkeypatch.setattr(level_search, "to_distance", lambda *arguments: to_distance(*arguments) * np.float32(1.001))
    with pytest.raises(RuntimeError, match="not exact"):
        list(gallery.equal(setup))


def test_memory_and_scaling_grow_a_bank(setup: gallery.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process: only the full measurement needs a new one.
    monkeypatch.setattr(gallery, "_child", lambda function, *arguments: getattr(gallery, function)(*arguments))
    rows = list(gallery.memory(setup))
    assert [(row["normals"], row["recipe"]) for row in rows] == [(n, recipe) for n in (5, 7) for recipe in setup.recipes]
    assert all(row["peak_bytes"] >= row["start_bytes"] > 0 for row in rows)
    rows = list(gallery.scaling(setup))
    assert [(row["recipe"], row["cold"]) for row in rows] == [(recipe, cold) for recipe in setup.recipes for cold in (0, 1)]
    assert all(len(row[gallery.PIXELS]["runs"]) == 2 for row in rows)


def test_profile_accounts_for_all_of_the_time(setup: gallery.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "_PEAK_SIDE", 64)
    before = dict(vars(faiss_exact)), dict(vars(Blocks))
    (row,) = gallery.profile(setup)
    assert (dict(vars(faiss_exact)), dict(vars(Blocks))) == before, "what was wrapped is unwrapped"
    assert row["k"] == 5
    assert {"decode", "product_knn", "direct_sq_dist", "rest"} <= set(row["of_threads_time"])
    assert sum(row["of_threads_time"].values()) == pytest.approx(1)
    assert all(found["median"] > 0 for found in row["gflop_per_s"].values())


def test_sections_not_measured_again_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "gallery.json"
    target.write_text(json.dumps({"speed": ["kept"], "build": ["replaced"]}))
    words = [
        "--out",
        tmp_path,
        "--shapes",
        "lite0",
        "--normals",
        2,
        "--only",
        "build",
        "--recipes",
        "exact",
        "unheard-of",
        "--json",
    ]
    monkeypatch.setattr("sys.argv", ["gallery", *map(str, words)])
    gallery.main()
    printed = capsys.readouterr()
    figures = json.loads(target.read_bytes())
    assert figures["speed"] == ["kept"]
    assert [(row["set"], row["recipe"], row["normals"]) for row in figures["build"]] == [("lite0", "exact", 2)]
    assert {"cpu", "threads", "blas", "environment"} <= set(figures["machine"])
    assert set(json.loads(printed.out)) == {"machine", "build"}
    assert "unheard-of" in printed.err
