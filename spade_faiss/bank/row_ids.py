"""The ids of a bank's rows, shared by the states that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from spade_faiss.core.once import Once


class RowIds:
    """The entry ids of a state in row order. States that follow each other by appending share one list, which only grows.

    A long extraction commits one state for each shard: copying or reading the ids of all earlier shards each time would make
    its cost grow with the square of the number of shards.
    """

    def __init__(self, ids: list[str], row_of: dict[str, int], count: int) -> None:
        self._ids = ids
        self._row_of = row_of
        self._count = count  # what stands behind belongs to later states
        self._listed = Once(partial(_first, ids, count))

    @classmethod
    def of(cls, ids: Sequence[str]) -> RowIds:
        """Number ids from 0."""
        return cls(list(ids), {name: row for row, name in enumerate(ids)}, len(ids))

    def __len__(self) -> int:
        return self._count

    def row(self, name: str) -> int | None:
        """Return the row of an entry; None for an id that this state does not have."""
        row = self._row_of.get(name)
        return row if row is not None and row < self._count else None

    def listed(self) -> list[str]:
        """Return all ids; the list is made at the first call."""
        return self._listed()

    def followed_by(self, ids: Sequence[str]) -> RowIds:
        """Return the ids of the state that is made by appending entries to this one."""
        if len(self._ids) > self._count:  # another state follows this one already
            return RowIds.of([*self.listed(), *ids])
        self._ids.extend(ids)
        self._row_of.update({name: self._count + number for number, name in enumerate(ids)})
        return RowIds(self._ids, self._row_of, len(self._ids))


def _first(ids: list[str], count: int) -> list[str]:
    return ids[:count]
