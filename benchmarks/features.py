"""Generates feature banks that look like the maps of a real product: of any size, without images or a network, reproducibly.

`python -m benchmarks.features --compare BANK QUERIES.npz` prints their statistics beside those of real features. BANK is a
bank; QUERIES.npz holds the features of test images, under the name `embedding` and the names of the bank's levels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from spade_faiss import Bank, FeatureBatch, Level
from spade_faiss.core.types import FloatArray
from spade_faiss.features.layout import Layout
from spade_faiss.search.distances import import_faiss

SHARD = 64
INPUT_SIZE = (224, 224)
COMPARED_NORMALS, COMPARED_TESTS = 200, 16
QUANTILES = (0.01, 0.1, 0.5, 0.9)
COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
RADII = (0, 1, 3, 8)

# The ranks of the quantiles in `Look.unlike`; in the flattest part of the background, nothing differs.
_RANKS = (0.0, 0.05, 0.1, 0.5, 0.9, 1.0)
_FACTORS = 64
_POSES = 6
_FIRST_TEST = 1 << 32
# Standard deviations: of an image's shift, in input pixels; of the logarithm of its gain; of the logarithm of how much noise a
# place has.
_SHIFT, _GAIN, _LIVELY = 2.5, 0.02, 0.8
# Images differ in the strong factors more than in the weak ones.
_FINE_DECAY = 0.5
# How much a channel is active where the product has no structure; it makes about a third of all values 0.
_BIAS = 0.4


@dataclass(frozen=True, kw_only=True)
class Look:
    """The parameters of a level's generated maps, fitted to real ones.

    Args:
        unlike: the distance of an image's vectors from those of other images, over their distance from the mean, at `_RANKS`.
        decay: the strength of the k-th factor is `(k + 1) ** -decay`.
        smooth: how far the first and the last factor reach, in units of the map's side.
        own: how much a place differs from its mirror images; 0 for products that are alike on all sides.
        white: the share of the difference between images that no factor explains.
    """

    unlike: tuple[float, ...]
    decay: float
    smooth: tuple[float, float]
    own: float
    white: float


@dataclass(frozen=True)
class Shape:
    """The levels of a backbone, with the look of each."""

    levels: tuple[Level, ...]
    looks: tuple[Look, ...]
    embedding_dim: int


_LITE0_LOOKS = (
    Look(unlike=(0, 0, 0.01, 0.39, 0.75, 0.9), decay=0.35, smooth=(0.12, 0.03), own=0.05, white=0.3),
    Look(unlike=(0, 0.04, 0.09, 0.38, 0.7, 0.9), decay=0.35, smooth=(0.1, 0.04), own=0.3, white=0.3),
    Look(unlike=(0.05, 0.12, 0.15, 0.3, 0.55, 0.9), decay=0.3, smooth=(0.12, 0.06), own=0.6, white=0.3),
)
_WRN50_LOOKS = (
    Look(unlike=(0, 0, 0.01, 0.29, 0.58, 0.75), decay=0.35, smooth=(0.12, 0.03), own=0.05, white=0.3),
    Look(unlike=(0, 0.04, 0.08, 0.32, 0.63, 0.9), decay=0.35, smooth=(0.1, 0.04), own=0.3, white=0.3),
    Look(unlike=(0.05, 0.12, 0.15, 0.3, 0.55, 0.9), decay=0.3, smooth=(0.12, 0.06), own=0.6, white=0.3),
)


def _levels(channels: tuple[int, int, int]) -> tuple[Level, ...]:
    return tuple(Level(f"level{n + 1}", c, 4 << n, 56 >> n, 56 >> n) for n, c in enumerate(channels))


SHAPES = {
    "wrn50": Shape(_levels((256, 512, 1024)), _WRN50_LOOKS, 2048),
    "lite0": Shape(_levels((24, 40, 112)), _LITE0_LOOKS, 1280),
}


class Product:
    """Images of one product, as one backbone sees them; image `number` is the same whenever it is asked for."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self._seed = seed
        rng = np.random.default_rng([seed])
        self._maps = [_LevelMaps(level, look, rng) for level, look in zip(shape.levels, shape.looks, strict=True)]
        self._mixing = rng.standard_normal((_POSES, shape.embedding_dim), np.float32)

    def normals(self, first: int, count: int) -> FeatureBatch:
        """Return the features of normal images `first` to `first + count`."""
        return self._images(range(first, first + count), "normal")

    def tests(self, count: int) -> FeatureBatch:
        """Return the features of test images, none of which is a normal image."""
        return self._images(range(_FIRST_TEST, _FIRST_TEST + count), "test")

    def _images(self, numbers: range, kind: str) -> FeatureBatch:
        embedding = np.empty((len(numbers), self.shape.embedding_dim), np.float32)
        levels = {level.name: np.empty((len(numbers), *level.shape), np.float16) for level in self.shape.levels}
        for place, number in enumerate(numbers):
            rng = np.random.default_rng([self._seed, number])
            pose = rng.standard_normal(_POSES, np.float32)
            shift = rng.normal(0, _SHIFT, 2)
            gain = np.float32(np.exp(rng.normal(0, _GAIN)))
            noise = rng.standard_normal(self.shape.embedding_dim, np.float32)
            embedding[place] = np.maximum(0.5 + pose @ self._mixing / _POSES**0.5 + 0.1 * noise, 0)
            for level, maps in zip(self.shape.levels, self._maps, strict=True):
                levels[level.name][place] = maps(rng, pose, shift, gain)
        return FeatureBatch([f"{kind} {number}" for number in numbers], embedding, levels)


class _LevelMaps:
    """Generates the maps of one level.

    A few smooth factors, each stronger than the next, are mixed into channels and pass a ReLU. The factors of an image are
    those of the product, moved by whole cells, plus a part that depends on its pose (images with similar embeddings have
    similar poses), plus noise that is strong in some places and weak in others. In the background, all images are the same.
    """

    def __init__(self, level: Level, look: Look, rng: np.random.Generator) -> None:
        self._level = level
        shape, side = (level.height, level.width), min(level.height, level.width)
        factors = min(_FACTORS, level.channels)
        strength, weight = (np.arange(1, factors + 1) ** -decay for decay in (look.decay, _FINE_DECAY))
        a_channel = _length(strength) / level.channels**0.5
        self._mixing = (strength[:, None] * _orthonormal(rng, factors, level.channels)).astype(np.float32)
        self._bias = (_BIAS * a_channel * np.abs(rng.standard_normal(level.channels))).astype(np.float32)

        reach = np.geomspace(*look.smooth, factors) * side
        fields = np.stack([_smooth(rng, shape, sigma) for sigma in reach], axis=-1)
        mirrored = (fields + fields[:, ::-1] + fields[::-1] + fields[::-1, ::-1]) / 2
        fields = look.own * fields + (1 - look.own**2) ** 0.5 * mirrored
        # The product lies in the middle, inside the background; its edge is not quite a circle.
        edge = 0.25 * _smooth(rng, shape, 0.1 * side) - _distance_from_middle(shape)
        rank = (np.argsort(np.argsort(edge, axis=None)) / (edge.size - 1)).reshape(shape)
        inside = np.clip((rank - 0.05) / 0.15, 0, 1)
        self._shared = (fields * inside[..., None]).astype(np.float32)

        vectors = np.maximum(self._bias + self._shared @ self._mixing, 0)
        from_mean = np.linalg.norm(vectors - vectors.mean(axis=(0, 1)), axis=-1)
        amount = (np.interp(rank, _RANKS, look.unlike) * from_mean / _length(strength))[..., None].astype(np.float32)
        modes = np.stack([np.stack([_smooth(rng, shape, sigma) for sigma in reach], axis=-1) for _ in range(_POSES)])
        self._modes = (modes * amount / _POSES**0.5).astype(np.float32)
        self._lively = np.stack([_smooth(rng, shape, 0.15 * side) for _ in range(_POSES)])
        self._fine = (0.5 * amount * weight * factors**0.5 / _length(weight)).astype(np.float32)
        self._white = (look.white * a_channel * amount).reshape(-1, 1).astype(np.float32)

    def __call__(
        self, rng: np.random.Generator, pose: FloatArray, shift: npt.NDArray[np.float64], gain: np.float32
    ) -> FloatArray:
        fine = rng.standard_normal((*self._shared.shape[:2], len(self._mixing)), np.float32)
        fine += np.roll(fine, 1, axis=0)
        fine += np.roll(fine, 1, axis=1)
        lively = np.tensordot(rng.normal(0, _LIVELY / _POSES**0.5, _POSES), self._lively, 1) - _LIVELY**2 / 2
        fine *= self._fine * np.exp(lively.astype(np.float32))[..., None]
        latent = self._shared + np.tensordot(pose, self._modes, 1) + fine
        vectors = latent.reshape(-1, latent.shape[-1]) @ self._mixing
        white = rng.standard_normal(vectors.shape, np.float32)
        white *= self._white
        vectors += white
        vectors *= gain
        vectors += self._bias
        np.maximum(vectors, 0, out=vectors)
        moved = np.round(shift / self._level.stride).astype(int)
        return np.roll(vectors.reshape(self._level.shape), moved, axis=(0, 1))


def write_bank(path: Path, product: Product, normals: int) -> Bank:
    """Write a product's first normal images as a bank, or append those that the bank lacks.

    Raises:
        ValueError: if the bank holds more.
    """
    shape = product.shape
    if path.exists():
        bank = Bank.open(path)
    else:
        bank = Bank.create(path, Layout(levels=shape.levels, embedding_dim=shape.embedding_dim, input_size=INPUT_SIZE))
    if len(bank) > normals:
        raise ValueError(f"{path} holds {len(bank)} images, asked for {normals}")
    while len(bank) < normals:
        bank.append(product.normals(len(bank), min(SHARD, normals - len(bank))))
    return bank


def save_queries(tests: FeatureBatch, path: Path) -> Path:
    """Save the features of test images as `load_queries` reads them."""
    arrays: dict[str, Any] = {"embedding": tests.embedding, **tests.levels}
    np.savez(path, **arrays)
    return path


def load_queries(path: Path) -> FeatureBatch:
    """Read the features of test images from a file of arrays: `embedding`, and the maps of each level by its name."""
    with np.load(path) as arrays:
        maps = {name: arrays[name] for name in arrays}
    embedding = maps.pop("embedding")
    return FeatureBatch([f"test {number}" for number in range(len(embedding))], embedding, maps)


def looks_of(bank: Bank, tests: FeatureBatch, k: int = 5) -> dict[str, dict[str, list[float]]]:
    """Compute the statistics in which generated and real features are compared.

    Returns:
        For each level: `unlike`, the `QUANTILES` of the distance to the nearest vector of the k nearest normals, over the
        distance from the level's mean; `within`, the shares of the nearest vectors that are at most `RADII` cells away;
        `spectrum`, the shares of the variance in the first `COMPONENTS` principal components; `zeros`, the share of zeros.
    """
    _, rows = import_faiss().knn(tests.embedding.astype(np.float32), bank.embedding(np.arange(len(bank))), k)
    return {level.name: _look(bank, level, tests.levels[level.name], rows) for level in bank.layout.levels}


def _look(bank: Bank, level: Level, maps: npt.NDArray[np.floating[Any]], rows: npt.NDArray[np.int64]) -> dict[str, list[float]]:
    xt = np.concatenate([_vectors(bank.level_map(level.name, row)) for row in range(0, len(bank), 8)])
    center = xt.mean(axis=0)
    ratio, apart = [], []
    y, x = np.divmod(np.arange(level.height * level.width), level.width)
    for image, nearest in zip(maps, rows, strict=True):
        xq = _vectors(image) - center
        xb = np.concatenate([_vectors(bank.level_map(level.name, int(row))) for row in nearest]) - center
        _, I = import_faiss().knn(xq, xb, 1)
        ratio.append(np.linalg.norm(xq - xb[I[:, 0]], axis=1) / np.linalg.norm(xq, axis=1))
        at_y, at_x = np.divmod(I[:, 0] % len(y), level.width)
        apart.append(np.maximum(abs(at_y - y), abs(at_x - x)))
    variance = np.linalg.eigvalsh(np.cov(_vectors(maps).T))[::-1]
    explained = np.cumsum(variance) / variance.sum()
    return {
        "unlike": np.quantile(ratio, QUANTILES).tolist(),
        "within": [float(np.mean(np.concatenate(apart) <= radius)) for radius in RADII],
        "spectrum": [float(explained[min(count, len(explained)) - 1]) for count in COMPONENTS],
        "zeros": [float(np.mean(maps == 0))],
    }


def _vectors(maps: npt.NDArray[np.floating[Any]]) -> FloatArray:
    return maps.reshape(-1, maps.shape[-1]).astype(np.float32)


def _smooth(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> npt.NDArray[np.float64]:
    """Draw a field of variance 1 that hardly changes within `sigma` cells."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    scaled: npt.NDArray[np.float64] = (field - field.mean()) / field.std()
    return scaled


def _distance_from_middle(shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    return np.hypot(y, x)


def _orthonormal(rng: np.random.Generator, count: int, d: int) -> npt.NDArray[np.float64]:
    """Draw orthonormal rows, (count, d)."""
    return np.linalg.qr(rng.standard_normal((d, count)))[0].T


def _length(values: npt.NDArray[np.floating[Any]]) -> float:
    return float(np.linalg.norm(values))


def compare(real: Mapping[str, Mapping[str, list[float]]], ours: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Print the statistics of real levels, each above those of the generated level that stands for it."""
    print(f"unlike: quantiles {QUANTILES}; within: {RADII} cells; spectrum: first {COMPONENTS} components")
    for (name, theirs), (own_name, own) in zip(real.items(), ours.items(), strict=True):
        for title, look in ((name, theirs), (own_name, own)):
            print(f"{title:>10}", *(f"{key} {' '.join(f'{value:.3f}' for value in values)};" for key, values in look.items()))


def main() -> None:
    """Compare generated features with those of a real bank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BANK", "QUERIES.npz"), required=True)
    arguments = parser.parse_args()
    path, queries = arguments.compare
    real = looks_of(Bank.open(path), load_queries(queries))
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            product = Product(shape)
            bank = write_bank(Path(scratch) / "generated.bank", product, COMPARED_NORMALS)
            print(f"{path.name} (above) and generated {name} (below)")
            compare(real, looks_of(bank, product.tests(COMPARED_TESTS)))


if __name__ == "__main__":
    main()
