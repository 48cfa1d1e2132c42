"""How stale an index is: which images of its bank it holds, and whether what it was trained on still resembles the bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import check_sha256
from spade_faiss.core.types import FloatArray

# An index is built anew if a larger share of its entries are tombstones, if the bank has grown by a larger factor since the
# training, or if the spread of new images is larger by a larger factor.
_MOST_TOMBSTONES = 0.25
_MOST_GROWTH = 4.0
_MOST_SPREAD = 1.5
# How many embeddings the spread of images is measured on; it is not measured on fewer than the least.
_SAMPLE = 2000
_LEAST = 20


@dataclass(frozen=True, kw_only=True)
class IndexedShard:
    """A shard whose images are in an index, removed ones included. It is identified by its content, wherever it stands.

    Args:
        sha256: the checksum of the shard.
        count: the number of its images.
    """

    sha256: str
    count: int

    def __post_init__(self) -> None:
        check_sha256(self.sha256)
        if not 0 < self.count < 1 << 40:
            raise InputError(f"a shard of {self.count} images cannot be in an index")


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """How an index compares to its bank.

    Args:
        indexed: the number of the bank's images that the index holds.
        unindexed: the number of the bank's images that it does not hold; they are searched without it.
        tombstones: the number of its entries whose image was removed from the bank.
    """

    indexed: int
    unindexed: int
    tombstones: int

    def __str__(self) -> str:
        parts = [f"{self.indexed} images indexed"]
        parts += [f"{self.unindexed} not indexed yet"] if self.unindexed else []
        parts += [f"{self.tombstones} tombstones of removed images"] if self.tombstones else []
        return ", ".join(parts)


def staleness(bank: Snapshot, shards: Sequence[IndexedShard]) -> Staleness:
    """Compare an index, which holds `shards`, to its bank."""
    live = {shard.sha256: shard.live_count for shard in bank.manifest.shards}
    indexed = sum(live.get(shard.sha256, 0) for shard in shards)
    entries = sum(shard.count for shard in shards)
    return Staleness(indexed=indexed, unindexed=len(bank) - indexed, tombstones=entries - indexed)


def too_many_tombstones(bank: Snapshot, shards: Sequence[IndexedShard]) -> str | None:
    """Say why an index that skips its tombstones in every search should be built anew; None if it need not be.

    Images of shards that are still in the bank do not count: they stay in the index until the bank is compacted, because they
    may be restored.
    """
    held = {shard.sha256 for shard in bank.manifest.shards}
    entries = sum(shard.count for shard in shards)
    tombstones = sum(shard.count for shard in shards if shard.sha256 not in held)
    if tombstones <= _MOST_TOMBSTONES * entries:
        return None
    return f"{tombstones} of its {entries} entries are of images that are gone"


def why_train_anew(bank: Snapshot, shards: Sequence[IndexedShard], trained: int) -> str | None:
    """Say why the training of an index does not fit its bank any more; None if it does.

    Args:
        bank: the bank.
        shards: the shards that the index holds, in the order in which they were added.
        trained: the index was trained on the first so many of them; 0 for an index without training.
    """
    if not trained:
        return None
    trained_on = sum(shard.count for shard in shards[:trained])
    if len(bank) > _MOST_GROWTH * trained_on:
        return f"it was trained on {trained_on} images, the bank holds {len(bank)}"
    names = {shard.sha256 for shard in shards[:trained]}
    then, since = (_sample(bank, names, among=among) for among in (True, False))
    if len(then) == 0:
        return "the images it was trained on are gone"
    if min(len(then), len(since)) < _LEAST:
        return None
    center = then.mean(axis=0)
    spread, before = (float(np.sqrt(np.square(xb - center).sum(axis=1).mean())) for xb in (since, then))
    if spread > _MOST_SPREAD * before:
        return f"images added since lie {spread / max(before, 1e-30):.1f} times as far from the mean as those it was trained on"
    return None


def _sample(bank: Snapshot, names: set[str], *, among: bool) -> FloatArray:
    """Return some embeddings from the shards that are, or are not, among `names`, (n, d)."""
    chosen = [index for index, shard in enumerate(bank.manifest.shards) if (shard.sha256 in names) == among]
    rows = np.concatenate([np.empty(0, np.int64), *(bank.rows_of_shard(index) for index in chosen)])
    rows = rows[rows >= 0]
    return bank.embedding(rows[:: -(-max(1, len(rows)) // _SAMPLE)])
