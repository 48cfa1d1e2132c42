"""Which product a picture shows, in a bank of several: its nearest normals vote, and a conformal test tells one of none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.snapshot import Part, Snapshot
from spade_faiss.core.once import Once
from spade_faiss.core.ranks import Doubles, p_values
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.search.distances import direct_sq_dist

# How many of the nearest normals vote. Their votes weigh less the further they are than the nearest, by this power of the
# ratio: a product with fewer images than voters can be named as well as any other.
VOTERS = 5
_POWER = 4
# The p-value up to which a picture is said to show none of the products.
NONE_LEVEL = 0.01
# Images of each product whose distances say what is usual: about so many of all, and so many of each at the least and the most.
_SAMPLE, _LEAST, _MOST = 2000, 20, 200
# Of fewer distances of a product, no usual one is taken: that of all products stands for it.
_LEAST_USUAL = 5
_SEED = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Routes:
    """Which products n pictures show.

    Args:
        product: (n,) the names of the products.
        confidence: (n,) the share of the nearest normals' votes that named each, from 0 to 1; NaN where the caller named it.
        p_none: (n,) the p-value of the test that each picture shows one of the products: a small one says that it shows none
            of them. At most a share of alpha of normal pictures, drawn alike from all products, has one of at most alpha. NaN
            where the caller named the product, and where the bank has too few images to tell.
    """

    product: npt.NDArray[np.str_]
    confidence: Doubles
    p_none: Doubles

    def __len__(self) -> int:
        return len(self.product)

    @property
    def is_none(self) -> npt.NDArray[np.bool_]:
        """(n,) whether each picture shows none of the products, at the level `NONE_LEVEL`."""
        return self.p_none <= NONE_LEVEL

    @staticmethod
    def named(products: Sequence[str]) -> Routes:
        """The routes of pictures whose products the caller named."""
        unknown = np.full(len(products), np.nan)
        return Routes(product=np.array(products, np.str_), confidence=unknown, p_none=unknown.copy())

    @staticmethod
    def join(parts: Sequence[Routes]) -> Routes:
        """The routes of all parts, in their order."""
        return Routes(
            product=np.concatenate([part.product for part in parts]),
            confidence=np.concatenate([part.confidence for part in parts]),
            p_none=np.concatenate([part.p_none for part in parts]),
        )

    def __getitem__(self, part: slice) -> Routes:
        """The routes of some of the pictures."""
        return Routes(product=self.product[part], confidence=self.confidence[part], p_none=self.p_none[part])

    def at(self, i: int) -> tuple[str, float | None, float | None]:
        """The product, the confidence and the p-value of one picture as plain values; None where there is none."""
        numbers = (float(self.confidence[i]), float(self.p_none[i]))
        confidence, p_none = (None if np.isnan(number) else number for number in numbers)
        return str(self.product[i]), confidence, p_none


class Router:
    """Names the products of pictures by their embeddings.

    The votes are those of the distance-weighted nearest-neighbor rule (Dudani, "The distance-weighted k-nearest-neighbor rule",
    1976). How far a picture is from the nearest normal image of the product that they name, relative to how far that product's
    own images usually are from each other, is what the test of "none of them" ranks: among the same of a sample of normal
    images of all products, each against the others of its product. Products differ in how much their images do, so that without
    the division one product's spread would decide for another.

    Args:
        bank: a bank of several products.
        images: finds the nearest of all of its images.
    """

    def __init__(self, bank: Snapshot, images: ImageIndex) -> None:
        self._bank = bank
        self._images = images
        self._usual = Once(partial(_usual_distances, bank))

    def __call__(self, xq: FloatArray) -> Routes:
        """Name the products of pictures.

        Args:
            xq: their embeddings, (n, d) float32.
        """
        names = np.array(self._bank.products, np.str_)
        sq_dist, rows = self._images.search(xq, min(VOTERS, len(self._bank)))
        of_neighbor = self._bank.products_at(rows)
        votes = vote(sq_dist, of_neighbor, len(names))
        winner = votes.argmax(axis=1)
        nearest = np.where(of_neighbor == winner[:, None], sq_dist, np.inf).min(axis=1, initial=np.inf)
        usual, distances = self._usual()
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.sqrt(nearest.astype(np.float64)) / usual[winner]
        return Routes(
            product=names[winner],
            confidence=votes[np.arange(len(xq)), winner],
            p_none=p_values(distances, relative) if len(distances) else np.full(len(xq), np.nan),
        )


def vote(sq_dist: FloatArray, of_neighbor: IntArray, products: int) -> Doubles:
    """(n, products) the share of each product in the votes of n pictures' neighbors.

    Args:
        sq_dist: (n, k) squared distances, ascending.
        of_neighbor: (n, k) the number of each neighbor's product.
        products: the number of products.
    """
    nearest, far = sq_dist[:, :1].astype(np.float64), sq_dist.astype(np.float64)
    # Where the nearest are the picture itself, they alone vote.
    weight = np.where(far == nearest, 1.0, (nearest / np.where(far == 0, 1, far)) ** (_POWER / 2))
    votes = np.zeros((len(sq_dist), products))
    np.add.at(votes, (np.arange(len(sq_dist))[:, None], of_neighbor), weight)
    shares: Doubles = votes / votes.sum(axis=1, keepdims=True)
    return shares


def _usual_distances(bank: Snapshot) -> tuple[Doubles, Doubles]:
    """(products,) the usual distance of an image to the nearest of its product; (m,) distances of a sample relative to it."""
    most = min(_MOST, max(_LEAST, _SAMPLE // max(1, len(bank.products))))
    found = [_distances_within(bank.part(product), most) for product in bank.products]
    every = np.concatenate([np.empty(0), *found])
    overall = float(np.median(every)) if len(every) else np.nan
    usual = np.array([np.median(of) if len(of) >= _LEAST_USUAL else overall for of in found])
    usual = np.where(usual > 0, usual, overall if overall > 0 else 1.0)
    return usual, np.concatenate([np.empty(0), *(of / each for of, each in zip(found, usual, strict=True))])


def _distances_within(part: Part, most: int) -> Doubles:
    """(m,) how far up to so many images of a product, drawn at random, are from the nearest others outside of their group."""
    originals, siblings = part.pictures.originals, part.siblings
    own = originals[np.sort(np.random.default_rng(_SEED).permutation(len(originals))[:most])]
    xq, group = part.embedding(own), siblings.of(own)
    nearest = np.full(len(own), np.inf, np.float32)
    for number in range(len(part.manifest.shards)):
        rows = part.rows_of_shard(number)
        rows = rows[rows >= 0]
        if not len(rows):
            continue
        xb = np.ascontiguousarray(part.embeddings_of_shard(number))
        sq_dist = direct_sq_dist(xq, xb, np.tile(np.arange(len(xb)), (len(own), 1)))
        sq_dist[group[:, None] == siblings.of(rows)] = np.inf
        nearest = np.minimum(nearest, sq_dist.min(axis=1))
    return np.sqrt(nearest[np.isfinite(nearest)].astype(np.float64))
