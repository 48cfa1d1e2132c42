"""What an index covers of a bank, and whether what it learned still fits: for all that is built beside a bank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.search.recipe import Recipe

# Beyond these, what was built is made anew rather than added to.
_MOST_TOMBSTONES = 0.25
_MOST_GROWTH = 4.0
_MOST_SPREAD = 1.5
# Embeddings that tell how far a set of images spreads; fewer than the least tell nothing.
_SAMPLE = 2000
_LEAST = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexedShard:
    """A shard that was indexed, all of its images, removed ones too: by its content, so that no other passes for it."""

    sha256: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """How an index stands to its bank: images `covered`, images it does not know yet, and `dead` entries without an image."""

    covered: int
    beside: int
    dead: int

    def __str__(self) -> str:
        parts = [f"covers {self.covered} images"]
        parts += [f"{self.beside} are searched beside it"] if self.beside else []
        parts += [f"{self.dead} of its entries are of images that are gone"] if self.dead else []
        return ", ".join(parts)


def check_listed(shards: Sequence[IndexedShard]) -> None:
    """Raise InputError if this is no list of what an index covers."""
    if len({shard.sha256 for shard in shards}) < len(shards) or any(shard.count < 1 for shard in shards):
        raise InputError(f"it lists a shard twice, or one without images: {shards}")


def check_covers(bank: Snapshot, shards: Sequence[IndexedShard], folder: Path, command: str) -> None:
    """Raise BankError if an index says otherwise of a shard than the bank; warn if it covers nothing that the bank holds."""
    held = {shard.sha256: shard.count for shard in bank.manifest.shards}
    if len(bank) and not any(shard.sha256 in held for shard in shards):
        _log.warning(
            "index %s covers no image of the bank: all are searched beside it; bring it up to date: %s", folder, command
        )
    for shard in shards:
        if (count := held.get(shard.sha256, shard.count)) != shard.count:
            raise BankError(f"index {folder} says that a shard has {shard.count} images, it has {count}; run: {command}")


def staleness(bank: Snapshot, shards: Sequence[IndexedShard]) -> Staleness:
    """How an index over these shards stands to a bank."""
    held = {shard.sha256: shard.live_count for shard in bank.manifest.shards}
    covered = sum(held.get(shard.sha256, 0) for shard in shards)
    return Staleness(covered=covered, beside=len(bank) - covered, dead=sum(shard.count for shard in shards) - covered)


def too_many_tombstones(bank: Snapshot, shards: Sequence[IndexedShard]) -> str | None:
    """Why an index that passes over its dead entries in every search should be made anew; None where it need not.

    Removed images of shards that are there stay among the entries until the bank is compacted: they may come back.
    """
    held = {shard.sha256 for shard in bank.manifest.shards}
    entries, dead = sum(shard.count for shard in shards), sum(shard.count for shard in shards if shard.sha256 not in held)
    return f"{dead} of its {entries} entries are of images that are gone" if dead > _MOST_TOMBSTONES * entries else None


def why_learn_anew(bank: Snapshot, shards: Sequence[IndexedShard], trained: int) -> str | None:
    """Why what was learned fits the bank no more; None where it does.

    Args:
        bank: the bank.
        shards: that the index covers, in the order they were added.
        trained: how many of them, the first ones, it learned from; 0 if it learned nothing.
    """
    if not trained:
        return None
    learned_from = sum(shard.count for shard in shards[:trained])
    if len(bank) > _MOST_GROWTH * learned_from:
        return f"it learned from {learned_from} images, the bank holds {len(bank)}"
    names = {shard.sha256 for shard in shards[:trained]}
    then, since = (_sample(bank, names, known) for known in (True, False))
    if len(then) == 0:
        return "the images it learned from are gone"
    if min(len(then), len(since)) < _LEAST:
        return None
    center = then.mean(axis=0)
    spread, before = (float(np.sqrt(np.square(xb - center).sum(axis=1).mean())) for xb in (since, then))
    if spread > _MOST_SPREAD * before:
        return f"images added since lie {spread / max(before, 1e-30):.1f} times as far from the mean as those it learned from"
    return None


def _sample(bank: Snapshot, names: set[str], known: bool) -> FloatArray:
    """Some embeddings from the shards that are, or are not, among `names`."""
    chosen = [index for index, shard in enumerate(bank.manifest.shards) if (shard.sha256 in names) == known]
    rows = np.concatenate([np.empty(0, np.int64), *(bank.rows_of_shard(index) for index in chosen)])
    rows = rows[rows >= 0]
    return bank.embedding(rows[:: -(-max(1, len(rows)) // _SAMPLE)])


def index_folder(bank: Snapshot, recipe: Recipe) -> Path:
    """Where a bank keeps the indexes of a recipe."""
    return bank.path / "indexes" / recipe.name
