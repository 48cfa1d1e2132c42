"""The protocol of a search method: how the neighbors' maps are searched, one file per method.

A method is a module of this package that holds a `METHOD`: the settings that it takes, and how it is opened for one level of a
bank. To add one, write such a module and a recipe that names it; nothing else lists the methods. `spade_faiss.testing` has the
tests that every method must pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import from_mapping
from spade_faiss.core.types import Arrays, Bools, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.reach import Reach
from spade_faiss.search.recipe import Recipe
from spade_faiss.search.workers import Workers

# The metadata of a query setting that decides how results are computed, and not what they are.
SAME_SCORES = {"same_scores": True}

B = TypeVar("B")
Q = TypeVar("Q")


@dataclass(frozen=True, eq=False)
class Hits:
    """The nearest gallery vectors of all locations of n test images.

    Attributes:
        sq_dist: (n, HW, kappa) float32, squared L2 distances, ascending.
        row: (n, HW) int64, the bank row of the normal image that holds the nearest vector.
        location: (n, HW) int64, the location of that vector in the image's map, `y * W + x`; where a part of the map is
            inspected, its number among `level.cells`.
        passed_over: (n,), the share of the gallery's vectors that a search ruled out without a look at their codes; None for a
            search that looks at all of them, or does not count them.
    """

    sq_dist: FloatArray
    row: IntArray
    location: IntArray
    passed_over: FloatArray | None = None


class GallerySearch(Protocol):
    """A search of one level: it finds, for each location of each test image, the nearest vectors in a few normal images' maps.

    An implementation holds no state of a call and is safe to share between threads. It returns the same numbers whatever the
    other test images of the batch are, breaks ties between normal images by the smaller bank row (of equal vectors in one image
    it may name any), and never changes its arguments, which may be read-only. It may be approximate, but the distances that it
    returns are those of the vectors that it names.

    HW is the number of locations that are inspected, `level.locations`; in a bank without a region of interest, it is all.
    """

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """Search.

        Args:
            xq: (n, HW, C) float32, the vectors of the test images.
            neighbors: (n, K) int64, the gallery of each test image: bank rows, distinct within a line, in any order.
            kappa: number of vectors to find for each location, at most K * HW.

        Raises:
            InputError: for a `kappa` that is larger than what the method searches for a location.
        """
        ...

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """The most bytes that a call holds at a time, beside its arguments and the cache of decoded blocks.

        Args:
            images: number of test images of the call.
            k_gallery: number of neighbors of each.
            kappa: number of vectors to find for each location.
        """
        ...


@runtime_checkable
class PartialSearch(Protocol):
    """A `GallerySearch` for which a location's vectors are fewer than those of the gallery, and may be fewer than `kappa`."""

    def partial(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """Search a part of the gallery, and refuse no `kappa`: distances are infinite where a location has fewer vectors."""
        ...


@runtime_checkable
class WindowedSearch(Protocol):
    """A `GallerySearch` that compares a location with a window around its place, where images have regions of their own.

    How far a window must reach to hold `kappa` vectors depends on the regions of all images of the gallery: they are counted
    first, by whoever has them. So a gallery may be searched in parts.
    """

    def held(self, neighbors: IntArray) -> IntArray:
        """(n, HW), how many of the images (n, K) hold a vector at each location."""
        ...

    def reach(self, held: IntArray, inspected: Bools, kappa: int) -> Reach:
        """How far the window of each location reaches, see `reach.reach_of`; nothing is read for that.

        Args:
            held: (n, HW), what `held` returned, for all images of the galleries.
            inspected: (n, HW), which locations of the test images are searched for.
            kappa: number of vectors to find for each location.

        Returns:
            (n, HW) int32, cells; -1 for what is not searched for.
        """
        ...

    def within(self, xq: FloatArray, neighbors: IntArray, kappa: int, reach: Reach) -> Hits:
        """Search windows that reach so far; distances are infinite where a location has fewer vectors than `kappa`."""
        ...


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none."""


class Encoded(Protocol):
    """What a method has stored beside the bank for one level: what it learned, and the encoded map of each normal image."""

    @property
    def trained(self) -> Arrays:
        """What `SearchMethod.train` returned."""
        ...

    def __call__(self, row: int) -> Arrays:
        """What `SearchMethod.encode` returned for the map of a bank row; the arrays may be read-only views of a file.

        Not for a method that packs.
        """
        ...

    def packs(self) -> Sequence[Pack]:
        """The groups that together hold every image of the bank, for a method that packs, in the order of their rows."""
        ...


@dataclass(frozen=True, eq=False)
class Pack:
    """A group of images whose encodings are stored together.

    Attributes:
        rows: (count,) int64, their bank rows, ascending, in the order in which they were packed; -1 for a removed image.
        arrays: what `SearchMethod.pack` returned; they may be read-only views of a file.
    """

    rows: IntArray
    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Generic[B, Q]):
    """A search method: its settings, and how it is opened.

    Attributes:
        definition: a sentence that says what the method finds; it stands in results.
        build: the dataclass of the settings of what is stored beside the bank; changing one of them means building again.
        query: the dataclass of the settings that may change from query to query.
        open: makes the search of one level from its blocks, the workers, both settings, and what is stored of the level.
        train: learns from a sample of a level's blocks; None for a method that stores nothing.
        encode: turns a block, (H*W, C) float32, into the arrays that are stored of it. Their shapes and types must be the same
            for all blocks, and their values must depend on the arguments alone: an image that was added after the build is
            encoded when it is searched.
        pack: turns the encodings of a group of images, each array of `encode` stacked over them, into the arrays that are
            stored in their place; None for a method whose images are stored one by one.
        whole_bank: whether the method searches all normal images, whichever are nearest. Its neighbors are then all bank rows
            that may be found: an image that is itself in the bank is missing from its own.
        own_rois: whether it takes blocks that are `partial`, of images that have regions of interest of their own.
        check_trained: raises InputError if arrays are not what `train` can have returned for a level with these settings; what
            was stored may come from anybody, and is searched without further checks.
        check_encoded: likewise for `encode`, given what was trained; called whenever an encoding is read.
        check_packed: likewise for `pack`, given what was trained and the number of images.
    """

    definition: str
    build: type[B]
    query: type[Q]
    open: Callable[[Blocks, Workers, B, Q, Encoded | None], GallerySearch]
    train: Callable[[Blocks, B], Arrays] | None = None
    encode: Callable[[FloatArray, Arrays, B], Arrays] | None = None
    pack: Callable[[Arrays, Arrays, B], Arrays] | None = None
    whole_bank: bool = False
    own_rois: bool = False
    check_trained: Callable[[Level, Arrays, B], None] | None = None
    check_encoded: Callable[[Level, Arrays, Arrays, B], None] | None = None
    check_packed: Callable[[Level, Arrays, Arrays, int], None] | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe with its search method and the settings of both kinds, which are checked and have their defaults filled in."""

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


def check_own_rois(recipe: Recipe) -> None:
    """Raise InputError for a recipe that has no way to search where images have regions of interest of their own."""
    if not resolve_recipe(recipe).method.own_rois:
        raise InputError(
            f"recipe {recipe.name!r} takes one region of interest for all images, and each has one of its own here; use "
            "--recipe location or exact (for a new bank: --preset default or spade), or one mask for all: --roi MASK.png"
        )


def resolve_recipe(recipe: Recipe) -> ResolvedRecipe:
    """Find the search method that a recipe names, and check its settings.

    Raises:
        InputError: for settings that the method does not have, or that are out of range.
    """
    method: SearchMethod[Any, Any] = importlib.import_module(f"spade_faiss.search.{recipe.build.gallery}").METHOD
    if recipe.build.levels and method.train is None:
        raise InputError(
            f"recipe {recipe.name!r} searches levels {','.join(recipe.build.levels)} as they are, without an index of them; "
            "leave them out of its build section, and name them where you score"
        )
    return ResolvedRecipe(
        recipe=recipe,
        method=method,
        build=from_mapping(method.build, recipe.build.settings, f"recipe {recipe.name!r}: build: settings"),
        query=from_mapping(method.query, recipe.query.settings, f"recipe {recipe.name!r}: query: settings"),
    )
