"""What a fork changes: it has one thread of its own, copies of locks that nobody will release, and no OpenMP threads."""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# The package imports this module first: a process with another id is a fork of the one that imported the package.
_IMPORTED_BY = os.getpid()


class PerProcess(Generic[T]):
    """A value that each process makes for itself at its first use, such as a lock or a pool of threads.

    Args:
        make: makes the value. It must not refer to the object that owns this one: the two would keep each other alive.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def __call__(self) -> T:
        """Return the value of this process."""
        pid = os.getpid()
        if pid not in self._made:
            # If two threads make one at the same time, both get the same. No lock: it could be held at the time of a fork.
            self._made.setdefault(pid, self._make())
        return self._made[pid]


def cores() -> int:
    """The number of cores that the system gives this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """The number of cores that this process may use: those that the system gives it, and no more than `OMP_NUM_THREADS`."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(asked)) if asked.isdecimal() and int(asked) else cores()


def processor_flags() -> frozenset[str]:
    """What this processor can do, by Linux's names; empty where the system does not tell."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return frozenset(file.read(1 << 13).split())
    except OSError:
        return frozenset()


def is_fork() -> bool:
    """Whether this process was forked after the package was imported."""
    return os.getpid() != _IMPORTED_BY


def fork_safe(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that computes with FAISS or torch, so that it runs in a fork, too.

    GNU's OpenMP, which both of them use, keeps its threads for the thread that used them first. A fork has a copy of that
    thread, but not of those threads, and the copy waits for them without end. So in a fork, the function runs in a new thread,
    for which OpenMP starts new ones; the number of threads, and with it every result, is the same.
    """

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        # The thread that forked is the main thread of the fork; all others are new.
        if not is_fork() or threading.current_thread() is not threading.main_thread():
            return function(*arguments, **options)
        call = functools.partial(function, *arguments, **options)
        return _computing_thread().submit(contextvars.copy_context().run, call).result()

    return run


def _new_computing_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "spade_faiss_fork")


_computing_thread = PerProcess(_new_computing_thread)
