"""Searching the neighbors' maps: one file per way of searching, behind the protocol `GallerySearch`.

A file holds a `METHOD`: the settings it takes, and how it is opened for one level of a bank. To add a way of searching, write
such a file, name it in `recipe.GALLERIES`, and write a recipe for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import from_mapping
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.recipe import Recipe
from spade_faiss.search.workers import Workers

Arrays = dict[str, npt.NDArray[Any]]
# The metadata of a query setting that says how results are computed, not which.
SAME_SCORES = {"same_scores": True}

B = TypeVar("B")
Q = TypeVar("Q")


@dataclass(frozen=True, eq=False)
class Hits:
    """The nearest gallery vectors of n images' locations.

    Args:
        sq_dist: (n, HW, kappa) squared L2 distances, ascending.
        row: (n, HW), the bank row of the normal image that holds the nearest vector.
        location: (n, HW), its location in that image's map, `y * W + x`.
    """

    sq_dist: FloatArray
    row: IntArray
    location: IntArray


class GallerySearch(Protocol):
    """A way to find, for each location of each test image, the nearest vectors in a few normal images' maps at one level.

    An implementation holds no state of a call and is safe to share between threads. It must return the same numbers whatever
    the other test images of the batch are, break ties between images by the smaller bank row (of equal vectors in one image it
    may name any), and never change its arguments. It may be approximate; distances it returns are true distances to the
    vectors it names.
    """

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """Search.

        Args:
            xq: (n, HW, C) float32, the test images' vectors.
            neighbors: (n, K), each test image's own gallery: bank rows, distinct within a line.
            kappa: neighbors to return; at most K * HW.
        """
        ...

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """The most that a call may hold at a time beside its arguments and the cache of decoded blocks."""
        ...


@dataclass(frozen=True)
class NoSettings:
    """Of a method that has nothing to set."""


class Encoded(Protocol):
    """What a method keeps of one level: what was learned from a sample of the bank, and something of each normal image."""

    @property
    def trained(self) -> Arrays:
        """What `SearchMethod.train` returned."""
        ...

    def __call__(self, row: int) -> Arrays:
        """What `SearchMethod.encode` returned for a bank row; it may be read-only views of a file."""
        ...


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Generic[B, Q]):
    """A way of searching.

    Args:
        definition: what is found, in a sentence that stands in results.
        build: dataclass of the settings of what is kept beside the bank; changing one means building again.
        query: dataclass of the settings that may change from query to query.
        open: makes the search of one level, from its blocks, the workers, both settings, and what is kept.
        train: learns from a sample of a level's blocks; None for a method that keeps nothing.
        encode: turns a block, (H*W, C) float32, into what is kept of it: arrays whose shapes and types are the same for all
            blocks. It must depend on its arguments alone: an image that was added since the build is encoded when it is met.
        whole_bank: whether it searches all normal images, whoever the neighbors are.
        check_trained: raises InputError if arrays are not what `train` can have returned for a level with these settings; what
            was stored may come from anybody, and is searched without further checks.
        check_encoded: likewise for `encode`, given what was trained; called whenever an encoding is read.
    """

    definition: str
    build: type[B]
    query: type[Q]
    open: Callable[[Blocks, Workers, B, Q, Encoded | None], GallerySearch]
    train: Callable[[Blocks, B], Arrays] | None = None
    encode: Callable[[FloatArray, Arrays, B], Arrays] | None = None
    whole_bank: bool = False
    check_trained: Callable[[Level, Arrays, B], None] | None = None
    check_encoded: Callable[[Level, Arrays, Arrays, B], None] | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe, its search method, and the settings of both kinds, checked and with their defaults written out."""

    recipe: Recipe
    method: SearchMethod[Any, Any]
    build: Any
    query: Any


def check_arrays(found: Arrays, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Raise InputError unless arrays have the names, shapes and dtypes that are expected, and only finite values."""
    for name in (*expected, *found):
        shape = (found[name].shape, found[name].dtype.name) if name in found else "missing"
        if shape != (wanted := expected.get(name, "no such array")):
            raise InputError(f"{name} is {shape}, expected {wanted}")
        if found[name].dtype.kind == "f" and not np.isfinite(found[name]).all():
            raise InputError(f"{name} holds values that are not finite")


def resolve_recipe(recipe: Recipe) -> ResolvedRecipe:
    """Find the search method that a recipe names, and check its settings.

    Raises:
        InputError: for settings that the method does not have, or that are out of range.
    """
    method: SearchMethod[Any, Any] = importlib.import_module(f"spade_faiss.search.{recipe.build.gallery}").METHOD
    return ResolvedRecipe(
        recipe=recipe,
        method=method,
        build=from_mapping(method.build, recipe.build.settings, f"recipe {recipe.name!r}: build: settings"),
        query=from_mapping(method.query, recipe.query.settings, f"recipe {recipe.name!r}: query: settings"),
    )
