"""A connection to a Ray cluster. This is the only module that imports Ray; everything else gets it from here."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from spade_faiss.core.cluster_address import Address, parse_address
from spade_faiss.core.errors import ClusterError, DependencyError, InputError

# A worker takes so many processors of a node, or all of a smaller one: more would wait for each other.
_WORKER_CPUS = 4
# Ray runs a task again, on whichever node has room, where its worker or its node is lost.
RETRIES = 3
# What Ray says where it has not started the process that serves a client, and how long until it is asked again.
_NOT_SERVED, _PAUSE_S = "Initialization failure from server", 1.0


def import_ray() -> ModuleType:
    """Import Ray.

    Raises:
        DependencyError: if it is not installed.
    """
    # A bank is nobody else's business: Ray reports its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise DependencyError(
            "working on a cluster needs the package ray; install it with: pip install 'spade-faiss[cluster]'"
        ) from error


@dataclass(frozen=True)
class Session:
    """An open connection.

    Args:
        cpus: how many processors a worker takes.
        owners: how many owners of shards a node has: one, or, where one machine stands for several, one for each worker.
    """

    cpus: int
    owners: int = 1

    def workers(self) -> int:
        """How many workers the cluster has room for now; nodes come and go."""
        nodes = import_ray().nodes()
        return max(1, sum(int(node["Resources"].get("CPU", 0)) // self.cpus for node in nodes if node["Alive"]))

    def places(self) -> list[tuple[str, int]]:
        """Where owners of shards are: the id of a node, and a number on it."""
        nodes = sorted(node["NodeID"] for node in import_ray().nodes() if node["Alive"] and node["Resources"].get("CPU", 0))
        return [(node, place) for node in nodes for place in range(self.owners)]

    def at(self, node: str) -> dict[str, Any]:
        """What Ray is told of an owner: it is on that node and nowhere else, and computes while workers wait for it."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return {"num_cpus": 0, "scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(node, soft=False)}

    def options(self, device: str) -> dict[str, Any]:
        """What Ray is told of a task: what it takes, and that it is run again where its worker is lost.

        Args:
            device: where the task computes; on a card, each worker has one of its own.

        Raises:
            InputError: for a numbered card: Ray says which card a worker gets.
        """
        if device.startswith("cuda:"):
            raise InputError(f"device={device!r} is a card of this machine; on a cluster each worker is given one: use cuda")
        found: dict[str, Any] = {"num_cpus": self.cpus, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        return {**found, "num_gpus": 1} if device == "cuda" else found


# The connection that this process has opened, as Ray's own is one of the process.
_open: Session | None = None


def connected(address: str | None) -> AbstractContextManager[Session | None]:
    """Stay connected from job to job inside a `with` block, so that workers need not start anew for each; nothing for None.

    It raises what `connect` raises.
    """
    return nullcontext() if address is None else connect(address)


@contextmanager
def connect(address: str) -> Iterator[Session]:
    """Be connected to a cluster inside a `with` block.

    A process that is connected to Ray already stays so, and works there, whatever the address.

    Args:
        address: `auto`, `ray://HOST:PORT` or `local:N`, see `parse_address`.

    Raises:
        InputError: for another address.
        DependencyError: if Ray is not installed.
        ClusterError: if there is no such cluster, or it has no node that computes.
    """
    global _open
    wanted, ray = parse_address(address), import_ray()
    if ray.is_initialized():
        yield _open or Session(_worker_cpus(ray, address), max(1, wanted.workers))
        return
    cpus = _begin(ray, wanted, address)
    try:
        _open = Session(cpus or _worker_cpus(ray, address), max(1, wanted.workers))
        yield _open
    finally:
        _open = None
        ray.shutdown()


def _begin(ray: ModuleType, wanted: Address, address: str) -> int:
    """Connect; returns how many processors a worker takes, 0 if the nodes decide that."""
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if wanted.ray is None:
        cpus = max(1, (os.cpu_count() or 1) // wanted.workers)
        ray.init(address="local", num_cpus=wanted.workers * cpus, include_dashboard=False, **quiet)
        return cpus
    try:
        _init(ray, wanted.ray, quiet)
    except (ConnectionError, RuntimeError) as error:
        # Ray's client says the same of a cluster that refuses it.
        token = "; one that asks for a token takes RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, set for the command as well"
        raise ClusterError(
            f"there is no cluster at {address} ({error}); start one with: ray start --head, or use --cluster local:N"
            f"{token if wanted.ray.startswith('ray://') else ''}"
        ) from error
    except ImportError as error:
        raise DependencyError(
            f"a cluster at {address} needs Ray's client; install it with: pip install 'ray[client]', or run the command on a "
            "node of the cluster with --cluster auto"
        ) from error
    return 0


def _init(ray: ModuleType, address: str, quiet: dict[str, Any]) -> None:
    """Connect, and again where Ray has not managed to start the process that serves a client: on a busy node, the next may."""
    for attempt in range(RETRIES + 1):
        try:
            ray.init(address=address, **quiet)
            return
        except ConnectionError as error:
            if attempt == RETRIES or _NOT_SERVED not in str(error):
                raise
            time.sleep(_PAUSE_S)


def _worker_cpus(ray: ModuleType, address: str) -> int:
    """How many processors a worker takes: so many that the smallest node has room for one."""
    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if not (computing := [count for count in found if count]):
        raise ClusterError(f"the cluster {address} has no node that computes; add one with: ray start --address=HEAD:PORT")
    return min([_WORKER_CPUS, *computing])
