"""Exact search as torch operations, the same on a GPU and on the CPU: each block is searched to the end while it is there."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spade_faiss.core.errors import InputError
from spade_faiss.core.once import once
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.bit_packing import packed_bytes, places
from spade_faiss.features.codes import Decoder
from spade_faiss.search.accelerator import Accelerator, Uploaded
from spade_faiss.search.block_jobs import BlockJob, block_jobs
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.engines.products import GROUP, Nominations, TorchProduct
from spade_faiss.search.gpu_memory import fit_tile
from spade_faiss.search.protocol import Hits
from spade_faiss.search.workers import Workers

log = logging.getLogger(__name__)

# Blocks that are read and copied while one is searched.
_AHEAD = 3
# An evaluation holds so many times the numbers that it evaluates: the vectors, their differences, half of those when it sums.
_COPIES = 3
_FLOAT = 4


@dataclass(frozen=True, eq=False)
class _DeviceBest:
    """The nearest vectors that queries have met so far, flat over test images, on the device.

    It is apart from `RunningBest`, which merges candidates on the host: they would cross the bus at each step of a search.

    Attributes:
        sq_dist: (nq, kappa) squared distances, ascending.
        row: (nq,) the bank row of the nearest; -1 for none.
        location: (nq,) its location.
    """

    sq_dist: Tensor
    row: Tensor
    location: Tensor

    @classmethod
    def empty(cls, queries: int, kappa: int, device: torch.device) -> _DeviceBest:
        none = torch.full((queries,), -1, dtype=torch.int64, device=device)
        return cls(torch.full((queries, kappa), torch.inf, device=device), none, none.clone())

    def __getitem__(self, which: Tensor) -> _DeviceBest:
        return _DeviceBest(self.sq_dist[which], self.row[which], self.location[which])

    def __setitem__(self, which: Tensor, best: _DeviceBest) -> None:
        self.sq_dist[which], self.row[which], self.location[which] = best.sq_dist, best.row, best.location

    def merged(self, sq_dist: Tensor, location: Tensor, row: int) -> _DeviceBest:
        """The best of these and of candidates (nq, some) of one bank row.

        Blocks come in ascending order: of equal distances the one that is here stays, then the first location comes.
        """
        least = sq_dist.amin(1, keepdim=True)
        last = torch.iinfo(torch.int64).max
        first = location.where(sq_dist == least, last).amin(1)
        nearer = least[:, 0] < self.sq_dist[:, 0]
        both = torch.cat([self.sq_dist, sq_dist], 1).topk(self.sq_dist.shape[1], largest=False, sorted=True).values
        return _DeviceBest(both, torch.where(nearer, row, self.row), first.where(nearer, self.location))


class _Step(NamedTuple):
    """Queries that meet a part of a block.

    Attributes:
        xq: (nq, C) the queries.
        norm: (nq,) their squared norms, less the center.
        xb: (nb, C) the part of the block, as it is stored; codes are decoded.
        row: the bank row of the block.
        start: the location of the part's first vector.
    """

    xq: Tensor
    norm: Tensor
    xb: Tensor
    row: int
    start: int


class TorchSearch:
    """Exact nearest gallery vectors on one device, see `GallerySearch`.

    Blocks are searched in ascending order, each once for all test images of a call that need it. A product, which is off by up
    to a known rounding, nominates candidates; they are evaluated directly; where one that was not nominated could be as near,
    more are nominated. So the result is the smallest directly evaluated distance, of equals the one in the first bank row and
    location: it depends neither on the batch nor on the size of the steps, nor on the product.

    Args:
        blocks: the blocks of one level.
        workers: the threads that read blocks.
        accelerator: the device.
        product: what nominates candidates.
    """

    def __init__(self, blocks: Blocks, workers: Workers, accelerator: Accelerator, product: TorchProduct) -> None:
        self._blocks = blocks
        self._workers = workers
        self._accelerator = accelerator
        self._product = product

    @once
    def _center(self) -> Tensor:
        return self._accelerator.upload(self._blocks.center).wait()

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        locations, channels = self._blocks.level.locations, self._blocks.level.channels
        # Beside the arguments: distances, rows and locations, and blocks on their way.
        held = images * locations * (_FLOAT * (kappa + 2) + 2 * 8) + (_AHEAD + 2) * 2 * self._blocks.block_bytes
        if self._accelerator.device.type == "cuda":
            return held + images * locations * channels * _FLOAT  # the copy that goes to the card
        return held + 3 * images * locations * channels * _FLOAT + 2 * self._accelerator.tile_bytes

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
            best = _DeviceBest.empty(n * queries, kappa, device)
            places = torch.arange(queries, device=device)
            for job, block in self._uploaded(block_jobs(neighbors)):
                images = torch.from_numpy(job.images).to(device)
                self._search(q, (images[:, None] * queries + places).flatten(), block, job.row, best)
            row, location = best.row.cpu().numpy(), best.location.cpu().numpy()
            for found in np.unique(row[row >= 0]).tolist() if self._blocks.partial else ():
                location[row == found] = self._blocks.located(found, location[row == found])
            sq_dist = best.sq_dist.cpu().numpy().reshape(n, queries, kappa)
            return Hits(sq_dist, row.reshape(n, queries), location.reshape(n, queries))

    def _uploaded(self, jobs: Sequence[BlockJob]) -> Iterator[tuple[BlockJob, Tensor]]:
        """Each job with its block on the device; the next blocks are read and copied meanwhile."""
        coming: deque[tuple[BlockJob, Future[Uploaded]]] = deque()
        try:
            for job in jobs:
                self._blocks.prefetch(job.row)
                coming.append((job, self._workers.submit(self._load, job.row)))
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
        def upload() -> Uploaded:
            block = self._accelerator.upload(self._blocks.stored(row))
            self._blocks.release(row)
            return block

        return self._accelerator.cache.get_or_make((self._blocks.key, row), upload)

    def _search(self, q: Tensor, which: Tensor, block: Tensor, row: int, best: _DeviceBest) -> None:
        """Search a block for the queries `which`; where memory ends, once more in smaller steps."""
        tile_bytes = self._accelerator.tile_bytes
        try:
            return self._search_in_steps(q, which, block, row, best)
        except torch.OutOfMemoryError as error:
            why = _first_line(error)
        # Not in the handler: the error holds what the step had allocated.
        log.warning("%s is out of memory: going on in smaller steps (%s)", self._accelerator.device, why)
        self._accelerator.shrink(tile_bytes)
        return self._search_in_steps(q, which, block, row, best)

    def _search_in_steps(self, q: Tensor, which: Tensor, block: Tensor, row: int, best: _DeviceBest) -> None:
        rows, channels = block.shape
        tile = fit_tile(self._accelerator.tile_bytes, len(which), rows, channels, GROUP)
        new = best[which]
        for start in range(0, rows, tile.rows):
            xb = self._decoded(block[start : start + tile.rows])
            nominate = self._product.prepare(xb.float() - self._center)
            for first in range(0, len(which), tile.queries):
                of_step = slice(first, first + tile.queries)
                xq = q[which[of_step]]
                centered = xq - self._center
                norm = centered.square().sum(1)
                nominations = nominate(centered, norm, new.sq_dist.shape[1])
                before = new.sq_dist[of_step, -1]
                # Of vectors that are equal to the query the first stays: nothing is nearer.
                (open_,) = torch.nonzero(
                    (nominations.nearest - self._rounding(norm, before) <= before) & (before > 0), as_tuple=True
                )
                if len(open_):
                    step = _Step(xq, norm, xb, row, start)
                    new[open_ + first] = self._settled(step, nominations, open_, new[open_ + first])
        # Only now: a block that is begun anew must not meet what it left.
        best[which] = new

    @once
    def _decoder(self) -> _DeviceDecoder | None:
        decoder = self._blocks.decoder
        return None if decoder is None else _DeviceDecoder(decoder, self._accelerator)

    def _decoded(self, stored: Tensor) -> Tensor:
        """A part of a block as it is searched: numbers as they are stored, codes as the vectors that they stand for."""
        return stored if self._decoder is None else self._decoder(stored)

    def _settled(self, step: _Step, nominations: Nominations, which: Tensor, before: _DeviceBest) -> _DeviceBest:
        """The best of what queries `which` of a step had before, and of what they find in it by direct distances."""
        best = before
        left = torch.arange(len(which), device=step.xq.device)
        for attempt in itertools.count():
            candidates, beyond = nominations.candidates(which[left], attempt)
            of_left = before[left]
            sq_dist = self._evaluated(step.xq[which[left]], step.xb, candidates)
            merged = of_left.merged(sq_dist, candidates + step.start, step.row)
            if attempt == 0:
                best = merged
            else:
                best[left] = merged
            furthest = merged.sq_dist[:, -1]
            # At a distance of 0 only the location may be another one's, and only of what was found just now.
            open_ = (furthest > 0) | (merged.sq_dist[:, 0] < of_left.sq_dist[:, 0])
            left = left[(beyond - self._rounding(step.norm[which[left]], furthest) <= furthest) & open_]
            if len(left) == 0:
                break
        return best

    def _rounding(self, norm: Tensor, sq_dist: Tensor) -> Tensor:
        """The most by which a product's squared distance may be off.

        Args:
            norm: (nq,) the squared norms of the queries.
            sq_dist: (nq,) how near the vectors are that it matters for.
        """
        return self._product.rounding(self._blocks.level.channels) * (norm + (norm.sqrt() + sq_dist.sqrt()) ** 2)

    def _evaluated(self, xq: Tensor, xb: Tensor, rows: Tensor) -> Tensor:
        """Direct squared distances (nq, some) of queries (nq, C) to rows (nq, some) of a block's part, infinite for row -1."""
        step = max(1, self._accelerator.tile_bytes // (_COPIES * _FLOAT * rows.shape[1] * xb.shape[1]))
        parts = []
        for first in range(0, len(xq), step):
            of_step = slice(first, first + step)
            parts.append(direct_sq_dist(xq[of_step], xb[rows[of_step].clamp(min=0)]))
        return torch.cat(parts).masked_fill(rows < 0, torch.inf)


class _DeviceDecoder:
    """What `Decoder` does, where the codes were sent to: the same numbers, to the bit.

    Args:
        decoder: what makes numbers of codes.
        accelerator: where they are.
    """

    def __init__(self, decoder: Decoder, accelerator: Accelerator) -> None:
        self._scale = accelerator.upload(decoder.scale).wait()
        self._fields: tuple[Tensor, ...] | None = None
        if (bits := decoder.bits) is not None:
            byte, shift = places(bits)
            after = np.minimum(byte + 1, packed_bytes(bits) - 1)
            masks = (1 << bits.astype(np.int32)) - 1
            self._fields = tuple(accelerator.upload(field).wait() for field in (byte, after, shift.astype(np.int32), masks))

    def __call__(self, stored: Tensor) -> Tensor:
        """The vectors (rows, N) float32 of stored codes, (rows, N) int8 or packed, (rows, bytes) uint8."""
        if self._fields is None:
            return stored.float() * self._scale
        byte, after, shift, masks = self._fields
        words = stored.index_select(1, byte).int() | (stored.index_select(1, after).int() << 8)
        codes = 2 * ((words >> shift) & masks) - masks
        return codes.float() * self._scale


def direct_sq_dist(xq: Tensor, x: Tensor) -> Tensor:
    """Squared distances of queries to vectors of their own, the same to the bit on every device.

    Halves are added until one number is left: single additions, which all devices round alike, in an order that only C decides.

    Args:
        xq: (nq, C) the queries.
        x: (nq, some, C) the vectors of each.

    Returns:
        (nq, some) float32.
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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
