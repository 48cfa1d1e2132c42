"""Presets: which settings they name, and what remains of them beside settings that were given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.presets import Preset, Usual, load_preset, of_few, preset_names
from spade_faiss.core.settings import Method
from spade_faiss.search.recipe import recipe_names

LEVELS = ("fine", "mid", "coarse")


def test_the_presets_of_the_package_name_recipes_of_the_package() -> None:
    assert preset_names() == ["default", "rad", "spade"]
    for name in preset_names():
        preset = load_preset(name)
        assert preset.name == name
        assert preset.description.endswith(".")
        assert preset.recipe in recipe_names()


def test_spade_is_what_settings_are_by_themselves() -> None:
    preset = load_preset("spade")
    assert preset.extraction == Extraction()
    assert preset.usual(LEVELS) == Usual(preset="spade", recipe="exact", method=Method())


def test_default_is_windows_of_a_hundred_normals_at_all_levels() -> None:
    preset = load_preset("default")
    assert (preset.extraction.pool, preset.extraction.pool_border) == (3, "zero")
    usual = preset.usual(LEVELS)
    assert (usual.recipe, usual.method.levels, usual.method.k_gallery, usual.method.score) == ("location", (), 100, "top")


def test_levels_that_a_network_does_not_have_are_left_out() -> None:
    preset = Preset(name="joined", method=Method(levels=("#2+#3",)))
    assert preset.usual(LEVELS[:2]).method.levels == ("mid",)
    assert preset.usual(LEVELS[:1]).method.levels == ()
    # Names that are numbers are no numbers.
    assert preset.usual(("3", "2", "1")).method.levels == ("2+1",)
    named = Preset(name="own", method=Method(levels=("3+2", "#1"), k_gallery=(5, 7)))
    assert named.usual(("1", "2", "3")).method == Method(levels=("3+2", "1"), k_gallery=(5, 7))
    fewer = Preset(name="own", method=Method(levels=("#1", "#2+#3", "#4"), k_gallery=(5, ALL, 3)))
    assert fewer.usual(LEVELS).method == Method(levels=("fine", "mid+coarse"), k_gallery=(5, ALL))


def test_levels_are_counted_from_one() -> None:
    preset = Preset(name="wrong", method=Method(levels=("#0+#1",)))
    with pytest.raises(InputError, match="'#0' is no number of a level"):
        preset.usual(LEVELS)


def test_settings_that_are_not_at_their_defaults_win() -> None:
    preset = load_preset("default").with_extraction(
        Extraction(pool=5, backbone="efficientnet_lite0", preprocess=Preprocess(size=448))
    )
    extraction = preset.extraction
    assert (extraction.pool, extraction.pool_border, extraction.backbone) == (5, "zero", "efficientnet_lite0")
    assert extraction.preprocess == Preprocess(size=448)
    own = replace(load_preset("spade"), extraction=Extraction(preprocess=Preprocess(resize_mode="stretch")))
    assert own.with_extraction(Extraction()).extraction.preprocess.resize_mode == "stretch"


@pytest.mark.parametrize(
    ("k_gallery", "images", "expected"),
    [(150, 200, 150), (150, 150, ALL), (150, 20, ALL), (ALL, 20, ALL), (5, 3, ALL), (5, 6, 5), ((20, ALL), 20, (ALL, ALL))],
)
def test_a_small_bank_is_taken_as_a_whole(k_gallery: object, images: int, expected: object) -> None:
    assert of_few(Method(k_gallery=k_gallery), images).k_gallery == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "siblings", "expected"),
    [(0, 1, 1), (1, 1, 1), (2, 1, 1), (4, 1, 3), (5, 1, 4), (6, 1, 5), (9, 6, 3), (8, 8, 5)],
)
def test_images_of_a_small_bank_are_compared_with_all_others(entries: int, siblings: int, expected: int) -> None:
    """As many as there are for each, where the entries of one image are left out to compare it with the others, if any."""
    assert of_few(Method(k_image=5), entries, siblings).k_image == expected


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("name: own\nextraction: {pool: [1, 3, 3]}\nmethod: {k_gallery: [20, all], levels: ['#1', '#2+#3']}\n")
    preset = load_preset(path)
    assert preset.extraction.pool == (1, 3, 3)
    assert preset.usual(LEVELS).method == Method(k_gallery=(20, ALL), levels=("fine", "mid+coarse"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: own\nextraction: {pol: 3}\n", "unknown key 'pol'"),
        ("name: own\nmethod: {score: best}\n", "score='best' is not one of"),
        ("name: own\nrecipe: ../../other\n", "is not the name of a recipe"),
        ("name: own\nmethod: {localize: none}\n", "is no setting of a preset"),
        ("name: [\n", "is not valid YAML"),
        ("- 1\n", "expected a mapping"),
    ],
)
def test_a_file_that_holds_no_preset(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_preset(path)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(NotFoundError, match=r"no preset '\.\./indexes/exact'; known are default, rad, spade"):
        load_preset("../indexes/exact")


def test_what_follows_from_a_size_follows_anew() -> None:
    preset = Preset(name="large", extraction=Extraction(preprocess=Preprocess(size=448)))
    assert preset.with_extraction(Extraction(preprocess=Preprocess(size=224 * 3))).extraction.preprocess == Preprocess(size=672)
    tiled = load_preset("default").with_extraction(Extraction(preprocess=Preprocess(tile=448)))
    assert tiled.extraction.preprocess == Preprocess(tile=448)
    assert tiled.extraction.preprocess.resize is None  # a picture keeps its own pixels
