"""Values that are computed at their first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from spade_faiss.core.process import PerProcess

T = TypeVar("T")


class once(Generic[T]):  # used as a decorator
    """A property that is computed at its first use, and never again.

    Python 3.11's `functools.cached_property` holds a lock meanwhile, one for all objects of a class: a process that forks in
    that time leaves it locked in the fork for ever. This one has no lock. Threads that meet compute the same value twice.

    Args:
        compute: computes the value of an object.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> once[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> once[T] | T:
        if instance is None:
            return self
        # From now on, Python finds the value before it finds this descriptor.
        value = instance.__dict__[self._name] = self._compute(instance)
        return value


class Once(Generic[T]):
    """A value that is computed at its first use, once for all threads.

    A fork computes it again only if its parent had not finished.

    Args:
        make: computes the value. It must not refer to the object that owns this one: the two would keep each other alive.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._lock = PerProcess(threading.Lock)

    def __call__(self) -> T:
        """Return the value, and compute it if this is the first call."""
        with self._lock():
            if not self._made:
                self._made.append(self._make())
            return self._made[0]
