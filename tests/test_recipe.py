"""Recipes: those that come with the package, those in files, and everything that is no recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from spade_faiss.errors import InputError, NotFoundError, SpadeError
from spade_faiss.recipe import Build, Query, Recipe, load_recipe, recipe_names


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
        ("name: a\nbuild: {gallery: magic}\n", "build: gallery='magic' is not one of exact"),
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
    with pytest.raises(NotFoundError, match=r"known are compact, exact, .*hnsw.*, or pass a .yaml file") as caught:
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
