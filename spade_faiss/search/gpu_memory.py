"""What a GPU's memory is spent on, and what will bound a search there. Pure arithmetic on a described machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spade_faiss.core.memory import BATCH_SIZE
from spade_faiss.features.batch import Level

# One step of a search on the CPU: what its caches hold (measured).
CPU_TILE_BYTES = 16 << 20
# Of a card's free memory: an eighth for a step, within these limits (beyond the larger, nothing gets faster), this much for the
# network and CUDA itself, and this much for FAISS; blocks are kept in what is left.
_LEAST_TILE_BYTES, _MOST_TILE_BYTES = 64 << 20, 1 << 30
NETWORK_BYTES = 3 << 29
FAISS_BYTES = 256 << 20
# Of the rest, the most that the embeddings may take: blocks need the remainder more.
_INDEX_SHARE = 0.5
# Queries of a step should be at least as many: a product of fewer is bound by reading the block.
_LEAST_QUERIES = 256
_FLOAT, _HALF = 4, 2
# The product matrix is written once and read once, by the minima.
_PASSES = 2


@dataclass(frozen=True)
class Memory:
    """A card's free memory, divided."""

    tile_bytes: int
    cache_bytes: int


def split_memory(free_bytes: int) -> Memory:
    """What a step may take, and what blocks may, of a card's free memory."""
    tile = min(max(free_bytes // 8, _LEAST_TILE_BYTES), _MOST_TILE_BYTES)
    return Memory(tile, max(0, free_bytes - NETWORK_BYTES - FAISS_BYTES - tile))


def place_index(index_bytes: int, free_bytes: Sequence[int]) -> str:
    """Where an index goes on cards with so much free memory: `replicas`, `shards`, or the `host`'s memory.

    A replica on each card answers more queries, shards hold more vectors. Blocks need the rest of a card's memory.
    """
    room = min(_INDEX_SHARE * split_memory(free).cache_bytes for free in free_bytes)
    if index_bytes <= room:
        return "replicas"
    return "shards" if index_bytes / len(free_bytes) <= room else "host"


@dataclass(frozen=True)
class Tile:
    """A step of a search: so many queries against so many rows of a block."""

    queries: int
    rows: int


def fit_tile(tile_bytes: int, queries: int, rows: int, channels: int, group: int) -> Tile:
    """The largest step within `tile_bytes`: all rows of a block and as many queries as fit, or fewer rows where few would.

    Args:
        tile_bytes: of the product, the minima of its groups, the queries and the block.
        queries: that there are.
        rows: of a block.
        channels: of a vector.
        group: rows of which one minimum is taken.
    """

    def fitting(of_rows: int) -> int:
        each = _FLOAT * (of_rows + -(-of_rows // group) + channels)
        return (tile_bytes - 2 * _FLOAT * of_rows * channels) // each

    while rows > group and fitting(rows) < min(queries, _LEAST_QUERIES):
        rows = -(-rows // 2)
    return Tile(queries=max(1, min(queries, fitting(rows))), rows=rows)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A card and what it stands in; speeds are those that are reached, not those of the data sheet."""

    name: str
    memory_bytes: int
    flops: float
    memory_bytes_per_s: float
    bus_bytes_per_s: float
    disk_bytes_per_s: float
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """Images to score against a bank."""

    levels: Sequence[Level]
    embedding_dim: int
    normals: int
    k_gallery: int


@dataclass(frozen=True, kw_only=True)
class GpuPlan:
    """What a card will do with a job.

    Attributes:
        tile: of the finest level.
        batch: images scored at a time.
        index_bytes: of the embeddings; 0 where they stay in the host's memory.
        cached: normal images whose blocks the card keeps.
        blocks: normal images whose blocks a batch needs, if neighbors are spread evenly over the bank: the worst case.
        flop: of an image.
        bus_bytes: that cross to the card, an image.
        disk_bytes: that are read, an image.
        seconds: an image, by what takes them; they overlap, so that the largest bounds the search.
    """

    tile: Tile
    batch: int
    index_bytes: int
    cached: int
    blocks: float
    flop: float
    bus_bytes: float
    disk_bytes: float
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """What the search waits for."""
        return max(self.seconds, key=self.seconds.__getitem__)


def plan_gpu(machine: Machine, job: Job, group: int) -> GpuPlan:
    """The plan for a job on a machine; see `docs/how-to/gpu.md` for the arithmetic in words."""
    memory = split_memory(machine.memory_bytes)
    index_bytes = job.normals * job.embedding_dim * _FLOAT
    if place_index(index_bytes, [machine.memory_bytes]) == "host":
        index_bytes = 0
    locations = [(level.height * level.width, level.channels) for level in job.levels]
    image_bytes = _HALF * sum(rows * channels for rows, channels in locations)
    rows, channels = max(locations)
    batch = BATCH_SIZE
    tile = fit_tile(memory.tile_bytes, batch * rows, rows, channels, group)
    cached = min(job.normals, (memory.cache_bytes - index_bytes) // image_bytes)
    # The chance that none of the batch chose a normal image is (1 - K/N)^batch.
    blocks = job.normals * (1 - (1 - min(1, job.k_gallery / job.normals)) ** batch)
    missed = 1 - cached / job.normals
    bus = blocks / batch * missed * image_bytes
    unread = max(0.0, 1 - machine.host_bytes / (job.normals * image_bytes))
    # Test maps come and results go as float32, and are small beside the blocks.
    bus_bytes = bus + 2 * image_bytes
    disk_bytes = bus * unread
    flop = 2.0 * job.k_gallery * sum(rows * rows * channels for rows, channels in locations)
    product_bytes = _FLOAT * job.k_gallery * sum(rows * rows for rows, _ in locations)
    seconds = {
        "compute": flop / machine.flops,
        "memory": _PASSES * product_bytes / machine.memory_bytes_per_s,
        "PCIe": bus_bytes / machine.bus_bytes_per_s,
        "disk": disk_bytes / machine.disk_bytes_per_s,
    }
    return GpuPlan(
        tile=tile,
        batch=batch,
        index_bytes=index_bytes,
        cached=cached,
        blocks=blocks,
        flop=flop,
        bus_bytes=bus_bytes,
        disk_bytes=disk_bytes,
        seconds=seconds,
    )
