"""How a GPU's memory is divided, and what bounds a search there: arithmetic on numbers, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spade_faiss.core.memory import BATCH_SIZE
from spade_faiss.features.batch import Level

# What one step of a search on the CPU may take: what the processor's caches hold (measured).
CPU_TILE_BYTES = 16 << 20
# A step may take an eighth of a card's free memory, within these limits; beyond the larger one nothing gets faster.
_LEAST_TILE_BYTES, _MOST_TILE_BYTES = 64 << 20, 1 << 30
# What is set aside for the network and CUDA itself, and for FAISS; blocks are cached in what is left.
NETWORK_BYTES = 3 << 29
FAISS_BYTES = 256 << 20
# The share of what is left that the embeddings may take: blocks need the remainder more.
_INDEX_SHARE = 0.5
# The number of queries that a step should have at least: a product of fewer is bound by reading the block.
_LEAST_QUERIES = 256
_FLOAT, _HALF = 4, 2
# The product matrix is written once and read once, by the minima.
_PASSES = 2


@dataclass(frozen=True)
class Memory:
    """How a card's free memory is divided.

    Attributes:
        tile_bytes: what one step of a search may take.
        cache_bytes: what blocks may take.
    """

    tile_bytes: int
    cache_bytes: int


def split_memory(free_bytes: int) -> Memory:
    """Divide a card's free memory."""
    tile = min(max(free_bytes // 8, _LEAST_TILE_BYTES), _MOST_TILE_BYTES)
    return Memory(tile, max(0, free_bytes - NETWORK_BYTES - FAISS_BYTES - tile))


def index_fits(index_bytes: int, free_bytes: int) -> bool:
    """Whether an index goes to a card with so much free memory: blocks need the rest of it."""
    return index_bytes <= _INDEX_SHARE * split_memory(free_bytes).cache_bytes


@dataclass(frozen=True)
class Tile:
    """One step of a search: the number of queries, and the number of rows of a block that they meet."""

    queries: int
    rows: int


def fit_tile(tile_bytes: int, queries: int, rows: int, channels: int, group: int) -> Tile:
    """The largest step that fits: all rows of a block and as many queries as fit beside them, or fewer rows if those were few.

    Args:
        tile_bytes: what the product, the minima of its groups, the queries and the block may take together.
        queries: number of queries.
        rows: number of rows of a block.
        channels: number of channels of a vector.
        group: number of rows that share one minimum.
    """

    def fitting(of_rows: int) -> int:
        each = _FLOAT * (of_rows + -(-of_rows // group) + channels)
        return (tile_bytes - 2 * _FLOAT * of_rows * channels) // each

    while rows > group and fitting(rows) < min(queries, _LEAST_QUERIES):
        rows = -(-rows // 2)
    return Tile(queries=max(1, min(queries, fitting(rows))), rows=rows)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A card and its host; speeds are those that are reached, and not those of the data sheet."""

    name: str
    memory_bytes: int
    flops: float
    memory_bytes_per_s: float
    bus_bytes_per_s: float
    disk_bytes_per_s: float
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is searched: the levels and the size of a bank, and the number of neighbors of a test image."""

    levels: Sequence[Level]
    embedding_dim: int
    normals: int
    k_gallery: int


@dataclass(frozen=True, kw_only=True)
class GpuPlan:
    """What a card does for a job.

    Attributes:
        tile: the step at the finest level.
        batch: number of images that are scored at a time.
        index_bytes: what the embeddings take on the card; 0 where they stay in the host's memory.
        cached: number of normal images whose blocks the card caches.
        blocks: number of normal images whose blocks a batch needs, in the worst case: neighbors spread evenly over the bank.
        flop: floating-point operations for an image.
        bus_bytes: bytes that cross the bus for an image.
        disk_bytes: bytes that are read from the disk for an image.
        seconds: the time for an image by what takes it; the times overlap, so that the largest bounds the search.
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
        """The name of what the search waits for."""
        return max(self.seconds, key=self.seconds.__getitem__)


def plan_gpu(machine: Machine, job: Job, group: int) -> GpuPlan:
    """Plan a job on a machine; `docs/how-to/gpu.md` has the arithmetic in words.

    Args:
        machine: the card and its host.
        job: what is searched.
        group: number of rows of a block that share one minimum.
    """
    memory = split_memory(machine.memory_bytes)
    index_bytes = job.normals * job.embedding_dim * _FLOAT
    if not index_fits(index_bytes, machine.memory_bytes):
        index_bytes = 0
    locations = [(level.locations, level.channels) for level in job.levels]
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
    # Test maps and results cross as float32; they are small beside the blocks.
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
