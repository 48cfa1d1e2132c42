"""Indexes of chosen levels, joined ones too: scoring finds the one that it needs, or says what builds it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.cli import main
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.settings import Method
from spade_faiss.core.signed_json import hash_json
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import Level
from spade_faiss.features.resampling import upsample
from spade_faiss.index.build import build_index, update_indexes
from spade_faiss.index.built_index import read_built
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.opened_gallery import EncodedLevel, open_gallery
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.levels import searched_levels
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe
from tests.support.oracle import Features, bank_of, batch_of, product
from tests.support.recipes import ENCODING, IVF, by_name

SHAPES = {"fine": (9, 11, 16), "mid": (9, 11, 6), "coarse": (5, 6, 12)}
INPUT = (40, 43)
DIM = 8
COUNT = 9
CHOSEN = ("fine", "mid+coarse")


def normals() -> Features:
    return product(1, COUNT, SHAPES, DIM)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of three shards; no index has been built. Do not change it."""
    return bank_of(tmp_path_factory.mktemp("store") / "bank", normals(), input_size=INPUT, shards=[4, 3]).path


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Bank:
    """The same, to be changed."""
    return Bank.open(shutil.copytree(made, tmp_path / "bank"))


def method(*levels: str) -> Method:
    return Method(k_image=3, levels=levels)


def joined(features: Features) -> FloatArray:
    maps: FloatArray = np.concatenate([features.levels["mid"], upsample(features.levels["coarse"], (9, 11))], axis=-1)
    return maps


def done(bank: Bank, recipe: Recipe) -> str:
    built = build_index(bank, recipe)
    assert built is not None
    return built.done["gallery"]


def levels_of(bank: Bank) -> tuple[str, ...]:
    (manifest,) = read_built(GalleryIndexManifest, bank)
    return manifest.levels


@by_name(ENCODING)
def test_a_joined_level_is_trained_and_encoded_as_one(bank: Bank, recipe: Recipe) -> None:
    """What is stored is what the method makes of the joined maps, put together outside of the bank."""
    build_index(bank, recipe.with_levels(CHOSEN))
    fine, both = searched_levels(bank.layout.levels, "mean", CHOSEN)
    chosen, index = resolve_recipe(recipe), open_gallery(bank, recipe, (fine, both))
    assert chosen.method.train is not None
    assert chosen.method.encode is not None
    for level, maps in ((fine, normals().levels["fine"]), (both, joined(normals()))):
        assert isinstance(level, Level)
        blocks = Blocks(level, ArraySource(maps.reshape(COUNT, -1, level.channels)))
        encoded, trained = EncodedLevel(index, level, blocks), chosen.method.train(blocks, chosen.build)
        assert encoded.trained.keys() == trained.keys()
        for name, array in trained.items():
            np.testing.assert_array_equal(encoded.trained[name], array)
        if chosen.method.pack is not None:
            assert sum((pack.rows >= 0).sum() for pack in encoded.packs()) == COUNT
            continue
        for row in range(COUNT):
            for name, array in chosen.method.encode(blocks(row), trained, chosen.build).items():
                np.testing.assert_array_equal(encoded(row)[name], array)


def test_scoring_finds_the_index_of_its_levels(bank: Bank) -> None:
    everywhere = Recipe(
        name="lists", build=Build(gallery="ivf", settings={"lists": 6}, levels=CHOSEN), query=Query(settings={"nprobe": 6})
    )
    assert done(bank, everywhere) == "built"
    assert levels_of(bank) == CHOSEN
    query = batch_of(product(2, 3, SHAPES, DIM, defect=True))
    for levels in (CHOSEN, CHOSEN[1:], CHOSEN[:1]):
        found = Detector.open(bank.path, recipe=everywhere, method=method(*levels)).score_features(query)
        exact = Detector.open(bank.path, method=method(*levels)).score_features(query)
        assert list(found.level_dist) == list(levels)
        for name, dist in exact.level_dist.items():
            np.testing.assert_allclose(found.level_dist[name], dist, rtol=1e-4, atol=1e-3)


def test_levels_that_are_joined_in_another_way_are_found(bank: Bank) -> None:
    """All of them by `--fusion concat`, or named one by one."""
    build_index(bank, IVF.with_levels(["fine+mid+coarse", "fine+mid"]))
    query = batch_of(product(2, 3, SHAPES, DIM, defect=True))
    named = Detector.open(bank.path, recipe=IVF, method=method("fine+mid+coarse")).score_features(query)
    for other in (Method(k_image=3, fusion="concat"), Method(k_image=3, fusion="concat", levels=tuple(SHAPES))):
        np.testing.assert_array_equal(Detector.open(bank.path, recipe=IVF, method=other).score_features(query).maps, named.maps)
    pair = Method(k_image=3, fusion="concat", levels=("fine", "mid"))
    assert list(Detector.open(bank.path, recipe=IVF, method=pair).score_features(query).level_dist) == ["fine+mid"]


def test_the_command_that_a_message_names_builds_what_is_missing(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no index, where it lacks a level; what it holds is kept."""
    recipe, wanted = load_recipe("compact"), method(*CHOSEN)

    def follow(held: str) -> None:
        with pytest.raises(BankError) as raised:
            Detector.open(bank.path, recipe=recipe, method=wanted)
        text = str(raised.value)
        assert "\n" not in text
        assert held in text
        assert main([*shlex.split(text.partition("build it with: spade-faiss ")[2]), "--quiet"]) == 0
        Detector.open(bank.path, recipe=recipe, method=wanted)
        capsys.readouterr()

    follow(
        f"has no index 'compact' of its maps; build it with: spade-faiss index {bank.path} --recipe compact --levels fine,mid+"
    )
    assert levels_of(bank) == CHOSEN
    wanted = method("coarse")
    follow("holds fine, mid+coarse, and not coarse; build it")
    assert levels_of(bank) == (*CHOSEN, "coarse")
    with pytest.raises(BankError, match=r"--recipe ivf$"):
        Detector.open(bank.path, recipe="ivf", method=wanted)


def test_an_index_keeps_its_levels_until_others_are_named(bank: Bank) -> None:
    assert done(bank, IVF.with_levels(CHOSEN)) == "built"
    assert done(bank, IVF) == "is up to date"
    bank.append(batch_of(product(2, 2, SHAPES, DIM), ["late 0", "late 1"]))
    (updated,) = update_indexes(bank)
    assert updated.done == {"gallery": "added 2 images to it"}
    assert levels_of(bank) == CHOSEN
    assert done(bank, IVF.with_levels(tuple(SHAPES))) == (
        "built anew: it was built for fine, mid+coarse, asked for are fine, mid, coarse"
    )
    assert levels_of(bank) == ()
    assert done(bank, IVF.with_levels(CHOSEN[1:])) == (
        "built anew: it was built for fine, mid, coarse, asked for are mid+coarse"
    )
    assert done(bank, IVF.with_levels(CHOSEN[1:])) == "is up to date"


def test_an_interrupted_build_of_other_levels_is_not_gone_on_with(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a manifest, files say themselves which levels they were made for."""
    build_index(bank, IVF.with_levels(CHOSEN))
    (bank.path / "indexes" / "ivf" / "gallery.json").unlink()
    assert done(bank, IVF) == "built"
    Detector.open(bank.path, recipe=IVF, method=method())


def test_an_index_from_before_levels_could_be_chosen_is_good(bank: Bank) -> None:
    assert done(bank, IVF) == "built"
    path = bank.path / "indexes" / "ivf" / "gallery.json"
    content = json.loads(path.read_text())
    assert content.pop("levels") == []
    content.pop("sha256")
    path.write_text(json.dumps({**content, "sha256": hash_json(content)}))
    Detector.open(bank.path, recipe=IVF, method=method())
    assert done(bank, IVF) == "is up to date"


def test_levels_that_make_no_sense_are_refused(bank: Bank) -> None:
    with pytest.raises(InputError, match="there is no level 'finest'; the bank has fine, mid, coarse"):
        build_index(bank, IVF.with_levels(["fine+finest"]))
    with pytest.raises(InputError, match="recipe 'exact' searches levels fine,mid as they are, without an index of them"):
        build_index(bank, load_recipe("exact").with_levels(["fine", "mid"]))
    for levels in (["fine", "fine"], ["fine+"], [""]):
        with pytest.raises(InputError, match="must name each level once"):
            IVF.with_levels(levels)


def test_levels_on_the_command_line(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["index", str(bank.path), "--quiet"]
    assert main([*words, "--recipe", "compact", "--levels", "fine,mid+coarse"]) == 0
    assert "gallery  compact dims=32, train_vectors=50000 of fine, mid+coarse" in capsys.readouterr().out
    assert main(["info", str(bank.path), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["galleries"]
    assert shown["levels"] == ["fine", "mid+coarse"]
    assert main([*words, "--update", "--levels", "fine"]) == 1
    assert "--update keeps the levels of all indexes" in capsys.readouterr().err
