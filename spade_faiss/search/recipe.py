"""Index recipes: which indexes a bank gets and how they are queried, as YAML that people read, copy and edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from spade_faiss.core.declaring import check_indexed_levels
from spade_faiss.core.errors import InputError
from spade_faiss.core.named_files import packaged_names, parse_value, read_named
from spade_faiss.core.schema import check_choice, from_mapping

# The folder of the package's own.
_FOLDER = "indexes"

# The settings of a search method.
Settings = dict[str, int | float | str]


@cache
def gallery_names() -> tuple[str, ...]:
    """The search methods: the modules of this package that define a `METHOD`.

    Their text is searched for it. To import them would import FAISS, which a command that only checks its arguments does not
    need.
    """
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(path.stem for path in modules if "\nMETHOD = " in path.read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Build:
    """The part of a recipe that needs a build.

    Attributes:
        image: a FAISS factory string for the index over the image embeddings.
        gallery: the search method of the neighbors' maps, see `gallery_names`.
        settings: the build settings of that method.
        levels: the levels that it encodes, those to be searched as one joined by `+`; empty for each of the bank's levels.
    """

    image: str = "Flat"
    gallery: str = "exact"
    settings: Settings = field(default_factory=dict)
    levels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("gallery", self.gallery, gallery_names())
        check_indexed_levels(self.levels)


@dataclass(frozen=True, kw_only=True)
class Query:
    """The part of a recipe that may change from query to query.

    Attributes:
        image: a FAISS parameter string for the image index, for instance `efSearch=128`.
        settings: the query settings of the search method.
    """

    image: str = ""
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe.

    Attributes:
        name: the recipe's name, which is also that of the folder with its indexes.
        description: a sentence that says what the recipe is for.
        build: what is built.
        query: how it is queried.
    """

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

    def with_levels(self, levels: Sequence[str]) -> Recipe:
        """The recipe with other levels to index, see `Build`; itself if none is named."""
        return replace(self, build=replace(self.build, levels=tuple(levels))) if levels else self

    @property
    def within_product(self) -> Recipe:
        """The recipe for one product of a bank of several: its images are few enough to be searched flat.

        An index of all of them cannot be restricted to some of them exactly, whatever its kind.
        """
        build, query = replace(self.build, image="Flat"), replace(self.query, image="")
        return replace(self, build=build, query=query)

    def with_query(self, changes: Mapping[str, str]) -> Recipe:
        """The recipe with other query settings.

        Settings that the search method does not know are refused later, when the recipe is resolved.

        Args:
            changes: values as text, read as YAML reads them, by setting; `image` is the parameter string of the image index.

        Raises:
            InputError: for a value that is not valid YAML.
        """
        values = {name: parse_value(name, text) for name, text in changes.items() if name != "image"}
        query = Query(image=changes.get("image", self.query.image), settings={**self.query.settings, **values})
        return replace(self, query=query)


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """Load a recipe of the package by its name, or any other from a YAML file.

    Raises:
        NotFoundError: for a name that is neither one of the package's recipes nor a file.
        InputError: for a file that holds no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    content, where = read_named("recipe", _FOLDER, recipe)
    return from_mapping(Recipe, content, where)


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return packaged_names(_FOLDER)
