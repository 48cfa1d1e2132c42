"""What a destination is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spade_faiss.watch.ledger import Parcel


class TryLaterError(Exception):
    """A destination does not take anything now.

    Args:
        reason: why.
        after_s: when it asked to be tried again.
    """

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Delivered:
    """What has become of the parcels that a destination was given.

    Args:
        taken: those that it has, surely.
        refused: those that it will never take, each with the reason.
        later: why the others are to be tried again, or None.
        fact: what is to be remembered with that, see `Ledger.confirm`.
    """

    def __init__(
        self,
        taken: Sequence[Parcel],
        refused: Sequence[tuple[Parcel, str]] = (),
        later: TryLaterError | None = None,
        fact: tuple[str, str] | None = None,
    ) -> None:
        self.taken = taken
        self.refused = refused
        self.later = later
        self.fact = fact


class Sink(Protocol):
    """A destination of verdicts. `deliver` is called by one thread; a parcel may come again that was delivered before."""

    @property
    def name(self) -> str:
        """What the ledger and people call it; no secret is in it."""

    @property
    def takes_all(self) -> bool:
        """Whether it gets all pictures even where alarms alone are asked for."""

    @property
    def wants_files(self) -> bool:
        """Whether it gets overlays and maps of alarms."""

    @property
    def wants_pictures(self) -> bool:
        """Whether it gets the pictures themselves."""

    @property
    def at_a_time(self) -> int:
        """How many parcels it takes in one call."""

    def open(self, fact: str | None) -> None:
        """Get ready; `fact` is what it had remembered last.

        Raises:
            SpadeError: if it cannot be used as it was given.
        """

    def deliver(self, parcels: Sequence[Parcel]) -> Delivered:
        """Deliver parcels in their order, and return what has become of them.

        Raises:
            TryLaterError: if none could be delivered now.
        """

    def close(self) -> None:
        """Let go of what is open."""
