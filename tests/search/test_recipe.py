"""Recipes: those that come with the package, those in files, and everything that is no recipe."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from spade_faiss.core.errors import InputError, NotFoundError, SpadeError
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe, gallery_names, load_recipe, recipe_names


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_recipe_of_ours_loads_and_is_named_as_its_file() -> None:
    names = recipe_names()
    assert names == sorted(names)
    assert {"exact", "hnsw"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description.endswith(".")
        assert recipe.needs_image_index == (recipe.build.image != "Flat")


def test_the_default_recipe_approximates_nothing() -> None:
    recipe = load_recipe("exact")
    assert (recipe.build, recipe.query) == (Build(image="Flat", gallery="exact"), Query(image=""))
    assert not recipe.needs_image_index


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    text = "name: mine\nbuild: {image: 'IVF4,Flat'}\nquery:\n  image: nprobe=4\n"
    expected = Recipe(name="mine", build=Build(image="IVF4,Flat"), query=Query(image="nprobe=4"))
    for path in (write(tmp_path, text), write(tmp_path, text, "mine.yml")):
        assert load_recipe(path) == expected
        assert load_recipe(str(path)) == expected
    assert expected.needs_image_index
    assert load_recipe(expected) is expected


def test_all_but_the_name_has_a_default(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "name: plain\n")) == Recipe(name="plain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping, got NoneType"),
        ("- a\n", "expected a mapping, got list"),
        ("description: d\n", "missing key 'name'"),
        ("name: a\nbuilt: {}\n", "unknown key 'built'; known are name, description, build, query"),
        ("name: a\nbuild: {imaeg: Flat}\n", "build: unknown key 'imaeg'"),
        ("name: a\nquery: {efSearch: 3}\n", "query: unknown key 'efSearch'"),
        ("name: a\nbuild: Flat\n", "build: expected a mapping, got str"),
        ("name: 5\n", "name=5 is of type int, expected str"),
        ("name: a\nbuild: {image: 5}\n", "build: image=5 is of type int"),
        ("name: a\nbuild: {gallery: magic}\n", "build: gallery='magic' is not one of clusters, compact, exact"),
        ("name: ''\n", "recipe name '' must consist of letters"),
        ("name: '--'\n", "recipe name '--' must consist of letters"),
        ("name: a.b\n", "recipe name 'a.b' must consist of letters, digits, '-' and '_'"),
        # An index is kept in a folder of the recipe's name.
        ("name: ../../x\n", "recipe name '../../x' must consist of letters"),
        ("name: a/b\n", "recipe name 'a/b' must consist of letters"),
        ("name: [\n", "is not valid YAML"),
        ("name: a\n\tb: c\n", "is not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
        ("name: 2020-13-45\n", "is not valid YAML: month must be in 1..12"),
        ("name: " + "[" * 5000, "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_file_of_bytes_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["nothing", "", ".", "..", "exact ", "Exact", "a\0b", "a" * 5000, "missing.yaml"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(NotFoundError, match=r"known are clusters, compact, exact, .*hnsw.*, or pass a .yaml file") as caught:
        load_recipe(name)
    assert repr(name) in str(caught.value)


def test_a_name_leads_nowhere_but_to_our_own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "name: other\n", "other.yaml")
    for name in ("other", "./other", "../indexes/exact", "/exact", str(tmp_path / "other"), "./exact"):
        with pytest.raises(NotFoundError, match="no recipe"):
            load_recipe(name)
    assert load_recipe("other.yaml").name == "other"


def test_what_is_written_out_is_read_back(tmp_path: Path) -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        content: dict[str, Any] = {
            "name": recipe.name,
            "description": recipe.description,
            "build": asdict(recipe.build),
            "query": asdict(recipe.query),
        }
        assert load_recipe(write(tmp_path, yaml.safe_dump(content))) == recipe


def test_errors_are_ours() -> None:
    assert issubclass(NotFoundError, SpadeError)
    assert issubclass(NotFoundError, FileNotFoundError)


# Gallery settings


def test_every_recipe_of_ours_is_understood_by_its_gallery() -> None:
    """What it sets exists and has the value that it says; what it leaves out has a default."""
    searched_by = set()
    for name in recipe_names():
        recipe = load_recipe(name)
        chosen = resolve_recipe(recipe)
        searched_by.add(recipe.build.gallery)
        assert chosen.method is importlib.import_module(f"spade_faiss.search.{recipe.build.gallery}").METHOD
        assert chosen.method.definition.endswith(".")
        assert isinstance(chosen.build, chosen.method.build)
        assert isinstance(chosen.query, chosen.method.query)
        for made, settings in ((chosen.build, recipe.build.settings), (chosen.query, recipe.query.settings)):
            assert {key: getattr(made, key) for key in settings} == settings
        # Both or neither: what is learned is for encoding with.
        assert (chosen.method.train is None) == (chosen.method.encode is None)
    assert searched_by == set(gallery_names())


@pytest.mark.parametrize("gallery", gallery_names())
def test_settings_that_are_left_out_have_the_defaults_of_our_own_recipe(gallery: str) -> None:
    """So that a recipe of one's own which names nothing but the gallery is ours."""
    name = next(name for name in recipe_names() if load_recipe(name).build.gallery == gallery)
    plain, ours = resolve_recipe(Recipe(name="r", build=Build(gallery=gallery))), resolve_recipe(load_recipe(name))
    assert (plain.build, plain.query) == (ours.build, ours.query)


def test_gallery_settings_in_a_file_of_ones_own(tmp_path: Path) -> None:
    text = "name: mine\nbuild:\n  gallery: ivf\n  settings: {lists: 9, train_vectors: 1000}\nquery:\n  settings: {nprobe: 3}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.build.settings == {"lists": 9, "train_vectors": 1000}
    assert recipe.query.settings == {"nprobe": 3}
    chosen = resolve_recipe(recipe)
    assert (chosen.build.lists, chosen.build.train_vectors, chosen.query.nprobe) == (9, 1000, 3)
    assert {field.name for field in fields(chosen.build)} == {"lists", "train_vectors"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown: for this gallery, or because it belongs to the other half
        ("build: {gallery: ivf, settings: {list: 9}}", "build: settings: unknown key 'list'; known are lists, train_vectors"),
        ("build: {gallery: ivf}\nquery: {settings: {nprobes: 3}}", "query: settings: unknown key 'nprobes'; known are nprobe"),
        ("build: {gallery: ivf, settings: {nprobe: 9}}", "build: settings: unknown key 'nprobe'"),
        (
            "build: {gallery: compact}\nquery: {settings: {nprobe: 3}}",
            "query: settings: unknown key 'nprobe'; known are rerank",
        ),
        ("build: {gallery: exact, settings: {lists: 3}}", "build: settings: unknown key 'lists'"),
        ("query: {settings: {radius: 3}}", "query: settings: unknown key 'radius'"),
        # of the wrong type
        ("build: {gallery: ivf, settings: {lists: many}}", "build: settings: lists='many' is of type str, expected int"),
        ("build: {gallery: ivf, settings: {lists: 9.5}}", "build: settings: lists=9.5 is of type float, expected int"),
        ("build: {gallery: location}\nquery: {settings: {radius: '3'}}", "query: settings: radius='3' is of type str"),
        # out of range
        ("build: {gallery: ivf, settings: {lists: 0}}", "build: settings: lists=0 must be an integer of at least 1"),
        (
            "build: {gallery: ivf, settings: {lists: 64, train_vectors: 63}}",
            "train_vectors=63 must be an integer of at least 64",
        ),
        ("build: {gallery: ivf}\nquery: {settings: {nprobe: 0}}", "query: settings: nprobe=0 must be an integer of at least 1"),
        ("build: {gallery: compact, settings: {dims: 1}}", "build: settings: dims=1 must be an integer of at least 2"),
        ("build: {gallery: compact}\nquery: {settings: {rerank: 0}}", "query: settings: rerank=0 must be"),
        ("build: {gallery: location}\nquery: {settings: {radius: -1}}", "query: settings: radius=-1 must be"),
    ],
)
def test_gallery_settings_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe = load_recipe(write(tmp_path, f"name: mine\n{text}\n"))
    with pytest.raises(InputError) as caught:
        resolve_recipe(recipe)
    assert str(caught.value).startswith("recipe 'mine': ")
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["true", "[1]", "null"])
@pytest.mark.parametrize("half", ["build", "query"])
def test_a_gallery_setting_that_is_neither_number_nor_text_is_named(tmp_path: Path, half: str, value: str) -> None:
    setting = {"build": "lists", "query": "nprobe"}[half]
    content = {"build": "", "query": "build: {gallery: ivf}\n"}[half]
    gallery = {"build": "gallery: ivf, ", "query": ""}[half]
    path = write(tmp_path, f"name: mine\n{content}{half}: {{{gallery}settings: {{{setting}: {value}}}}}\n")
    with pytest.raises(InputError, match=f"{half}: .*{setting}") as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))


# Query settings, changed


def changed(recipe: Recipe, changes: Mapping[str, str]) -> Query:
    """What `with_query` makes of a recipe's query; everything else must stay."""
    before, found = asdict(recipe), recipe.with_query(changes)
    assert asdict(recipe) == before
    assert (found.name, found.description, found.build) == (recipe.name, recipe.description, recipe.build)
    return found.query


def test_query_settings_are_changed_and_nothing_else() -> None:
    ours = Recipe(
        name="r",
        description="d.",
        build=Build(gallery="ivf"),
        query=Query(image="efSearch=8", settings={"nprobe": 2, "more": 1}),
    )
    assert changed(ours, {}) == ours.query
    assert changed(ours, {"nprobe": "9"}) == Query(image="efSearch=8", settings={"nprobe": 9, "more": 1})
    assert changed(ours, {"image": "efSearch=32"}) == Query(image="efSearch=32", settings={"nprobe": 2, "more": 1})
    both = {"image": "efSearch=32,nprobe=4", "nprobe": "9", "new": "x"}
    assert changed(ours, both) == Query(image="efSearch=32,nprobe=4", settings={"nprobe": 9, "more": 1, "new": "x"})


@pytest.mark.parametrize(("text", "value"), [("9", 9), ("9.5", 9.5), ("-1", -1), ("many", "many"), ("'9'", "9"), ("0x10", 16)])
def test_values_are_read_as_yaml_reads_them(text: str, value: object) -> None:
    assert changed(load_recipe("ivf"), {"nprobe": text}).settings["nprobe"] == value


def test_what_the_gallery_does_not_know_is_refused_when_it_is_opened() -> None:
    for name, changes, message in (
        ("ivf", {"nprob": "2"}, "recipe 'ivf': query: settings: unknown key 'nprob'; known are nprobe"),
        ("ivf", {"lists": "2"}, "unknown key 'lists'; known are nprobe"),  # needs a build
        ("ivf", {"nprobe": "many"}, "nprobe='many' is of type str, expected int"),
        ("ivf", {"nprobe": "yes"}, "nprobe=True is of type bool, expected int"),
        ("ivf", {"nprobe": "[2]"}, "nprobe=.2. is of type list, expected int"),
        ("ivf", {"nprobe": ""}, "nprobe=None is of type NoneType, expected int"),
        ("ivf", {"nprobe": "0"}, "nprobe=0 must be an integer of at least 1"),
        ("compact", {"rerank": "1.5"}, "rerank=1.5 is of type float"),
        ("exact", {"nprobe": "2"}, "recipe 'exact': query: settings: unknown key 'nprobe'"),
    ):
        with pytest.raises(InputError, match=message):
            resolve_recipe(load_recipe(name).with_query(changes))


@pytest.mark.parametrize("text", ["[", "2020-13-45", "!!python/name:os.system", "[" * 5000])
def test_a_value_that_is_no_yaml_is_an_error_that_names_the_setting(text: str) -> None:
    with pytest.raises(InputError, match="nprobe"):
        resolve_recipe(load_recipe("ivf").with_query({"nprobe": text}))
