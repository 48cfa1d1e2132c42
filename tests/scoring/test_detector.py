"""The detector as its users meet it: banks that grow, indexes that were built, damaged or missing, input that does not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector, FeatureBatch, Preprocess, Scores, Source
from spade_faiss.core.errors import BankError, InputError, NotFoundError
from spade_faiss.core.settings import Method
from spade_faiss.core.signed_json import hash_json
from spade_faiss.features.layout import Layout
from spade_faiss.index import image_index
from spade_faiss.index.built_index import index_folder
from spade_faiss.index.image_index import ImageIndex, build_image_index
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe
from tests.support.detectors import open_detector
from tests.support.missing import NO_TORCH, run_without
from tests.support.oracle import Features, bank_of, batch_of, names, product, sq_distances

SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}
INPUT = (40, 43)
DIM = 16
PIXELS = {"dot": (1, 1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of 12 normals in three shards. Do not change it."""
    path = tmp_path_factory.mktemp("detector") / "bank"
    bank_of(path, normals(), input_size=INPUT, shards=[5, 3])
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same bank, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "bank"))


def normals() -> Features:
    return product(1, 12, SHAPES, DIM)


def queries(n: int = 3) -> Features:
    return product(2, n, SHAPES, DIM, defect=True)


def arrays(scores: Scores) -> dict[str, npt.NDArray[Any]]:
    found = {name: getattr(scores, name) for name in ("image_score", "maps", "neighbor_ids", "neighbor_dist")}
    return {
        **found,
        **{f"{field}.{x}": getattr(scores, field)[x] for field in ("level_dist", "nearest") for x in scores.level_dist},
    }


def equal(a: Scores, b: Scores) -> None:
    assert arrays(a).keys() == arrays(b).keys()
    for name, values in arrays(a).items():
        np.testing.assert_array_equal(values, arrays(b)[name], err_msg=name)


def changed(features: Features, level: str, change: Callable[[Any], Any]) -> FeatureBatch:
    return batch_of(Features(features.embedding, {**features.levels, level: change(features.levels[level].copy())}))


def test_a_bank_can_be_queried_after_the_first_append(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "b", normals()[:6], input_size=INPUT)
    assert not (tmp_path / "b" / "indexes").exists()
    before = Detector.open(tmp_path / "b")
    batch = batch_of(queries())
    first = before.score_features(batch)
    assert list(first.ids) == names(3)
    assert (first.maps.shape, first.neighbor_ids.shape, first.distance) == ((3, *INPUT), (3, 5), "l2")
    assert {x: dist.shape for x, dist in first.level_dist.items()} == {"fine": (3, 9, 11), "coarse": (3, 5, 6)}
    for array in (first.image_score, first.maps, first.neighbor_dist, *first.level_dist.values()):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    # An open detector keeps what it was opened with, whoever appends; the next one sees it.
    bank.append(replace(batch, ids=["x", "y", "z"]))
    equal(before.score_features(batch), first)
    after = Detector.open(tmp_path / "b", method=Method(k_image=1, k_gallery=1)).score_features(batch)
    assert after.neighbor_ids.tolist() == [["x"], ["y"], ["z"]]
    assert not after.image_score.any()
    assert not after.maps.any()
    # Appending through the detector's own bank would change the rows under its index.
    assert before.bank is not bank
    with pytest.raises(NotFoundError, match="no bank at"):
        Detector.open(tmp_path / "nothing")


def test_an_empty_bank_has_no_neighbors(tmp_path: Path) -> None:
    bank_of(tmp_path / "b", normals()[:1], input_size=INPUT)
    Bank.create(tmp_path / "empty", Layout(levels=Bank.open(tmp_path / "b").layout.levels, embedding_dim=DIM, input_size=INPUT))
    with pytest.raises(InputError, match="is empty; add normal images: spade-faiss add IMAGES --bank"):
        Detector.open(tmp_path / "empty", method=Method(k_image=1, k_gallery=1))


def test_scores_do_not_depend_on_how_the_bank_is_cut_into_shards(folder: Path, tmp_path: Path) -> None:
    bank_of(tmp_path / "one", normals(), input_size=INPUT)
    bank_of(tmp_path / "many", normals(), input_size=INPUT, shards=[1] * 11)
    expected = Detector.open(folder).score_features(batch_of(queries()))
    for name in ("one", "many"):
        equal(Detector.open(tmp_path / name).score_features(batch_of(queries())), expected)


def test_the_number_of_neighbors_shown_is_the_larger_of_the_two(folder: Path) -> None:
    for k_image, k_gallery in ((1, 4), (4, 1)):
        scores = Detector.open(folder, method=Method(k_image=k_image, k_gallery=k_gallery)).score_features(batch_of(queries()))
        assert scores.neighbor_ids.shape == scores.neighbor_dist.shape == (3, 4)
        np.testing.assert_allclose(scores.image_score, scores.neighbor_dist[:, :k_image].mean(axis=1), rtol=1e-6)
        assert all(nearest["neighbor"].max() < k_gallery for nearest in scores.nearest.values())


# Image index


def embeddings(seed: int, n: int, dim: int = 64) -> npt.NDArray[np.float32]:
    """Clusters of a dozen around a common offset."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(8, dim))
    return (3 + centers[rng.integers(0, 8, n)] + 0.3 * rng.normal(size=(n, dim))).astype(np.float32)


def dots(embedding: npt.NDArray[np.float32]) -> Features:
    """Images of one location, where only the embedding matters."""
    return Features(embedding, {"dot": np.ones((len(embedding), 1, 1, 2), np.float32)})


def brute(xq: npt.NDArray[np.float32], xb: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.float64]:
    return np.stack([np.sort(np.sqrt(sq_distances(xb, q)))[:k] for q in xq])


def test_hnsw_needs_its_index_agrees_with_exact_and_finds_what_came_later(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "b", dots(embeddings(1, 120)), input_size=(4, 4), shards=[50])
    command = f"spade-faiss index {tmp_path / 'b'} --recipe hnsw"
    with pytest.raises(BankError, match=f"has no index 'hnsw' of its embeddings; build it with: {command}"):
        Detector.open(tmp_path / "b", recipe="hnsw")
    described, done = build_image_index(bank, load_recipe("hnsw"))
    assert (described.count, described.generation, described.factory, done) == (120, 2, "HNSW32", "built")
    query = batch_of(dots(embeddings(2, 30)))
    exact = Detector.open(tmp_path / "b").score_features(query)
    equal(Detector.open(tmp_path / "b", recipe="hnsw").score_features(query), exact)
    np.testing.assert_allclose(exact.neighbor_dist, brute(embeddings(2, 30), embeddings(1, 120), 5), rtol=1e-5)
    # Two more shards: searched flat beside the index, until they are added to it.
    bank.append(replace(batch_of(dots(embeddings(2, 30)[:7])), ids=[f"late {i}" for i in range(7)]))
    bank.append(replace(batch_of(dots(embeddings(3, 20))), ids=[f"later {i}" for i in range(20)]))
    detector = Detector.open(tmp_path / "b", recipe="hnsw")
    assert ImageIndex.open(bank, load_recipe("hnsw")).indexed == 120
    late = detector.score_features(query)
    assert late.neighbor_ids[:7, 0].tolist() == [f"late {i}" for i in range(7)]
    assert not late.neighbor_dist[:7, 0].any()
    equal(late, Detector.open(tmp_path / "b").score_features(query))
    described, done = build_image_index(bank, load_recipe("hnsw"))
    assert (described.count, described.generation, done) == (147, 4, "added 27 images to it")
    assert ImageIndex.open(bank, load_recipe("hnsw")).indexed == 147
    equal(late, Detector.open(tmp_path / "b", recipe="hnsw").score_features(query))


def test_a_changed_index_is_refused(copied: Path) -> None:
    bank = Bank.open(copied)
    recipe = load_recipe("hnsw")
    described, _ = build_image_index(bank, recipe)
    file = index_folder(bank, recipe) / described.file.file
    whole = file.read_bytes()
    for position in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(BankError, match=rf"{file.name} has sha256 .*, expected .*; rebuild it with: spade-faiss index"):
            Detector.open(copied, recipe=recipe)
    file.write_bytes(whole[:-100])
    with pytest.raises(BankError, match="has sha256"):
        Detector.open(copied, recipe=recipe)
    file.unlink()
    with pytest.raises(BankError, match=rf"{file.name} is missing; rebuild it with: spade-faiss index"):
        Detector.open(copied, recipe=recipe)
    file.write_bytes(whole)
    assert Detector.open(copied, recipe=recipe).score_features(batch_of(queries())).ids


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shards", [{"sha256": "0" * 64, "count": 11}], "holds 12 entries, its manifest says 11"),
        ("shards", [], "holds 12 entries, its manifest says 0"),
        ("shards", [{"sha256": "0" * 64, "count": "12"}], r"shards\[0\]: count='12' is of type str"),
        ("schema", 99, "has schema 99, this version reads 3; it was written by a newer spade_faiss: install that"),
        ("format", "other", "is of format 'other', expected 'spade_faiss image index'; rebuild the index with"),
        ("factory", "HNSW8", "HNSW8.*HNSW32"),
        ("more", 1, "unknown key 'more'"),
    ],
)
def test_a_changed_manifest_is_refused(copied: Path, key: str, value: object, message: str) -> None:
    """Its checksum is wrong; with a right checksum, its content contradicts the bank."""
    bank, recipe = Bank.open(copied), load_recipe("hnsw")
    build_image_index(bank, recipe)
    path = index_folder(bank, recipe) / "index.json"
    content = {**json.loads(path.read_text()), key: value}
    path.write_text(json.dumps(content))
    with pytest.raises(BankError, match=message if key in ("format", "schema") else "is damaged: its content has sha256"):
        Detector.open(copied, recipe=recipe)
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": hash_json(content)}))
    with pytest.raises(BankError, match=message):
        Detector.open(copied, recipe=recipe)
    path.write_text("{")
    with pytest.raises(BankError, match="is damaged"):
        Detector.open(copied, recipe=recipe)


def test_the_index_of_another_bank_covers_nothing(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """None of its entries is taken for an image of this bank: all images are searched beside it, and a warning says so."""
    bank_of(tmp_path / "other", product(5, 12, SHAPES, DIM), input_size=INPUT, shards=[5, 3])
    build_image_index(Bank.open(tmp_path / "other"), load_recipe("hnsw"))
    shutil.copytree(tmp_path / "other" / "indexes", copied / "indexes")
    expected = Detector.open(copied).score_features(batch_of(queries()))
    with caplog.at_level("WARNING", logger="spade_faiss"):
        detector = Detector.open(copied, recipe="hnsw")
    assert re.search(r"hnsw holds no image of the bank, so all are .*: spade-faiss index .* --recipe hnsw$", caplog.text, re.M)
    assert ImageIndex.open(detector.bank, load_recipe("hnsw")).indexed == 0
    equal(detector.score_features(batch_of(queries())), expected)
    # An index that holds nothing of the bank is not added to.
    described, done = build_image_index(Bank.open(copied), load_recipe("hnsw"))
    assert (described.count, done) == (12, "built anew: 12 of its 12 entries are of images that are gone")
    equal(Detector.open(copied, recipe="hnsw").score_features(batch_of(queries())), expected)


def test_query_parameters_that_the_index_does_not_take(copied: Path) -> None:
    """A misspelled option must fail, for the flat index too, which takes none."""
    for image, query in (("Flat", "efSearch=16"), ("HNSW16", "efSerach=16")):
        recipe = Recipe(name="mine", build=Build(image=image), query=Query(image=query))
        if recipe.needs_image_index:
            build_image_index(Bank.open(copied), recipe)
        with pytest.raises(InputError, match=f"does not take the query parameters '{query}'"):
            Detector.open(copied, recipe=recipe)


def test_an_index_that_finds_too_few_says_so_and_a_query_setting_helps_without_rebuilding(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "b", dots(embeddings(1, 400)), input_size=(4, 4))
    recipe = Recipe(name="lists", build=Build(image="IVF8,Flat"), query=Query(image="nprobe=1"))
    build_image_index(bank, recipe)
    query = batch_of(dots(embeddings(2, 9)))
    with pytest.raises(InputError, match="fewer than k=390 neighbors; raise its query parameters"):
        Detector.open(tmp_path / "b", recipe=recipe, method=Method(k_image=390)).score_features(query)
    everywhere = Detector.open(
        tmp_path / "b", recipe=replace(recipe, query=Query(image="nprobe=8")), method=Method(k_image=390)
    )
    equal(everywhere.score_features(query), Detector.open(tmp_path / "b", method=Method(k_image=390)).score_features(query))


@pytest.mark.parametrize("covered", [0, 40])
@pytest.mark.parametrize("spread", [1e-2, 1.0])
def test_exact_image_search_where_a_matrix_product_cancels(tmp_path: Path, spread: float, covered: int) -> None:
    """Embeddings a thousand from the origin in two far clusters, and queries enough for FAISS to take its matrix product."""
    rng = np.random.default_rng(3)
    far = np.where(np.arange(90)[:, None] % 2, 1e3, -1e3)
    embedding = (far + spread * rng.normal(size=(90, 2048))).astype(np.float32)
    bank = bank_of(tmp_path / "b", dots(embedding[: covered or 20]), input_size=(4, 4))
    if covered:
        build_image_index(bank, load_recipe("hnsw"))
    for start, end in ((covered or 20, 61), (61, 90)):  # searched flat, in more than one block
        bank.append(batch_of(dots(embedding[start:end]), names(90)[start:end]))
    scores = Detector.open(tmp_path / "b", recipe="hnsw" if covered else "exact").score_features(batch_of(dots(embedding)))
    assert scores.neighbor_ids[:, 0].tolist() == names(90)
    np.testing.assert_allclose(scores.neighbor_dist, brute(embedding, embedding, 5), rtol=1e-4)


def test_an_offset_of_all_embeddings_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cancels before the matrix product: no query needs the scan of all rows."""
    embedding = (1e3 + np.random.default_rng(4).normal(size=(90, 2048))).astype(np.float32)
    bank_of(tmp_path / "b", dots(embedding), input_size=(4, 4), shards=[40])
    monkeypatch.setattr(image_index, "scan", None)
    scores = Detector.open(tmp_path / "b").score_features(batch_of(dots(embedding)))
    np.testing.assert_allclose(scores.neighbor_dist, brute(embedding, embedding, 5), rtol=1e-4)


def test_ties_between_images_go_to_the_smaller_row(tmp_path: Path) -> None:
    """More copies of one image than the search has spare candidates for, a little away from the query and at it."""
    embedding = np.concatenate([embeddings(1, 10), np.repeat(embeddings(2, 1), 40, axis=0), embeddings(4, 10)])
    bank_of(tmp_path / "b", dots(embedding), input_size=(4, 4), shards=[30])
    for offset in (1e-3, 0):
        scores = Detector.open(tmp_path / "b").score_features(batch_of(dots(embeddings(2, 1) + np.float32(offset))))
        assert scores.neighbor_ids[0].tolist() == names(60)[10:15]


# Input that does not fit


def test_features_that_do_not_fit_the_bank(folder: Path) -> None:
    detector, good = Detector.open(folder), queries()
    cases: list[tuple[FeatureBatch, str]] = [
        (
            batch_of(Features(good.embedding, {"fine": good.levels["fine"]})),
            r"levels \['fine'\], the bank has \['fine', 'coarse'\]",
        ),
        (batch_of(Features(good.embedding, {**good.levels, "more": good.levels["fine"]})), r"'more'.*the bank has"),
        (changed(good, "fine", lambda maps: maps[..., :3]), r"\(3, 9, 11, 3\), expected \(3, 9, 11, 4\)"),
        (changed(good, "fine", lambda maps: maps[:, :8]), r"\(3, 8, 11, 4\), expected \(3, 9, 11, 4\)"),
        (changed(good, "fine", lambda maps: maps[:2]), r"\(2, 9, 11, 4\), expected \(3, 9, 11, 4\)"),
        (changed(good, "fine", lambda maps: np.moveaxis(maps, 3, 1)), r"\(3, 4, 9, 11\), expected \(3, 9, 11, 4\)"),
        (changed(good, "fine", lambda maps: maps.astype(np.int32)), "int32, expected floating point"),
        (changed(good, "coarse", lambda maps: np.where(maps == maps[1, 2, 3, 4], np.nan, maps)), "'coarse' holds NaN"),
        (changed(good, "coarse", lambda maps: np.where(maps == maps[1, 2, 3, 4], np.inf, maps)), "'coarse' holds NaN or inf"),
        (batch_of(Features(good.embedding[:, :9], good.levels)), r"embedding has shape \(3, 9\), expected \(3, 16\)"),
        (batch_of(Features(good.embedding * np.float32(np.nan), good.levels)), "embedding holds NaN"),
        (batch_of(good, ["a", "b", "a"]), "'a' appears more than once"),
        (batch_of(good[:0]), "at least one image"),
        (batch_of(good, valid=np.ones((3, 9, 11), np.bool_)), r"\(3, 9, 11\), expected bool of shape \(3, 40, 43\)"),
    ]
    for batch, message in cases:
        with pytest.raises(InputError, match=message):
            detector.score_features(batch)


def test_features_from_another_source(tmp_path: Path) -> None:
    ours = Source(backbone="resnet18", weights_sha256="a" * 64, preprocess=Preprocess())
    bank_of(tmp_path / "b", normals(), input_size=INPUT, source=ours)
    # The bank takes features without a source on trust, and so does the detector.
    detector = Detector.open(tmp_path / "b")
    expected = detector.score_features(batch_of(queries()))
    equal(detector.score_features(batch_of(queries(), source=ours)), expected)
    for other, name, values in [
        (replace(ours, backbone="resnet34"), "backbone", ("resnet18", "resnet34")),
        (replace(ours, weights_sha256="b" * 64), "weights_sha256", ("a" * 64, "b" * 64)),
        (replace(ours, precision="bfloat16"), "precision", ("float32", "bfloat16")),
        (replace(ours, preprocess=Preprocess(resize_mode="stretch")), r"preprocess\.resize_mode", ("crop", "stretch")),
    ]:
        with pytest.raises(InputError, match=f"{name}='{values[0]}', these features with '{values[1]}'"):
            detector.score_features(batch_of(queries(), source=other))


def test_kappa_beyond_the_gallery(folder: Path) -> None:
    with pytest.raises(InputError, match="kappa=61 is larger than the gallery, 60 vectors at level 'coarse'"):
        Detector.open(folder, method=Method(k_gallery=2, kappa=61))
    with pytest.raises(InputError, match="kappa=199 is larger than the gallery, 198 vectors at level 'concat'"):
        Detector.open(folder, method=Method(k_gallery=2, kappa=199, fusion="concat"))
    everything = Detector.open(folder, method=Method(k_gallery=2, kappa=60)).score_features(batch_of(queries()))
    assert (everything.maps > Detector.open(folder, method=Method(k_gallery=2)).score_features(batch_of(queries())).maps).all()
    # Under concat, only the finest grid counts.
    assert (
        Detector.open(folder, method=Method(k_gallery=2, kappa=198, fusion="concat"))
        .score_features(batch_of(queries(1)))
        .maps.all()
    )


@pytest.mark.parametrize("setting", [{"k_image": 0}, {"k_gallery": 2.5}, {"kappa": 0}, {"fusion": "max"}, {"sigma": -1.0}])
def test_settings_out_of_range(folder: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(setting))}="):
        open_detector(folder, **setting)


# What the caller gave


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_arrays_of_the_caller_are_left_alone(copied: Path, fusion: str) -> None:
    features, valid = queries(), np.random.default_rng(0).random((3, *INPUT)) < 0.5
    batch = batch_of(features, valid=valid)
    given = [features.embedding, valid, *features.levels.values()]
    before = [array.copy() for array in given]
    for array in given:
        array.flags.writeable = False
    scores = Detector.open(copied, method=Method(fusion=fusion, sigma=0)).score_features(batch)
    for array, copy in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    # The results are the caller's to change, and not the bank's pages.
    for array in arrays(scores).values():
        assert array.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_features_of_other_floating_types(folder: Path, dtype: type[np.floating[Any]]) -> None:
    half = Features(
        queries().embedding.astype(np.float16), {x: maps.astype(np.float16) for x, maps in queries().levels.items()}
    )
    wide: Any = Features(half.embedding.astype(dtype), {x: maps.astype(dtype) for x, maps in half.levels.items()})
    single = Features(half.embedding.astype(np.float32), {x: maps.astype(np.float32) for x, maps in half.levels.items()})
    detector = Detector.open(folder)
    equal(detector.score_features(batch_of(wide)), detector.score_features(batch_of(single)))


def test_maps_are_zero_where_the_input_shows_no_image(folder: Path) -> None:
    valid = np.ones((3, *INPUT), np.bool_)
    valid[0, :7] = False
    valid[2, :, 30:] = False
    detector = Detector.open(folder)
    plain = detector.score_features(batch_of(queries()))
    masked = detector.score_features(batch_of(queries(), valid=valid))
    assert plain.maps.all()
    np.testing.assert_array_equal(masked.maps, np.where(valid, plain.maps, 0))
    np.testing.assert_array_equal(masked.statistics, map_statistics(plain.maps, valid, 0.01))
    for level, dist in plain.level_dist.items():
        np.testing.assert_array_equal(masked.level_dist[level], dist)


def test_a_detector_may_be_shared_by_threads(folder: Path) -> None:
    detector = Detector.open(folder, method=Method(kappa=3))
    batches = [batch_of(product(seed, 1 + seed % 3, SHAPES, DIM, defect=True)) for seed in range(8)]
    expected = [detector.score_features(batch) for batch in batches]
    shared = Detector.open(
        folder, method=Method(kappa=3)
    )  # nothing read yet: the threads race for the first look at everything
    with ThreadPoolExecutor(4) as pool:
        for found, scores in zip(pool.map(shared.score_features, batches * 4), expected * 4, strict=True):
            equal(found, scores)


WITHOUT_TORCH = """
import numpy as np
from spade_faiss import Bank, Detector, FeatureBatch, Layout, Level, Method

rng = np.random.default_rng(0)
level = Level("layer1", channels=8, stride=4, height=7, width=9)
bank = Bank.create(sys.argv[1], Layout(levels=(level,), embedding_dim=6, input_size=(28, 36)))
maps = rng.random((5, 7, 9, 8))
batch = FeatureBatch([str(i) for i in range(5)], rng.random((5, 6)), {"layer1": maps})
bank.append(batch)
scores = Detector.open(sys.argv[1], recipe="exact", method=Method(k_image=1, k_gallery=1)).score_features(batch)
assert scores.neighbor_ids[:, 0].tolist() == list("01234"), scores.neighbor_ids
assert not scores.maps.any()
assert not {"torch", "torchvision", "timm", "sklearn", "matplotlib"} & set(sys.modules)
print("scored")
"""


def test_features_are_scored_without_torch(tmp_path: Path) -> None:
    done = run_without(NO_TORCH, WITHOUT_TORCH, tmp_path, str(tmp_path / "b"))
    assert (done.returncode, done.stdout) == (0, "scored\n"), done.stderr
