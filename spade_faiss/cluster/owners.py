"""Asking the owners of a bank's shards: who has which shard, what travels, and where a lost owner's shards go."""

from __future__ import annotations

import itertools
import logging
import pickle
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import numpy as np

from spade_faiss.cluster.owner import OwnedBank, ShardOwner, Shards
from spade_faiss.cluster.ownership import partition
from spade_faiss.cluster.session import Session, import_ray
from spade_faiss.core.errors import ClusterError, SpadeError

# Questions that an owner answers at the same time: one is read and written while another one is searched for.
_AT_A_TIME = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traffic:
    """What has traveled between somebody and the owners, in bytes of arrays.

    Args:
        sent: of the images' features.
        received: of answers.
        requests: how many requests there were.
        moved: how often the shards of a lost owner have moved.
    """

    sent: int = 0
    received: int = 0
    requests: int = 0
    moved: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))


class Owners:
    """Asks the owners of a bank's shards. Threads may share it; pickled, it is the names of the owners.

    Args:
        names: where each owner is, which says what it owns -> the name under which Ray knows it.
        shards: number and checksum of each shard that has a row.
        replicas: how many owners each shard has.
    """

    def __init__(self, names: Mapping[str, str], shards: Sequence[tuple[int, str]], replicas: int) -> None:
        self._names = dict(names)
        self._shards = tuple(shards)
        self._replicas = replicas
        self._handles: dict[str, Any] = {}
        self._lost: set[str] = set()
        self._partitions: dict[tuple[frozenset[str], int], dict[str, Shards]] = {}
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._traffic = Traffic()

    def __reduce__(self) -> tuple[type[Owners], tuple[Any, ...]]:
        return type(self), (self._names, self._shards, self._replicas)

    @property
    def names(self) -> dict[str, str]:
        """Where each owner is -> the name under which Ray knows it."""
        return dict(self._names)

    @property
    def traffic(self) -> Traffic:
        """What has traveled so far."""
        with self._lock:
            return self._traffic

    def ask(self, method: str, request_of: Callable[[Shards], tuple[Any, ...] | None]) -> list[Any]:
        """Ask all owners, each for its shards; a request whose owner is lost is repeated by those who have its shards then.

        Args:
            method: what they are asked, a method of `ShardOwner`.
            request_of: makes the arguments for some shards; None if these are not needed.

        Returns:
            The answers, in no order.

        Raises:
            SpadeError: what an owner raised; the message names it.
            ClusterError: if all owners are lost.
        """
        answers: list[Any] = []
        replica, waiting = next(self._turns) % self._replicas, self._shards
        while waiting:
            there = self._owned(waiting, replica)
            asked = [(owner, shards, self._send(owner, method, shards, request_of)) for owner, shards in there.items()]
            again: set[int] = set()
            for owner, shards, reference in asked:
                if reference is not None and not self._receive(owner, reference, answers):
                    again |= {*shards}
            waiting = tuple(shard for shard in self._shards if shard[0] in again)
        return answers

    def _owned(self, shards: tuple[tuple[int, str], ...], replica: int) -> dict[str, Shards]:
        """Which owner has which of some shards now; what it is of all shards is computed once, as long as no owner is lost."""
        if shards is not self._shards:
            return partition(shards, self._names.keys() - self._lost, replica)
        key = frozenset(self._lost), replica
        if key not in self._partitions:
            self._partitions[key] = partition(shards, self._names.keys() - self._lost, replica)
        return self._partitions[key]

    def _send(
        self, owner: str, method: str, shards: Shards, request_of: Callable[[Shards], tuple[Any, ...] | None]
    ) -> Callable[[], Any] | None:
        """Send an owner its part of a question; returns what waits for the answer, None if nothing is asked for."""
        if (request := request_of(shards)) is None:
            return None
        ray = import_ray()
        try:
            if owner not in self._handles:
                self._handles[owner] = ray.get_actor(self._names[owner])
        except ValueError as error:  # Ray knows it no more
            return partial(_raise, ray.exceptions.ActorDiedError(), error)
        self._count(Traffic(sent=_nbytes(request), requests=1))
        return partial(ray.get, getattr(self._handles[owner], method).remote(shards, *request))

    def _receive(self, owner: str, wait: Callable[[], Any], answers: list[Any]) -> bool:
        """Take in an answer; False if its owner is lost."""
        errors = import_ray().exceptions
        try:
            answer = wait()
        except errors.RayTaskError as error:
            if isinstance(error.cause, SpadeError):
                raise type(error.cause)(f"{error.cause} [{owner}]") from None
            raise ClusterError(f"{owner} failed: {error.cause!r}") from error
        except (errors.RayActorError, errors.ActorUnschedulableError, errors.ObjectLostError) as error:
            self._lose(owner, error)
            return False
        self._count(Traffic(received=_nbytes(answer)))
        answers.append(answer)
        return True

    def _lose(self, owner: str, error: Exception) -> None:
        with self._lock:
            if owner in self._lost:
                return
            self._lost.add(owner)
            self._traffic += Traffic(moved=1)
        _log.warning("%s is lost (%s); its shards move to others", owner, type(error).__name__)

    def _count(self, traffic: Traffic) -> None:
        with self._lock:
            self._traffic += traffic


@contextmanager
def open_owners(session: Session, owned: OwnedBank) -> Iterator[Owners]:
    """Start an owner at each place of a cluster; they end with the `with` block.

    Args:
        session: the connection.
        owned: what they search, and how.
    """
    ray, pickled = import_ray(), pickle.dumps(owned)
    kind, key, names, handles = ray.remote(ShardOwner), secrets.token_hex(8), {}, []
    for number, (node, place) in enumerate(session.places()):
        name = names[f"owner {place} on node {node}"] = f"spade-faiss-{key}-{number}"
        handles.append(kind.options(name=name, max_concurrency=_AT_A_TIME, **session.at(node)).remote(pickled))
    shards = [(number, shard.sha256) for number, shard in enumerate(owned.bank.manifest.shards) if shard.live_count]
    try:
        yield Owners(names, shards, owned.replicas)
    finally:
        for handle in handles:
            ray.kill(handle)


def _raise(error: Exception, cause: Exception) -> None:
    raise error from cause


def _nbytes(value: object) -> int:
    """The bytes of all arrays of a question or an answer."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value))
    return sum(map(_nbytes, vars(value).values())) if is_dataclass(value) else 0
