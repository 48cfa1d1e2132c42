"""One recipe for each search method, with settings that suit small maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from spade_faiss.search.recipe import Build, Query, Recipe

EXACT = Recipe(name="exact")
FAISS = Recipe(name="exact-by-faiss", query=Query(settings={"engine": "faiss"}))
LOCATION = Recipe(name="location", build=Build(gallery="location"), query=Query(settings={"radius": 2}))
IVF = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 8}), query=Query(settings={"nprobe": 2}))
COMPACT = Recipe(name="compact", build=Build(gallery="compact", settings={"dims": 4}), query=Query(settings={"rerank": 3}))
CLUSTERS = Recipe(name="clusters", build=Build(gallery="clusters"))
HISTORY = Recipe(name="history", build=Build(gallery="history", settings={"lists": 3}), query=Query(settings={"nprobe": 1}))
GLOBAL = Recipe(
    name="global",
    build=Build(gallery="global_index", settings={"dims": 8, "lists": 6}),
    query=Query(settings={"nprobe": 2, "rerank": 4}),
)
# Those that search each test image's own neighbors, and all.
OF_NEIGHBORS = [EXACT, FAISS, LOCATION, IVF, COMPACT, CLUSTERS]
ALL = [*OF_NEIGHBORS, HISTORY, GLOBAL]
# Those that store something beside the bank.
ENCODING = [IVF, COMPACT, HISTORY, CLUSTERS, GLOBAL]


def by_name(recipes: Sequence[Recipe]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", recipes, ids=lambda recipe: recipe.name)


def built(recipe: Recipe, **changes: int) -> Recipe:
    return replace(recipe, build=replace(recipe.build, settings={**recipe.build.settings, **changes}))


def queried(recipe: Recipe, **changes: int | str) -> Recipe:
    return replace(recipe, query=replace(recipe.query, settings={**recipe.query.settings, **changes}))
