"""The search of a bank of several products: each picture is searched in the product that it shows, and in no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from spade_faiss.bank.snapshot import Part, Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.process import PerProcess
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.scoring.routing import Router, Routes
from spade_faiss.scoring.scores import Scores, join


class ProductDetector(Protocol):
    """What scores the images of one product, as `Detector` does."""

    @property
    def images_at_a_time(self) -> int:
        """How many images are scored together."""

    def score_prepared(self, query: FeatureBatch, *, timings: Timings) -> Scores:
        """Score images by features that `prepare` returned."""

    def score_rows(self, rows: Sequence[int], *, timings: Timings | None = None) -> Scores:
        """Score images of the product, each against the others."""


D = TypeVar("D", bound=ProductDetector)


class ProductSearch(Generic[D]):
    """Searches each picture in the product that its nearest normals name, or that the caller does.

    Args:
        bank: a bank of several products.
        images: finds the nearest of all of its images.
        open_part: opens the detector of a product.
        width: how many neighbors each picture is given, names and distances; a product with few images has fewer, see `Scores`.
    """

    def __init__(self, bank: Snapshot, images: ImageIndex, open_part: Callable[[Part], D], width: int) -> None:
        self._bank = bank
        self._route = Router(bank, images)
        self._open_part = open_part
        self._width = width
        self._opened: dict[str, D] = {}
        self._lock = PerProcess(threading.Lock)

    def __call__(self, query: FeatureBatch, named: Sequence[str | None], timings: Timings) -> Scores:
        """Score pictures.

        Args:
            query: the features of n pictures, as `prepare` returned them.
            named: (n,) the products that the caller named; None where the nearest normals shall do it.
            timings: where the seconds of each step are added.

        Raises:
            InputError: for a product that the bank holds no image of.
        """
        with timings("product"):
            routes = self._routes(query.embedding, named)
        if not len(query):
            return replace(self.of_product(self._bank.products[0]).score_prepared(query, timings=timings), routes=routes)
        found: list[Scores] = []
        places: list[IntArray] = []
        for product in dict.fromkeys(routes.product.tolist()):
            chosen = np.flatnonzero(routes.product == product)
            detector = self.of_product(product)
            for start in range(0, len(chosen), detector.images_at_a_time):
                at = chosen[start : start + detector.images_at_a_time]
                found.append(self._in_whole(detector.score_prepared(_take(query, at), timings=timings), product))
                places.append(at)
        return replace(self._in_order(found, places), routes=routes)

    def score_rows(self, rows: IntArray, timings: Timings) -> Scores:
        """Score images of the bank, at some rows of it, each against the others of its product; see `Detector.score_rows`."""
        names = self._bank.products
        of_row = self._bank.products_at(rows)
        found: list[Scores] = []
        places: list[IntArray] = []
        for number in dict.fromkeys(of_row.tolist()):
            at = np.flatnonzero(of_row == number)
            own = np.searchsorted(self._bank.rows_of(names[number]), rows[at])
            detector = self.of_product(names[number])
            found.append(self._in_whole(detector.score_rows(own.tolist(), timings=timings), names[number]))
            places.append(at)
        return replace(self._in_order(found, places), routes=Routes.named([names[number] for number in of_row]))

    @property
    def largest(self) -> D:
        """The detector of the product with the most images."""
        return self.of_product(max(self._bank.products, key=lambda name: len(self._bank.rows_of(name))))

    def of_product(self, product: str) -> D:
        """The detector of a product, opened at its first use.

        Raises:
            InputError: for a product that the bank holds no image of.
        """
        with self._lock():
            if product not in self._opened:
                self._opened[product] = self._open_part(self._bank.part(product))
            return self._opened[product]

    def _routes(self, embedding: FloatArray, named: Sequence[str | None]) -> Routes:
        if unknown := [name for name in named if name is not None and name not in self._bank.products]:
            self._bank.part(unknown[0])  # raises, and names those that there are
        if None not in named:
            return Routes.named([str(name) for name in named])
        routes = self._route(embedding)
        given = np.array([name is not None for name in named])
        if not given.any():
            return routes
        product = np.array([name or str(of) for name, of in zip(named, routes.product, strict=True)], np.str_)
        confidence, p_none = (np.where(given, np.nan, values) for values in (routes.confidence, routes.p_none))
        return Routes(product=product, confidence=confidence, p_none=p_none, none=routes.none & ~given)

    def _in_order(self, parts: Sequence[Scores], places: Sequence[IntArray]) -> Scores:
        """The scores of all parts, whose images belong at some places of the whole."""
        joined = join([_padded(part, self._width) for part in parts])
        return _reordered(joined, np.argsort(np.concatenate(places), kind="stable"))

    def _in_whole(self, scores: Scores, product: str) -> Scores:
        """The scores with the rows of the whole bank in place of those of the product."""
        rows = self._bank.rows_of(product)
        nearest = {}
        for level, found in scores.nearest.items():
            moved = found.copy()
            moved["row"] = np.where(found["row"] < 0, -1, rows[np.maximum(found["row"], 0)])
            nearest[level] = moved
        return replace(scores, nearest=nearest, routes=None)


def check_routable(bank: Snapshot) -> None:
    """Raise InputError for a bank whose pictures cannot be told by themselves which product they show."""
    if bank.is_tiled:
        raise InputError(
            f"the bank {bank.path} holds tiles of several products, and which one a picture shows is told from whole pictures; "
            f"name it: --product NAME (from Python: Detector.open(bank, product=NAME))"
        )


def _take(batch: FeatureBatch, at: IntArray) -> FeatureBatch:
    """Some images of a batch; the batch itself for all of them."""
    if len(at) == len(batch):
        return batch
    return FeatureBatch(
        [batch.ids[i] for i in at],
        batch.embedding[at],
        {name: maps[at] for name, maps in batch.levels.items()},
        batch.source,
        valid=None if batch.valid is None else batch.valid[at],
    )


def _padded(scores: Scores, width: int) -> Scores:
    missing = width - scores.neighbor_ids.shape[1]
    if not missing:
        return scores
    shape = len(scores), missing
    return replace(
        scores,
        neighbor_ids=np.concatenate([scores.neighbor_ids, np.zeros(shape, scores.neighbor_ids.dtype)], axis=1),
        neighbor_dist=np.concatenate([scores.neighbor_dist, np.full(shape, np.nan, np.float32)], axis=1),
    )


def _reordered(scores: Scores, order: IntArray) -> Scores:
    """The scores of the same images in another order."""
    return replace(
        scores,
        ids=[scores.ids[i] for i in order],
        image_score=scores.image_score[order],
        maps=scores.maps[order],
        statistics=scores.statistics[order],
        neighbor_ids=scores.neighbor_ids[order],
        neighbor_dist=scores.neighbor_dist[order],
        level_dist={level: dist[order] for level, dist in scores.level_dist.items()},
        nearest={level: nearest[order] for level, nearest in scores.nearest.items()},
        passed_over={level: shares[order] for level, shares in scores.passed_over.items()},
        valid=None if scores.valid is None else scores.valid[order],
    )
