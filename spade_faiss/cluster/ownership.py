"""Who owns which shard: rendezvous hashing, so that a lost owner's shards move, and no others. Pure functions, without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from spade_faiss.core.errors import ClusterError


def ranked_owners(shard: str, owners: Iterable[str]) -> list[str]:
    """The owners of a shard, the first one first: those with the highest hashes of both names.

    Source: Thaler & Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 6(1), 1998.

    Args:
        shard: the checksum of the shard.
        owners: the names of those who are there.
    """
    return sorted(owners, key=lambda owner: (hashlib.sha256(f"{owner}\n{shard}".encode()).digest(), owner), reverse=True)


def partition(shards: Sequence[tuple[int, str]], owners: Iterable[str], replica: int = 0) -> dict[str, tuple[int, ...]]:
    """The shards that each owner searches: together they are all, each once.

    Args:
        shards: number and checksum of each shard.
        owners: the names of those who are there.
        replica: which of a shard's owners has it, 0 for the first; where there are fewer owners, it starts over.

    Returns:
        Owner -> the numbers of its shards, ascending; owners without a shard are left out.

    Raises:
        ClusterError: if there is no owner.
    """
    there = sorted(owners)
    if not there:
        raise ClusterError("all nodes that held shards of the bank are lost; run the command again")
    found: dict[str, list[int]] = {}
    for number, sha256 in sorted(shards):
        found.setdefault(ranked_owners(sha256, there)[replica % len(there)], []).append(number)
    return {owner: tuple(numbers) for owner, numbers in sorted(found.items())}
