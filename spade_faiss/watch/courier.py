"""Delivers what waits for one destination, in a thread of its own, until it has it."""

from __future__ import annotations

import logging
import threading

from spade_faiss.watch.backoff import Backoff
from spade_faiss.watch.ledger import Ledger
from spade_faiss.watch.sinks.sink import Sink, TryLaterError

_log = logging.getLogger(__name__)

_IDLE_S = 1.0
# One failure is no news: a destination that was started anew, a server that is busy.
_SAID_AFTER = 3


class Courier:
    """Takes parcels from the ledger to a destination; one that does not answer holds up no other.

    Args:
        sink: the destination, opened.
        ledger: where parcels wait.
    """

    def __init__(self, sink: Sink, ledger: Ledger) -> None:
        self.sink = sink
        self.delivered = 0
        self.refused = 0
        self.trouble = ""
        self._failures = 0
        self.error: BaseException | None = None
        self._ledger = ledger
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._backoff = Backoff(0.2, 60)
        self._thread = threading.Thread(target=self._work, name=f"courier-{sink.name}", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to deliver."""
        self._woken.set()

    def stop(self, timeout_s: float) -> None:
        """End; what is on its way is waited for."""
        self._stopping.set()
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                self._woken.clear()
                if not self._deliver():
                    self._woken.wait(_IDLE_S)
        except BaseException as error:  # it is raised by the main loop
            self.error = error

    def _deliver(self) -> bool:
        """Deliver the first of what waits; returns whether there was any."""
        parcels = self._ledger.waiting(self.sink.name, self.sink.at_a_time)
        if not parcels:
            return False
        later: TryLaterError | None = None
        try:
            done = self.sink.deliver(parcels)
        except TryLaterError as error:
            later = error
        else:
            later = done.later
            if done.taken:
                self._ledger.confirm(done.taken, done.fact)
                self.delivered += len(done.taken)
                self._backoff.reset()
            for parcel, reason in done.refused:
                _log.warning("%s does not take %s: %s", self.sink.name, parcel.id, reason)
                self._ledger.refuse(parcel, reason)
                self.refused += 1
        if later is None:
            if self._failures >= _SAID_AFTER:
                _log.warning("%s takes verdicts again", self.sink.name)
            self.trouble, self._failures = "", 0
            return True
        self.trouble, self._failures = str(later), self._failures + 1
        if self._failures == _SAID_AFTER:
            _log.warning("%s: %s; it is tried again until it answers", self.sink.name, later)
        self._stopping.wait(self._backoff.next_s(later.after_s))
        return True
