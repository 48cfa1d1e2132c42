"""A Ray cluster of several nodes on this machine, whose workers and nodes can be lost: for measurements and tests."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

LOSSES = ("worker", "node", "driver")
_TICK_S = 0.02
_SAMPLE_S = 0.2


class Spent(NamedTuple):
    """CPU seconds of a command on a cluster.

    Attributes:
        driver: of its own process.
        workers: of the processes that worked for it, their start included.
        ray: of Ray's other processes while it ran, those of nodes that had nothing to do included.
    """

    driver: float
    workers: float
    ray: float


class SmallCluster:
    """Nodes with one processor each, and a head that computes nothing; commands run in processes of their own.

    Args:
        nodes: the number of nodes that compute.
        program: the module that commands are of.
    """

    def __init__(self, nodes: int, program: str = "spade_faiss") -> None:
        self._program = program
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=False
        )
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> None:
        """Add a node that computes."""
        self._cluster.add_node(num_cpus=1)

    def start(self, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command, which finds the cluster by `--cluster auto`."""
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", self._program, *words],
                stdout=file,
                stderr=file,
                env={**os.environ, "RAY_ADDRESS": self._cluster.address},
            )

    def run(self, words: Sequence[str], log: Path) -> None:
        """Run a command to its end.

        Raises:
            RuntimeError: if it fails; with what it printed.
        """
        if self.start(words, log).wait():
            raise RuntimeError(log.read_text())

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Let this process find the cluster by `auto`."""
        os.environ["RAY_ADDRESS"] = self._cluster.address
        try:
            yield
        finally:
            del os.environ["RAY_ADDRESS"]

    def cpu_s(self, words: Sequence[str], log: Path) -> Spent:
        """Run a command to its end; returns the CPU seconds of its driver, of all workers, and of Ray in that time.

        The start of the cluster is not counted: it is there before.

        Raises:
            RuntimeError: if it fails; with what it printed.
        """
        nodes = [*self._cluster.worker_nodes, self._cluster.head_node]
        own = {each.process.pid for node in nodes for found in node.all_processes.values() for each in found}
        before = {pid: _cpu_s(pid) for pid in own | {*_children(own)}}
        driver, seen, workers = self.start(words, log), dict(before), set[int]()
        while driver.poll() is None:  # workers end with the driver, and nobody counts them then
            children = {*_children(own)}
            workers |= {pid for pid in children - before.keys() if _is_worker(_title(pid))}
            seen |= {pid: _cpu_s(pid) or seen.get(pid, 0.0) for pid in own | {driver.pid} | children}
            time.sleep(_SAMPLE_S)
        if driver.returncode:
            raise RuntimeError(log.read_text())
        spent = {pid: seconds - before.get(pid, 0.0) for pid, seconds in seen.items()}
        total, own_s, of_workers = sum(spent.values()), spent[driver.pid], sum(spent[pid] for pid in workers)
        return Spent(own_s, of_workers, total - own_s - of_workers)

    def workers(self) -> list[int]:
        """The processes that work on pieces now, or own shards."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in self._cluster.worker_nodes}
        return [pid for pid in _children(raylets) if "_run_piece" in _title(pid) or "ShardOwner" in _title(pid)]

    def lose_worker(self, draw: random.Random) -> bool:
        """Kill a process that works on a piece; False if there is none now."""
        if not (found := self.workers()):
            return False
        with suppress(ProcessLookupError):
            os.kill(draw.choice(found), signal.SIGKILL)
        return True

    def lose_node(self, draw: random.Random) -> None:
        """Kill all processes of a node, and add another node."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
        self._cluster.remove_node(draw.choice(nodes), allow_graceful=False)
        self.add_node()

    def end(self) -> None:
        """End all nodes."""
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def small_cluster(nodes: int, program: str = "spade_faiss") -> Iterator[SmallCluster]:
    """A cluster that is there inside a `with` block; arguments are those of `SmallCluster`."""
    cluster = SmallCluster(nodes, program)
    try:
        yield cluster
    finally:
        cluster.end()


def run_with_loss(
    cluster: SmallCluster, words: Sequence[str], loss: str, begun: Callable[[], bool], draw: random.Random
) -> str:
    """Run a command on a cluster and lose something in the middle of it; the command is run again if its driver is lost.

    Args:
        cluster: the cluster.
        words: the command.
        loss: one of `LOSSES`.
        begun: whether the command has got somewhere, and something may be lost.
        draw: says what is lost.

    Returns:
        `lost`, or `ended` if the command was done before anything could be lost.

    Raises:
        RuntimeError: if the command fails; with what it printed.
    """
    log = Path(words[-1] + ".log")
    driver = cluster.start(words, log)
    outcome = "ended"
    while driver.poll() is None:
        if begun():
            if loss == "worker" and not cluster.lose_worker(draw):
                continue
            if loss == "node":
                cluster.lose_node(draw)
            if loss == "driver":
                driver.kill()
            outcome = "lost"
            break
        time.sleep(_TICK_S)
    code = driver.wait()
    if loss == "driver" and outcome == "lost":
        cluster.run(words, log)
    elif code:
        raise RuntimeError(log.read_text())
    return outcome


def _children(parents: set[int]) -> list[int]:
    """The processes whose parent is one of some."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            if int(path.read_text().rpartition(")")[2].split()[1]) in parents:
                found.append(int(path.parent.name))
    return sorted(found)


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process; 0 if it has ended."""
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _is_worker(title: str) -> bool:
    """Whether a process of Ray works for a command, or waits for that."""
    return "default_worker.py" in title or (title.startswith("ray::") and "Agent" not in title)


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""
