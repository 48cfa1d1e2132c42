"""Exact search as torch operations, the same on a GPU and on the CPU: block by block, settled while the block is there."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.block_jobs import Visit, visits_of
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.engines.accelerator import Accelerator, Uploaded
from spade_faiss.search.engines.products import GROUP, Look, Product
from spade_faiss.search.gpu_memory import fit_tile
from spade_faiss.search.protocol import Hits
from spade_faiss.search.workers import Workers

log = logging.getLogger(__name__)

# Blocks that are read and copied while one is searched.
_AHEAD = 3
# Numbers that an evaluation holds for each that it evaluates: the vectors, their differences, half of that when summing.
_COPIES = 3
_FLOAT = 4


@dataclass(frozen=True, eq=False)
class _Nearest:
    """What was found so far for queries, flat over test images: distances (nq, kappa), bank rows and locations (nq,)."""

    sq_dist: Tensor
    row: Tensor
    location: Tensor

    @classmethod
    def nothing(cls, queries: int, kappa: int, device: torch.device) -> _Nearest:
        none = torch.full((queries,), -1, dtype=torch.int64, device=device)
        return cls(torch.full((queries, kappa), torch.inf, device=device), none, none.clone())

    def __getitem__(self, which: Tensor) -> _Nearest:
        return _Nearest(self.sq_dist[which], self.row[which], self.location[which])

    def __setitem__(self, which: Tensor, found: _Nearest) -> None:
        self.sq_dist[which], self.row[which], self.location[which] = found.sq_dist, found.row, found.location

    def merged(self, sq_dist: Tensor, location: Tensor, row: int) -> _Nearest:
        """With candidates (nq, some) of one bank row; of equal ones that which was here stays, then the first location."""
        least = sq_dist.amin(1, keepdim=True)
        last = torch.iinfo(torch.int64).max
        first = location.where(sq_dist == least, last).amin(1)
        nearer = least[:, 0] < self.sq_dist[:, 0]
        both = torch.cat([self.sq_dist, sq_dist], 1).topk(self.sq_dist.shape[1], largest=False, sorted=True).values
        return _Nearest(both, torch.where(nearer, row, self.row), first.where(nearer, self.location))


class TorchSearch:
    """Exact nearest gallery vectors on one device, see `GallerySearch`.

    Blocks are visited in ascending order, each once for all test images of a call that chose it. A product, which is off by up
    to a known rounding, names candidates; they are evaluated directly; where one that it did not name could be as near, it
    names more. So the result is the smallest directly evaluated distance, of equals the one in the first bank row and
    location: it depends neither on the batch nor on the size of the steps, nor on the product.
    """

    def __init__(self, blocks: Blocks, workers: Workers, accelerator: Accelerator, product: Product) -> None:
        self._blocks = blocks
        self._workers = workers
        self._accelerator = accelerator
        self._product = product

    @cached_property
    def _center(self) -> Tensor:
        return self._accelerator.upload(self._blocks.center).wait()

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        height, width, channels = self._blocks.level.shape
        # Beside the arguments: distances, rows and locations, and blocks on their way.
        held = images * height * width * (_FLOAT * (kappa + 2) + 2 * 8) + (_AHEAD + 2) * 2 * self._blocks.block_bytes
        if self._accelerator.device.type == "cuda":
            return held + images * height * width * channels * _FLOAT  # the copy that goes to the card
        return held + 3 * images * height * width * channels * _FLOAT + 2 * self._accelerator.tile_bytes

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`; an InputError says that the device is out of memory."""
        try:
            return self._search_all(xq, neighbors, kappa)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{self._accelerator.device} is out of memory even in smaller steps ({_first_line(error)}); "
                f"end other programs that use it, lower kappa, or use --device cpu"
            ) from error

    def _search_all(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        (n, queries, channels), device = xq.shape, self._accelerator.device
        with torch.inference_mode():
            q = self._accelerator.upload(xq).wait().reshape(-1, channels)
            found = _Nearest.nothing(n * queries, kappa, device)
            places = torch.arange(queries, device=device)
            for visit, block in self._visited(visits_of(np.sort(neighbors, axis=1))):
                images = torch.from_numpy(visit.images).to(device)
                self._search(q, (images[:, None] * queries + places).flatten(), block, visit.row, found)
            return Hits(
                found.sq_dist.cpu().numpy().reshape(n, queries, kappa),
                found.row.cpu().numpy().reshape(n, queries),
                found.location.cpu().numpy().reshape(n, queries),
            )

    def _visited(self, visits: Sequence[Visit]) -> Iterator[tuple[Visit, Tensor]]:
        """Each visit with its block on the device; the next blocks are read and copied meanwhile."""
        coming: deque[tuple[Visit, Future[Uploaded]]] = deque()
        try:
            for visit in visits:
                self._blocks.prefetch(visit.row)
                coming.append((visit, self._workers.submit(self._load, visit.row)))
                if len(coming) > _AHEAD:
                    first, block = coming.popleft()
                    yield first, block.result().wait()
            while coming:
                first, block = coming.popleft()
                yield first, block.result().wait()
        finally:
            for _, block in coming:
                block.cancel()

    def _load(self, row: int) -> Uploaded:
        key, cache = (self._blocks.name, row), self._accelerator.cache
        block = cache.get(key)
        if block is None:
            block = self._accelerator.upload(self._blocks.stored(row))
            self._blocks.release(row)
            cache.put(key, block)
        return block

    def _search(self, q: Tensor, asked: Tensor, block: Tensor, row: int, found: _Nearest) -> None:
        """Search a block for the queries of the numbers `asked`, in steps that fit; a smaller one where one did not, once."""
        tile_bytes = self._accelerator.tile_bytes
        try:
            return self._search_in_steps(q, asked, block, row, found)
        except torch.OutOfMemoryError as error:
            why = _first_line(error)
        # Not in the handler: the error holds what the step had allocated.
        log.warning("%s is out of memory: going on in smaller steps (%s)", self._accelerator.device, why)
        self._accelerator.shrink(tile_bytes)
        return self._search_in_steps(q, asked, block, row, found)

    def _search_in_steps(self, q: Tensor, asked: Tensor, block: Tensor, row: int, found: _Nearest) -> None:
        rows, channels = block.shape
        tile = fit_tile(self._accelerator.tile_bytes, len(asked), rows, channels, GROUP)
        new = found[asked]
        for start in range(0, rows, tile.rows):
            part = block[start : start + tile.rows]
            look = self._product.prepare(part.float() - self._center)
            for first in range(0, len(asked), tile.queries):
                of_step = slice(first, first + tile.queries)
                xq = q[asked[of_step]]
                centered = xq - self._center
                norm = centered.square().sum(1)
                looked = look(centered, norm, new.sq_dist.shape[1])
                before = new.sq_dist[of_step, -1]
                # Of vectors that are equal to the query the first stays: nothing is nearer.
                (which,) = torch.nonzero(
                    (looked.nearest - self._rounding(norm, before) <= before) & (before > 0), as_tuple=True
                )
                if len(which) == 0:
                    continue
                new[which + first] = self._settled(looked, which, new[which + first], xq, norm, part, (row, start))
        # Only now: a block that is begun anew must not meet what it left.
        found[asked] = new

    def _settled(
        self, looked: Look, which: Tensor, had: _Nearest, xq: Tensor, norm: Tensor, part: Tensor, place: tuple[int, int]
    ) -> _Nearest:
        """What queries `which` of `xq` had, and what they find in a block's part, evaluated directly."""
        row, start = place
        found = had
        left = torch.arange(len(which), device=xq.device)
        for attempt in itertools.count():
            candidates, beyond = looked.candidates(which[left], attempt)
            before = had[left]
            merged = before.merged(self._evaluated(xq[which[left]], part, candidates), candidates + start, row)
            if attempt == 0:
                found = merged
            else:
                found[left] = merged
            furthest = merged.sq_dist[:, -1]
            # At a distance of 0 only the location may be another one's, and only of what was found just now.
            open_ = (furthest > 0) | (merged.sq_dist[:, 0] < before.sq_dist[:, 0])
            left = left[(beyond - self._rounding(norm[which[left]], furthest) <= furthest) & open_]
            if len(left) == 0:
                break
        return found

    def _rounding(self, norm: Tensor, sq_dist: Tensor) -> Tensor:
        """By how much a product's squared distance may be off for queries of |q|^2 `norm` and vectors as near as `sq_dist`."""
        return self._product.rounding(self._blocks.level.channels) * (norm + (norm.sqrt() + sq_dist.sqrt()) ** 2)

    def _evaluated(self, xq: Tensor, xb: Tensor, rows: Tensor) -> Tensor:
        """Direct squared distances (nq, some) of queries (nq, C) to rows (nq, some) of a block's part, infinite for -1."""
        step = max(1, self._accelerator.tile_bytes // (_COPIES * _FLOAT * rows.shape[1] * xb.shape[1]))
        parts = []
        for first in range(0, len(xq), step):
            of_step = slice(first, first + step)
            parts.append(direct_sq_dist(xq[of_step], xb[rows[of_step].clamp(min=0)]))
        return torch.cat(parts).masked_fill(rows < 0, torch.inf)


def direct_sq_dist(xq: Tensor, x: Tensor) -> Tensor:
    """Squared distances (nq, some) of queries (nq, C) to vectors of their own (nq, some, C), the same bits on every device.

    Halves are added until one number is left: single additions, which all devices round alike, in an order that only C decides.
    """
    values = x.float()
    values = (values - xq[:, None]).square_()
    while (length := values.shape[-1]) > 1:
        half = length // 2
        added = values[..., :half] + values[..., half : 2 * half]
        if length % 2:
            added[..., 0] += values[..., -1]
        values = added
    return values[..., 0]


class SplitSearch:
    """The same on several devices, each searching for a part of the test images, see `GallerySearch`."""

    def __init__(self, searches: Sequence[TorchSearch]) -> None:
        self._searches = searches
        self._pool = ThreadPoolExecutor(len(searches), "spade_faiss cards")

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        each = -(-images // len(self._searches))
        return sum(search.working_bytes(each, k_gallery, kappa) for search in self._searches)

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        parts = [part for part in np.array_split(np.arange(len(xq)), len(self._searches)) if len(part)]
        searches = self._searches[: len(parts)]
        hits = list(self._pool.map(lambda search, part: search(xq[part], neighbors[part], kappa), searches, parts))
        return Hits(
            np.concatenate([part.sq_dist for part in hits]),
            np.concatenate([part.row for part in hits]),
            np.concatenate([part.location for part in hits]),
        )


def open_torch(blocks: Blocks, workers: Workers, product: Product) -> TorchSearch | SplitSearch:
    """The search on the device of the workers."""
    searches = [TorchSearch(blocks, workers, accelerator, product) for accelerator in workers.accelerators]
    return searches[0] if len(searches) == 1 else SplitSearch(searches)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
