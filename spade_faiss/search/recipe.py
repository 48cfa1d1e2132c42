"""Index recipes: which indexes a bank gets and how they are queried, as YAML that people read, copy and edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.schema import check_choice, from_mapping

GALLERIES = ("exact", "location", "history", "compact", "ivf")

# ValueError: no UTF-8, or a date that does not exist.
_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)

# What a gallery search can be told.
Settings = dict[str, int | float | str]


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is built once.

    `image`: a FAISS factory string over the embeddings. `gallery`: how the neighbors' maps are searched, a module of
    `spade_faiss.search.protocol`. `settings`: that module's build settings.
    """

    image: str = "Flat"
    gallery: str = "exact"
    settings: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("gallery", self.gallery, GALLERIES)


@dataclass(frozen=True, kw_only=True)
class Query:
    """What may change from query to query.

    `image`: a FAISS parameter string, for instance `efSearch=128`. `settings`: the gallery module's query settings.
    """

    image: str = ""
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe; `name` is the folder that its indexes are kept in."""

    name: str
    description: str = ""
    build: Build = field(default_factory=Build)
    query: Query = field(default_factory=Query)

    def __post_init__(self) -> None:
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"recipe name {self.name!r} must consist of letters, digits, '-' and '_'")

    @property
    def needs_image_index(self) -> bool:
        """Whether the image index must be built before the first query; a flat one is made when the bank is opened."""
        return self.build.image != "Flat"

    def with_query(self, changes: Mapping[str, str]) -> Recipe:
        """The recipe with other query settings; values as text, read as YAML reads them. `image` is the image index's string.

        What the gallery does not know is refused when it is opened.
        """
        values = {name: _value(name, text) for name, text in changes.items() if name != "image"}
        query = Query(image=changes.get("image", self.query.image), settings={**self.query.settings, **values})
        return replace(self, query=query)


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """A recipe by its name, or from a YAML file.

    Raises:
        NotFoundError: for a name that is neither one of ours nor a file.
        InputError: for a file that is no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    is_file = Path(recipe).suffix in (".yaml", ".yml")
    path = Path(recipe) if is_file else _folder() / f"{recipe}.yaml"
    # A name is looked up in the list, so that no '../' in it leads elsewhere.
    if not (path.is_file() if is_file else str(recipe) in recipe_names()):
        raise NotFoundError(f"no recipe {str(recipe)!r}; known are {', '.join(recipe_names())}, or pass a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except _NO_YAML as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    return from_mapping(Recipe, content, str(path))


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except _NO_YAML as error:
        raise InputError(f"{name}={text!r} is no value: {' '.join(str(error).split())}") from error


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    # A wheel carries the recipes inside the package; in a checkout they stand at the top level.
    packaged = Path(__file__).parent / "indexes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "indexes"
