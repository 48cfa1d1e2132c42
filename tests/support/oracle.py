"""SPADE written out in float64 from its definition, and the data that the engine is compared with it on.

The arithmetic uses nothing of the package: slow, plain, and independent of what it checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from spade_faiss import Bank, FeatureBatch, Level
from spade_faiss.bank.origin import Origin
from spade_faiss.core.extraction import Source
from spade_faiss.features.layout import Layout

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Maps = dict[str, Floats]


@dataclass(frozen=True, eq=False)
class Features:
    """Embeddings (n, d) and, for each level, maps (n, H, W, C)."""

    embedding: Floats
    levels: Maps

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, part: slice | list[int]) -> Features:
        return Features(self.embedding[part], {name: maps[part] for name, maps in self.levels.items()})


@dataclass(frozen=True, eq=False)
class Expected:
    """What SPADE says of n query images."""

    image_score: Doubles
    neighbor_rows: Ints
    neighbor_dist: Doubles
    level_dist: dict[str, Doubles]
    maps: Doubles


def spade(
    bank: Features,
    query: Features,
    *,
    input_size: tuple[int, int],
    k_image: int = 5,
    k_gallery: int = 5,
    kappa: int = 1,
    fusion: str = "mean",
    distance: str = "l2",
    sigma: float = 4.0,
) -> Expected:
    """The whole method."""
    sq_dist = np.stack([sq_distances(bank.embedding, q) for q in query.embedding])
    order = sq_dist.argsort(axis=1, kind="stable")
    neighbor_dist = to_distance(np.take_along_axis(sq_dist, order, axis=1), distance)
    found = pixel_sq_distances(bank, query, order[:, :k_gallery], kappa, fusion)
    level_dist = {name: to_distance(values, distance).mean(axis=-1) for name, values in found.items()}
    k = max(k_image, k_gallery)
    return Expected(
        image_score=neighbor_dist[:, :k_image].mean(axis=1),
        neighbor_rows=order[:, :k],
        neighbor_dist=neighbor_dist[:, :k],
        level_dist=level_dist,
        maps=fuse(level_dist, input_size, sigma),
    )


def pixel_sq_distances(bank: Features, query: Features, neighbors: Ints, kappa: int, fusion: str) -> dict[str, Doubles]:
    """For each searched level, (n, H, W, kappa): the smallest squared distances to the neighbors' vectors, ascending."""
    if fusion == "concat":
        bank, query = concatenated(bank), concatenated(query)
    found = {}
    for name, maps in query.levels.items():
        _, height, width, channels = maps.shape
        dist = np.empty((len(query), height, width, kappa))
        for image, rows in enumerate(neighbors):
            gallery = bank.levels[name][rows].reshape(-1, channels)
            for y, x in np.ndindex(height, width):
                dist[image, y, x] = np.sort(sq_distances(gallery, maps[image, y, x]))[:kappa]
        found[name] = dist
    return found


def fuse(level_dist: dict[str, Doubles], size: tuple[int, int], sigma: float) -> Doubles:
    """(n, H, W): each level upsampled, the mean over levels, a Gaussian."""
    maps = np.mean([upsample(dist[..., None], size)[..., 0] for dist in level_dist.values()], axis=0)
    return np.stack([gaussian_filter(image, sigma) for image in maps]) if sigma else maps


def concatenated(features: Features) -> Features:
    """All levels upsampled to the finest grid, as one level of all their channels."""
    size = max((maps.shape[1:3] for maps in features.levels.values()), key=lambda shape: shape[0] * shape[1])
    # Doubles where the engine has floats: rounding is not part of the definition.
    maps: Any = np.concatenate([upsample(maps, size) for maps in features.levels.values()], axis=-1)
    return Features(features.embedding, {"concat": maps})


def upsample(maps: npt.NDArray[Any], size: tuple[int, int]) -> Doubles:
    """(n, h, w, C) to (n, H, W, C): pixel i of N looks at (i + 0.5) * n / N - 0.5 of n, between its two neighbors."""
    out = np.empty((len(maps), *size, maps.shape[3]))
    for y, (top, bottom, down) in enumerate(_taps(maps.shape[1], size[0])):
        row = maps[:, top].astype(np.float64) * (1 - down) + maps[:, bottom].astype(np.float64) * down
        for x, (left, right, across) in enumerate(_taps(maps.shape[2], size[1])):
            out[:, y, x] = row[:, left] * (1 - across) + row[:, right] * across
    return out


def _taps(n: int, N: int) -> Iterator[tuple[int, int, float]]:
    for i in range(N):
        position = min(max((i + 0.5) * n / N - 0.5, 0.0), n - 1.0)
        yield int(position), min(int(position) + 1, n - 1), position - int(position)


def prepared(maps: npt.NDArray[Any], *, pool: int, normalize: str) -> Doubles:
    """A bank's options: the mean over the part of a pool x pool window that exists, then unit length."""
    height, width = maps.shape[1:3]
    out = np.empty(maps.shape)
    r = pool // 2
    for y, x in np.ndindex(height, width):
        window = maps[:, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1].astype(np.float64)
        out[:, y, x] = window.mean(axis=(1, 2))
    return out / np.linalg.norm(out, axis=-1, keepdims=True) if normalize == "l2" else out


def sq_distances(base: npt.NDArray[Any], q: npt.NDArray[Any]) -> Doubles:
    """(nb,) squared L2 distances of one vector to each row."""
    difference = base.astype(np.float64) - q.astype(np.float64)
    return np.asarray(np.einsum("ij,ij->i", difference, difference))


def to_distance(sq_dist: Doubles, distance: str) -> Doubles:
    return np.sqrt(sq_dist) if distance == "l2" else sq_dist


def product(seed: int, n: int, shapes: dict[str, tuple[int, int, int]], dim: int, *, defect: bool = False) -> Features:
    """Images of one product, as features have it: smooth maps of a few latent patterns mixed into correlated, offset channels.

    A corner of each map is flat: one half of it the same vector in every image, the other within 1e-4 of it. Image 2 is image 1
    but for 1e-3 of noise, image 4 is image 3 to the bit. `defect` changes a patch of each image. Images of different seeds show
    the same product.
    """
    rng = np.random.default_rng(seed)
    shift = rng.normal(scale=0.15, size=(n, 2, 3))
    twins = [(2, 1, 1e-3), (4, 3, 0.0)]
    levels: Maps = {}
    pooled = np.empty((n, 0))
    for index, (name, (height, width, channels)) in enumerate(shapes.items()):
        fixed = np.random.default_rng((7, index))
        mix, offset = fixed.normal(size=(6, channels)), fixed.uniform(2, 4, size=channels)
        y, x = np.linspace(0, 6, height)[None, :, None, None], np.linspace(0, 5, width)[None, None, :, None]
        waves = [np.sin(y * [1, 2, 3] + 9 * shift[:, None, None, 0]), np.cos(x * [2, 1, 3] + 9 * shift[:, None, None, 1])]
        latent = np.concatenate([np.broadcast_to(wave, (n, height, width, 3)) for wave in waves], axis=-1)
        maps = latent @ mix + offset + 0.05 * rng.normal(size=(n, height, width, channels))
        if defect:
            maps[:, height // 2 : height // 2 + 3, width // 3 : width // 2 + 1] += 3 * fixed.normal(size=channels)
        half = (width + 3) // 6
        maps[:, : height // 3, : 2 * half] = offset
        maps[:, : height // 3, half : 2 * half] *= 1 + 1e-4 * rng.normal(size=(n, height // 3, half, channels))
        for copy, original, noise in twins:
            if copy < n:
                maps[copy] = maps[original] * (1 + noise * rng.normal(size=maps.shape[1:]))
        levels[name] = maps.astype(np.float32)
        pooled = np.concatenate([pooled, maps.mean(axis=(1, 2))], axis=1)
    mix = np.random.default_rng(8).normal(size=(pooled.shape[1], dim))
    return Features((pooled @ mix + 5).astype(np.float32), levels)


def names(n: int) -> list[str]:
    """The ids that `batch_of` gives to n images."""
    return [f"image {row}" for row in range(n)]


def batch_of(features: Features, ids: Sequence[str] = (), **more: Any) -> FeatureBatch:
    """The same for the engine."""
    return FeatureBatch(ids or names(len(features)), features.embedding, features.levels, **more)


def levels_of(features: Features) -> list[Level]:
    """The levels, as a bank wants to know them; strides do not enter into any score."""
    return [
        Level(name, channels=maps.shape[3], stride=1, height=maps.shape[1], width=maps.shape[2])
        for name, maps in features.levels.items()
    ]


def bank_of(
    path: Path,
    features: Features,
    *,
    input_size: tuple[int, int],
    shards: Sequence[int] = (),
    source: Source | None = None,
    **settings: Any,
) -> Bank:
    """A bank of these features, in shards of the given sizes and one of the rest; float32 unless said."""
    bank = Bank.create(
        path,
        Layout(
            levels=tuple(levels_of(features)),
            embedding_dim=features.embedding.shape[1],
            input_size=input_size,
            **{"dtype": "float32", **settings},
        ),
        Origin(source=source),
    )
    ids, starts = names(len(features)), np.cumsum([0, *shards]).tolist()
    for start, end in zip(starts, [*starts[1:], len(features)], strict=True):
        bank.append(batch_of(features[start:end], ids[start:end]))
    return bank
