"""The threads that search, each with a single-threaded FAISS, and the device that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from spade_faiss.core.device import CPU, Device
from spade_faiss.core.once import Once
from spade_faiss.core.process import PerProcess
from spade_faiss.search.distances import import_faiss

if TYPE_CHECKING:
    from spade_faiss.search.accelerator import Accelerator

T = TypeVar("T")


class Workers:
    """A pool of threads for searches, and the device of those searches that can use one.

    A fork has threads of its own, which start at its first task.

    One single-threaded search per core beats one search spread over the cores: the decoding, the products and the evaluations
    of different blocks overlap, and what a search returns does not depend on the number of threads.

    Args:
        threads: number of threads; by default as many as FAISS may use in the thread that makes the pool
            (`faiss.omp_set_num_threads`, or `OMP_NUM_THREADS`).
        device: where those searches run that can use it.
    """

    def __init__(self, threads: int | None = None, device: Device = CPU) -> None:
        self.device = device
        self.threads: int = threads or import_faiss().omp_get_max_threads()
        # No method of this class: a pool that refers to its owner would keep it alive, and with it a bank's lease.
        self._pool = PerProcess(partial(_start_threads, self.threads))
        self._accelerator = Once(partial(_open_accelerator, device))

    def submit(self, task: Callable[..., T], *arguments: object) -> Future[T]:
        """Run `task(*arguments)` in one of the threads; tasks begin in the order in which they were submitted."""
        return self._pool().submit(task, *arguments)

    @property
    def accelerator(self) -> Accelerator:
        """The device as torch uses it; the searches of all levels share its memory."""
        return self._accelerator()


def _open_accelerator(device: Device) -> Accelerator:
    from spade_faiss.search.accelerator import open_accelerator

    return open_accelerator(device)


def _start_threads(count: int) -> ThreadPoolExecutor:
    # The initializer sets the number of FAISS's threads of each thread alone.
    return ThreadPoolExecutor(count, "spade_faiss", initializer=import_faiss().omp_set_num_threads, initargs=(1,))
