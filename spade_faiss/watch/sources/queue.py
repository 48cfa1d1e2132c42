"""The thread of a source, and the queue through which it hands pictures over."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from contextlib import suppress

from spade_faiss.watch.arrivals import Arrival

# Files wait on disk, so that few need to be in the queue.
_LENGTH = 256


class QueuedSource(ABC):
    """A source whose thread waits while its queue is full: nothing is lost, since its pictures stay where they are."""

    def __init__(self, name: str) -> None:
        self.stopping = threading.Event()
        self._queue: queue.Queue[Arrival] = queue.Queue(_LENGTH)
        self._thread = threading.Thread(target=self._work, name=f"source-{name}", daemon=True)
        self._error: BaseException | None = None
        self._is_done = False

    @property
    def dropped(self) -> int:
        """See `Source`: none."""
        return 0

    @property
    def has_ended(self) -> bool:
        """See `Source`."""
        return self._is_done and self._queue.empty()

    def start(self) -> None:
        """See `Source`."""
        self._thread.start()

    def get(self, timeout_s: float) -> Arrival | None:
        """See `Source`."""
        try:
            return self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            if self._error is not None:
                raise self._error from None
            return None

    def put(self, arrival: Arrival) -> None:
        """Hand a picture over, once there is room."""
        while not self.stopping.is_set():
            with suppress(queue.Full):
                self._queue.put(arrival, timeout=0.1)
                break

    def unreadable(self, arrival: Arrival, *, changed: bool) -> bool:
        """See `Source`."""
        return True

    def settled(self, arrival: Arrival) -> None:  # noqa: B027  # most sources need not know
        """See `Source`."""

    def stop(self) -> None:
        """See `Source`."""
        self.stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @abstractmethod
    def find(self) -> None:
        """Find pictures and `put` them, until there are no more or `stopping` is set; runs in the thread."""

    def _work(self) -> None:
        try:
            self.find()
        except BaseException as error:  # it is raised where pictures are taken
            self._error = error
        finally:
            self._is_done = True
