"""Tests every recipe on a device: scores of a small generated bank are compared with SPADE written out in float64."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import SpadeError
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout, prepare
from spade_faiss.index.build import build_index
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores
from spade_faiss.search.recipe import Recipe, load_recipe, recipe_names

# Distances may be off by this share of themselves, as README promises.
TOLERANCE = 1e-4
_NORMALS, _TESTS, _K, _DIM = 40, 3, 5, 64
_LEVELS = (Level("fine", 24, stride=4, height=14, width=13), Level("coarse", 48, stride=8, height=7, width=6))
_INPUT = (56, 52)
_LATENT = 6

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """How near the results of a recipe came to those of float64.

    Args:
        name: the name of the recipe, with the engine if it is not the recipe's own.
        exact: whether the recipe must find the nearest.
        error: the largest error of a distance, as a share of the true one.
        locations_found: the share of the locations whose nearest vector was found.
        images_found: the share of the nearest normal images that were found.
        problem: why the recipe did not run; empty if it ran.
    """

    name: str
    exact: bool
    error: float = np.inf
    locations_found: float = 0.0
    images_found: float = 0.0
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether distances are right, and the nearest normal images were found if they must be."""
        return not self.problem and self.error <= TOLERANCE and (not self.exact or self.images_found == 1)


@dataclass(frozen=True, eq=False)
class _Problem:
    """A bank, test images, and what exact scoring of them must give.

    `rows` (n, K) are the bank's rows that are nearest to each test image, `neighbor_dist` (n, K) their distances, and
    `level_dist` the distance of each location, (n, H, W), at each level.
    """

    bank: Bank
    normals: FeatureBatch
    tests: FeatureBatch
    rows: npt.NDArray[np.int64]
    neighbor_dist: Doubles
    level_dist: dict[str, Doubles]


def run_self_test(device: str, engines: tuple[str, ...]) -> list[SelfTest]:
    """Score a small generated bank by every recipe on a device, and by `exact` with each of these engines."""
    recipes = [(name, load_recipe(name)) for name in recipe_names()]
    exact = load_recipe("exact")
    recipes += [(f"exact by {engine}", exact.with_query({"engine": engine})) for engine in engines]
    with tempfile.TemporaryDirectory(prefix="spade_faiss") as folder:
        problem = _make_problem(Path(folder) / "bank")
        return [_test_recipe(name, recipe, problem, device) for name, recipe in recipes]


def _make_problem(path: Path) -> _Problem:
    bank = Bank.create(path, Layout(levels=_LEVELS, embedding_dim=_DIM, input_size=_INPUT))
    bank.append(_generate_images(0, _NORMALS))
    # Both sides are compared as they are searched, in half precision: as the bank stores its images, and prepares test images.
    normals, tests = bank.read(np.arange(_NORMALS)), prepare(_generate_images(1, _TESTS), bank.layout)
    dist = np.linalg.norm(tests.embedding[:, None].astype(np.float64) - normals.embedding[None], axis=-1)
    rows = dist.argsort(axis=1, kind="stable")[:, :_K]
    level_dist = {level.name: _solve_level(level, normals, tests, rows) for level in _LEVELS}
    return _Problem(bank, normals, tests, rows, np.take_along_axis(dist, rows, axis=1), level_dist)


def _solve_level(level: Level, normals: FeatureBatch, tests: FeatureBatch, rows: npt.NDArray[np.int64]) -> Doubles:
    """Search for the nearest vector of every location, one by one, in float64."""
    shape = (-1, level.height * level.width, level.channels)
    xq, xb = tests.levels[level.name].reshape(shape).astype(np.float64), normals.levels[level.name].reshape(shape)
    dist = []
    for vectors, of_image in zip(xq, rows, strict=True):
        gallery = xb[of_image].reshape(-1, level.channels).astype(np.float64)
        dist.append(np.stack([np.sqrt(np.square(gallery - vector).sum(axis=1).min()) for vector in vectors]))
    return np.stack(dist).reshape(-1, level.height, level.width)


def _test_recipe(name: str, recipe: Recipe, problem: _Problem, device: str) -> SelfTest:
    exact = recipe.build.gallery == "exact"
    try:
        build_index(problem.bank, recipe)
        method = Method(k_image=_K, k_gallery=_K)
        detector = Detector.open(problem.bank.path, recipe=recipe, method=method, run=Run(device=device))
        scores = detector.score_features(problem.tests)
    except (SpadeError, RuntimeError) as error:
        return SelfTest(name=name, exact=exact, problem=" ".join(str(error).split())[:300])
    locations_found = []
    for level in _LEVELS:
        dist = scores.level_dist[level.name].astype(np.float64)
        locations_found.append(np.isclose(dist, problem.level_dist[level.name], rtol=TOLERANCE, atol=1e-9).mean())
    ids = np.array(problem.bank.ids)
    images_found = [
        np.isin(ids[nearest], names).mean() for nearest, names in zip(problem.rows, scores.neighbor_ids, strict=True)
    ]
    return SelfTest(
        name=name,
        exact=exact,
        error=max(_errors(recipe, problem, scores)),
        locations_found=float(np.mean(locations_found)),
        images_found=float(np.mean(images_found)),
    )


def _errors(recipe: Recipe, problem: _Problem, scores: Scores) -> list[float]:
    """The largest errors of the distances that a recipe gave.

    Every distance must be that of the location that it names; those of exact search must be the smallest there are, too.
    """
    errors = []
    for level in _LEVELS:
        dist, nearest = scores.level_dist[level.name].astype(np.float64), scores.nearest[level.name]
        named = problem.normals.levels[level.name][nearest["row"], nearest["y"], nearest["x"]]
        named_dist = np.linalg.norm(problem.tests.levels[level.name] - named.astype(np.float64), axis=-1)
        errors.append(_largest_error(dist, named_dist))
        if recipe.build.gallery == "exact":
            errors.append(_largest_error(dist, problem.level_dist[level.name]))
    if recipe.build.image == "Flat":
        errors.append(_largest_error(scores.neighbor_dist, problem.neighbor_dist))
    return errors


def _largest_error(dist: npt.NDArray[np.floating[Any]], expected: Doubles) -> float:
    return float(np.max(np.abs(dist - expected) / np.maximum(expected, 1e-6)))


def _generate_images(seed: int, count: int) -> FeatureBatch:
    """Generate the features of images of one product.

    Smooth patterns are mixed into channels that share an offset. One corner is flat, the same in all images.
    """
    rng = np.random.default_rng([seed, 77])
    pose = rng.normal(size=(count, _LATENT))
    maps: dict[str, FloatArray] = {}
    for index, level in enumerate(_LEVELS):
        fixed = np.random.default_rng([index, 78])
        waves, mix = fixed.normal(size=(2, _LATENT)), fixed.normal(size=(_LATENT, level.channels))
        y, x = np.linspace(0, 3, level.height)[:, None, None], np.linspace(0, 3, level.width)[None, :, None]
        latent = np.sin(y * waves[0] + x * waves[1] + 0.3 * pose[:, None, None, :])
        values = 3 + latent @ mix + 0.1 * rng.normal(size=(count, *level.shape))
        values[:, : level.height // 3, : level.width // 3] = 3
        maps[level.name] = values.astype(np.float32)
    embedding = pose @ np.random.default_rng(79).normal(size=(_LATENT, _DIM)) + 0.05 * rng.normal(size=(count, _DIM))
    return FeatureBatch([f"{seed}/{number}" for number in range(count)], embedding.astype(np.float32), maps)
