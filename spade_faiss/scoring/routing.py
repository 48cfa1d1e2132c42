"""Which product a picture shows, in a bank of several: its nearest normals vote, and a conformal test tells one of none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.snapshot import Part, Snapshot
from spade_faiss.core.once import Once
from spade_faiss.core.ranks import Doubles, p_values
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.search.distances import direct_sq_dist, product_knn

# How many of the nearest normals vote. Their votes weigh less the further they are than the nearest, by this power of the
# ratio: a product with fewer images than voters can be named as well as any other.
VOTERS = 5
_POWER = 4
# A picture is said to show none of the products if it is no normal picture of one, by a p-value of at most this, and further
# from the nearest than this share of pictures of one product are from the others: a defect is no normal picture, either.
NONE_LEVEL, NEAR_SHARE = 0.01, 0.05
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
        p_none: (n,) the p-value of the test that each picture is a normal one of any of the products. At most a share of alpha
            of normal pictures, drawn alike from all products, has one of at most alpha. NaN where the caller named the product,
            and where the bank has too few images to tell.
        none: (n,) whether each seems to show none of the products: its `p_none` is at most `NONE_LEVEL`, and it is as far from
            the nearest normals as pictures of one product are from the others.
    """

    product: npt.NDArray[np.str_]
    confidence: Doubles
    p_none: Doubles
    none: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.product)

    @staticmethod
    def named(products: Sequence[str]) -> Routes:
        """The routes of pictures whose products the caller named."""
        unknown = np.full(len(products), np.nan)
        none = np.zeros(len(products), np.bool_)
        return Routes(product=np.array(products, np.str_), confidence=unknown, p_none=unknown.copy(), none=none)

    @staticmethod
    def join(parts: Sequence[Routes]) -> Routes:
        """The routes of all parts, in their order."""
        return Routes(
            product=np.concatenate([part.product for part in parts]),
            confidence=np.concatenate([part.confidence for part in parts]),
            p_none=np.concatenate([part.p_none for part in parts]),
            none=np.concatenate([part.none for part in parts]),
        )

    def __getitem__(self, part: slice) -> Routes:
        """The routes of some of the pictures."""
        values = {name: value[part] for name, value in vars(self).items()}
        return Routes(**values)

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
        usual = self._usual()
        relative = np.sqrt(nearest.astype(np.float64)) / usual.of_product[winner]
        p_none = p_values(usual.within, relative) if len(usual.within) else np.full(len(xq), np.nan)
        return Routes(
            product=names[winner],
            confidence=votes[np.arange(len(xq)), winner],
            p_none=p_none,
            none=(p_none <= NONE_LEVEL) & (relative >= usual.far),
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


class _Usual(NamedTuple):
    """How far normal pictures usually are from each other.

    Attributes:
        of_product: (products,) the usual distance of a picture to the nearest of its product.
        within: (m,) distances of a sample to the nearest of its product, relative to the usual one.
        far: the relative distance to the nearest of another product that most of the sample are beyond; 0 without another.
    """

    of_product: Doubles
    within: Doubles
    far: float


def _usual_distances(bank: Snapshot) -> _Usual:
    most = min(_MOST, max(_LEAST, _SAMPLE // max(1, len(bank.products))))
    sampled = [_sample(bank.part(product), most) for product in bank.products]
    every = np.concatenate([np.empty(0), *(distances for _, distances in sampled)])
    overall = float(np.median(every)) if len(every) else np.nan
    usual = np.array([np.median(of) if len(of) >= _LEAST_USUAL else overall for _, of in sampled])
    usual = np.where(usual > 0, usual, overall if overall > 0 else 1.0)
    within = [of / each for (_, of), each in zip(sampled, usual, strict=True)]
    far = _far([embedding for embedding, _ in sampled], usual)
    return _Usual(usual, np.concatenate([np.empty(0), *within]), far)


def _far(embeddings: Sequence[FloatArray], usual: Doubles) -> float:
    """See `_Usual`; each picture is compared with those of the sample that are of other products."""
    if len(embeddings) < 2:
        return 0.0
    every, of = np.concatenate(embeddings), np.repeat(np.arange(len(embeddings)), [len(part) for part in embeddings])
    found = []
    for number, xq in enumerate(embeddings):
        others = np.flatnonzero(of != number)
        sq_dist, nearest = product_knn(xq, np.ascontiguousarray(every[others]), 1)
        found.append(np.sqrt(np.maximum(sq_dist[:, 0], 0)) / usual[of[others[nearest[:, 0]]]])
    return float(np.quantile(np.concatenate(found), NEAR_SHARE))


def _sample(part: Part, most: int) -> tuple[FloatArray, Doubles]:
    """(s, d) the embeddings of up to so many images of a product, drawn at random; (m,) how far each is from the nearest other.

    Others are those that are not of its group; an image that has none is left out of the distances.
    """
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
    return xq, np.sqrt(nearest[np.isfinite(nearest)].astype(np.float64))
