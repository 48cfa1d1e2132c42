"""Is this machine right? Every recipe on a small problem, on the device, against SPADE written out in float64."""

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
from spade_faiss.search.recipe import Recipe, load_recipe, recipe_names

# A distance is right to this share of it, as docs/explanation/exactness.md promises.
TOLERANCE = 1e-4
_NORMALS, _TESTS, _K, _DIM = 40, 3, 5, 64
_LEVELS = (Level("fine", 24, stride=4, height=14, width=13), Level("coarse", 48, stride=8, height=7, width=6))
_INPUT = (56, 52)
_LATENT = 6

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What a recipe got right.

    Args:
        name: the recipe, and the engine if it is not the recipe's own.
        exact: whether it must find the nearest.
        error: how far distances are from what float64 says of them, at most, as a share.
        found: share of the locations whose nearest neighbor was found.
        images: share of the nearest normals that were found.
        problem: why it did not run.
    """

    name: str
    exact: bool
    error: float = np.inf
    found: float = 0.0
    images: float = 0.0
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether distances are right, and nearest where they must be."""
        return not self.problem and self.error <= TOLERANCE and (not self.exact or self.images == 1)


@dataclass(frozen=True, eq=False)
class _Truth:
    neighbor_dist: Doubles
    rows: npt.NDArray[np.int64]
    level_dist: dict[str, Doubles]


def run_self_test(device: str, engines: tuple[str, ...]) -> list[SelfTest]:
    """Score a small generated bank by every recipe on a device, and by `exact` with these engines, and rule."""
    normals, tests = _images(0, _NORMALS), _images(1, _TESTS)
    recipes = [(name, load_recipe(name)) for name in recipe_names()]
    exact = load_recipe("exact")
    recipes += [(f"exact by {engine}", exact.with_query({"engine": engine})) for engine in engines]
    with tempfile.TemporaryDirectory(prefix="spade_faiss") as folder:
        bank = Bank.create(Path(folder) / "bank", Layout(levels=_LEVELS, embedding_dim=_DIM, input_size=_INPUT))
        bank.append(normals)
        # What the bank holds is what is searched, and what it makes of test images searches: half precision.
        held, tests = bank.read(np.arange(_NORMALS)), prepare(tests, bank.layout)
        truth = _solve(held, tests)
        return [_prove(name, recipe, bank, held, tests, truth, device) for name, recipe in recipes]


def _prove(
    name: str, recipe: Recipe, bank: Bank, held: FeatureBatch, tests: FeatureBatch, truth: _Truth, device: str
) -> SelfTest:
    exact = recipe.build.gallery == "exact"
    try:
        build_index(bank, recipe)
        detector = Detector.open(bank.path, recipe=recipe, method=Method(k_image=_K, k_gallery=_K), run=Run(device=device))
        scores = detector.score_features(tests)
    except (SpadeError, RuntimeError) as error:
        return SelfTest(name=name, exact=exact, problem=" ".join(str(error).split())[:300])
    ids = np.array(bank.ids)
    images = np.mean([np.isin(ids[true], got).mean() for true, got in zip(truth.rows, scores.neighbor_ids, strict=True)])
    errors, found = [], []
    for level in _LEVELS:
        dist, nearest = scores.level_dist[level.name].astype(np.float64), scores.nearest[level.name]
        named = held.levels[level.name][nearest["row"], nearest["y"], nearest["x"]]
        errors.append(_share(dist, np.linalg.norm(tests.levels[level.name] - named.astype(np.float64), axis=-1)))
        right = np.isclose(dist, truth.level_dist[level.name], rtol=TOLERANCE, atol=1e-9)
        found.append(right.mean())
        if exact:
            errors.append(_share(dist, truth.level_dist[level.name]))
    if recipe.build.image == "Flat":
        errors.append(_share(scores.neighbor_dist, truth.neighbor_dist))
    return SelfTest(name=name, exact=exact, error=max(errors), found=float(np.mean(found)), images=float(images))


def _share(found: npt.NDArray[np.floating[Any]], expected: Doubles) -> float:
    return float(np.max(np.abs(found - expected) / np.maximum(expected, 1e-6)))


def _solve(held: FeatureBatch, tests: FeatureBatch) -> _Truth:
    dist = np.linalg.norm(tests.embedding[:, None].astype(np.float64) - held.embedding[None], axis=-1)
    rows = dist.argsort(axis=1, kind="stable")[:, :_K]
    level_dist = {}
    for level in _LEVELS:
        shape = (-1, level.height * level.width, level.channels)
        xq, xb = tests.levels[level.name].reshape(shape).astype(np.float64), held.levels[level.name].reshape(shape)
        found = []
        for q, of_image in zip(xq, rows, strict=True):
            gallery = xb[of_image].reshape(-1, level.channels).astype(np.float64)
            found.append(np.stack([np.sqrt(np.square(gallery - vector).sum(axis=1).min()) for vector in q]))
        level_dist[level.name] = np.stack(found).reshape(-1, level.height, level.width)
    return _Truth(np.take_along_axis(dist, rows, axis=1), rows, level_dist)


def _images(seed: int, count: int) -> FeatureBatch:
    """Images of one product: smooth patterns mixed into channels that share an offset; a flat corner that all of them have."""
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
