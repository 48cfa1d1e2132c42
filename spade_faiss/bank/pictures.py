"""Which picture each entry of a bank was made of: most pictures have one entry, others several, such as their views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spade_faiss.bank.row_ids import RowIds
from spade_faiss.core.once import once
from spade_faiss.core.types import IntArray


class Pictures:
    """The pictures that a bank's rows were made of, numbered in the order of their first rows.

    A picture is what is normal or not: it is left out, calibrated with, removed and counted as a whole. The first entry of a
    picture is the original, and stands for it where one entry has to.

    Args:
        count: the number of rows.
        ids: returns the ids of the pictures.
        of_row: (count,) the number of each row's picture; None where each row is a picture of its own.
    """

    def __init__(self, count: int, ids: Callable[[], RowIds], of_row: IntArray | None = None) -> None:
        self._count = count
        self._ids = ids
        self._of_row = of_row

    @classmethod
    def named(cls, of_row: Sequence[str]) -> Pictures:
        """Number the pictures that rows were made of, by the ids (count,) of those."""
        numbered = RowIds.of(list(dict.fromkeys(of_row)))
        number = {name: number for number, name in enumerate(numbered.listed())}
        return cls(len(of_row), lambda: numbered, np.array([number[name] for name in of_row], np.int64))

    def __len__(self) -> int:
        return self._count if self._of_row is None else len(self._ids())

    @property
    def ids(self) -> list[str]:
        """The id of each picture."""
        return self._ids().listed()

    @property
    def are_rows(self) -> bool:
        """Whether each row is a picture of its own."""
        return self._of_row is None

    def number(self, name: str) -> int | None:
        """Return the number of a picture; None for an id that is none of theirs."""
        return self._ids().row(name)

    def of(self, rows: IntArray) -> IntArray:
        """Return the numbers of the pictures that rows, of any shape, were made of."""
        return rows if self._of_row is None else self._of_row[rows]

    def names(self, rows: IntArray) -> list[str]:
        """Return the ids of the pictures that rows (n,) were made of."""
        ids = self.ids
        return [ids[number] for number in self.of(rows).tolist()]

    def rows(self, number: int) -> IntArray:
        """Return the rows of a picture, ascending: the first is the original."""
        if self._of_row is None:
            return np.array([number], np.int64)
        return self._sorted[self._starts[number] : self._starts[number + 1]]

    @property
    def originals(self) -> IntArray:
        """(pictures,) the first row of each picture."""
        return np.arange(self._count) if self._of_row is None else self._sorted[self._starts[:-1]]

    @property
    def sizes(self) -> IntArray:
        """(pictures,) the number of rows of each picture."""
        return np.ones(self._count, np.int64) if self._of_row is None else np.diff(self._starts)

    @once
    def largest(self) -> int:
        """The most rows that a picture has; 1 in an empty bank."""
        return 1 if self._of_row is None else int(self.sizes.max(initial=1))

    @once
    def _sorted(self) -> IntArray:
        """All rows, picture after picture."""
        assert self._of_row is not None
        return np.argsort(self._of_row, kind="stable")

    @once
    def _starts(self) -> IntArray:
        """(pictures + 1,) where the rows of each picture begin in `_sorted`."""
        assert self._of_row is not None
        return np.concatenate([[0], np.cumsum(np.bincount(self._of_row, minlength=len(self)))])
