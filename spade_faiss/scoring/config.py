"""The scoring config: a recipe and a method, written out in full, and the hash that names them."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from spade_faiss.core.declaring import ALL
from spade_faiss.core.presets import BankSize, Usual, of_few
from spade_faiss.core.settings import Method
from spade_faiss.core.signed_json import hash_json
from spade_faiss.search.protocol import ResolvedRecipe, resolve_recipe
from spade_faiss.search.recipe import Settings, load_recipe, recipe_names

_KEY_LENGTH = 16
_OF_METHOD = (
    *("k_image", "k_gallery", "kappa", "levels", "fusion", "distance", "sigma", "top_share", "tile_neighbors"),
    "level_weights",
)
# Settings that scoring configs had not at first: at their defaults the key is what it was, and calibrations stay valid.
_ADDED = ("top_share", "tile_neighbors", "level_weights")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Everything beside the bank that scores depend on: a calibration holds for one scoring config, and for no other."""

    recipe: str
    image_index: str
    image_query: str
    gallery: str
    build: Settings
    query: Settings
    k_image: int
    k_gallery: int | str | tuple[int | str, ...]
    kappa: int
    levels: tuple[str, ...]
    fusion: str
    distance: str
    sigma: float
    top_share: float = Method.top_share
    tile_neighbors: str = Method.tile_neighbors
    level_weights: tuple[float, ...] = Method.level_weights

    @staticmethod
    def of(resolved: ResolvedRecipe, method: Method) -> ScoringConfig:
        """The scoring config of a recipe, with its settings' defaults written out, and of a method."""
        of_method = {field.name: getattr(method, field.name) for field in fields(Method) if field.name in _OF_METHOD}
        if resolved.method.whole_bank:
            of_method["k_gallery"] = ALL  # it searches all normal images, whatever is asked for
        return ScoringConfig(
            recipe=resolved.recipe.name,
            image_index=resolved.recipe.build.image,
            image_query=resolved.recipe.query.image,
            gallery=resolved.recipe.build.gallery,
            build=asdict(resolved.build),
            query={
                setting.name: getattr(resolved.query, setting.name)
                for setting in fields(resolved.query)
                if not setting.metadata.get("same_scores")
            },
            **of_method,
        )

    @property
    def key(self) -> str:
        """A hash that names it."""
        named = {name: value for name, value in asdict(self).items() if name not in _ADDED or value != getattr(Method, name)}
        return hash_json(named)[:_KEY_LENGTH]

    def asks_as(self, size: BankSize, other: ScoringConfig, other_size: BankSize) -> bool:
        """Whether another config is what was asked for by this one, of a bank that had another size.

        A bank of few images is searched with fewer neighbors, see `of_few`: as it grows, what is asked for stays the same, and
        what that amounts to does not.
        """
        if self == other or replace(self, k_image=other.k_image, k_gallery=other.k_gallery) != other:
            return False
        ours, theirs = (each if isinstance(each, tuple) else (each,) for each in (self.k_gallery, other.k_gallery))
        if len(ours) != len(theirs):
            return False
        larger = tuple(map(_larger, ours, theirs))
        k_gallery = larger if isinstance(self.k_gallery, tuple) else larger[0]
        asked = Method(k_image=max(self.k_image, other.k_image), k_gallery=k_gallery)
        return all(
            (fitted.k_image, fitted.k_gallery) == (config.k_image, config.k_gallery)
            for config, fitted in ((self, of_few(asked, *size)), (other, of_few(asked, *other_size)))
        )

    def options(self, usual: Usual) -> str:
        """The options of the command line that ask for it, as a shell takes them, without those that are usual for the bank."""
        changed = [name for name in _OF_METHOD if getattr(self, name) != getattr(usual.method, name)]
        words = [] if self.recipe == usual.recipe else ["--recipe", self.recipe]
        for name, value in self.query.items():
            words += ["--set", f"{name}={value}"] if value != _usual(self.recipe).get(name) else []
        words += ["--set", f"image={self.image_query}"] if self.image_query else []
        for name in changed:
            words += [f"--{name.replace('_', '-')}", _as_text(getattr(self, name))]
        return shlex.join(words)


def _larger(ours: int | str, theirs: int | str) -> int | str:
    """The number of images, where one of both may be all that there were."""
    return theirs if ours == ALL else ours if theirs == ALL else max(int(ours), int(theirs))


def _as_text(value: object) -> str:
    """The value of a setting as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _usual(recipe: str) -> dict[str, Any]:
    """The query settings of a recipe of ours."""
    return asdict(resolve_recipe(load_recipe(recipe)).query) if recipe in recipe_names() else {}
