"""Compaction: which shards of a bank become one, and the features that the new shard holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spade_faiss.bank.shards import ShardEntry
from spade_faiss.bank.state import BankState
from spade_faiss.features.batch import FeatureBatch, concatenate


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What `Bank.compact` did.

    Args:
        dropped: the number of removed images that are gone for good.
        bytes_before: the bytes of all shards before.
        bytes_after: the bytes of all shards after.
        bytes_written: the bytes of the shards that were written.
    """

    dropped: int
    bytes_before: int
    bytes_after: int
    bytes_written: int


def plan_compaction(shards: Sequence[ShardEntry], target_bytes: int) -> list[list[int]]:
    """Group neighboring shards; each group becomes one shard of up to `target_bytes`.

    Those of a product stand together afterwards, so that they are neighbors whatever was added in between. A shard without
    removed images that is at least half as large stays as it is.
    """
    groups: list[list[int]] = []
    gathered = 0
    first = {shard.product: number for number, shard in reversed([*enumerate(shards)])}
    for number in sorted(range(len(shards)), key=lambda number: first[shards[number].product]):
        shard = shards[number]
        size = shard.bytes * shard.live_count // shard.count
        stays = not shard.removed and size >= target_bytes // 2
        is_next = bool(groups) and shard.product == shards[groups[-1][-1]].product
        if is_next and gathered and not stays and gathered + size <= target_bytes:
            groups[-1].append(number)
            gathered += size
        else:
            groups.append([number])
            gathered = 0 if stays else size
    return groups


def join_shards(state: BankState, group: Sequence[int]) -> FeatureBatch:
    """Return the images of some shards that were not removed as one batch, copied."""
    batches = [_live_images(state, number) for number in group if state.manifest.shards[number].live_count]
    # Some batches may have what others lack: files, and a mask of where the input shows an image.
    has_paths, has_sha256 = (any(getattr(batch, name) for batch in batches) for name in ("paths", "sha256"))
    has_valid = any(batch.valid is not None for batch in batches)
    root = next((batch.root for batch in batches if batch.paths), "")

    def like_the_others(batch: FeatureBatch) -> FeatureBatch:
        nothing, paths = [""] * len(batch), batch.paths
        if batch.root != root:
            paths = [os.path.relpath(Path(batch.root, path), root) if path else "" for path in paths]
        valid = np.ones((len(batch), *state.manifest.layout.input_size), np.bool_) if has_valid else None
        return replace(
            batch,
            root=root,
            paths=paths or nothing if has_paths else (),
            sha256=batch.sha256 or nothing if has_sha256 else (),
            valid=valid if batch.valid is None else batch.valid,
        )

    return concatenate([like_the_others(batch) for batch in batches])


def _live_images(state: BankState, number: int) -> FeatureBatch:
    """Return the images of a shard that were not removed as they are stored, copied."""
    shard, live = state.shard(number), state.manifest.shards[number].live

    def texts(field: str) -> list[str]:
        found = shard.texts(field)
        return [found[position] for position in live] if found else []

    return FeatureBatch(
        texts("id"),
        shard.embedding[live],
        {name: maps[live] for name, maps in shard.levels.items()},
        state.manifest.source,
        valid=shard.valid(live, state.manifest.layout.input_size),
        paths=texts("path"),
        sha256=texts("sha256"),
        pictures=texts("picture"),
        groups=texts("group"),
        places=None if shard.places is None else shard.places[live],
        root=shard.root,
    )
