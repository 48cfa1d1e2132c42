"""Index recipes: which indexes a bank gets and how they are queried, as YAML that people read, copy and edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from spade_faiss.config import check_choice, from_mapping
from spade_faiss.errors import InputError, NotFoundError

GALLERIES = ("exact",)


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is built once: `image` is a FAISS factory string over the embeddings, `gallery` the way the maps are searched."""

    image: str = "Flat"
    gallery: str = "exact"

    def __post_init__(self) -> None:
        check_choice("gallery", self.gallery, GALLERIES)


@dataclass(frozen=True, kw_only=True)
class Query:
    """What may change from query to query: `image` is a FAISS parameter string, for instance `efSearch=128`."""

    image: str = ""


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
    def needs_index(self) -> bool:
        """Whether something must be built before the first query; a flat index is made when the bank is opened."""
        return self.build.image != "Flat"


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise InputError(f"{path} is not valid YAML: {error}") from error
    return from_mapping(Recipe, content, str(path))


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    # A wheel carries the recipes inside the package; in a checkout they stand at the top level.
    packaged = Path(__file__).parent / "indexes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "indexes"
