"""The connected parts of a mask, by its runs: stretches of a row that are True."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import Bools

Ints = npt.NDArray[np.int64]


class Component(NamedTuple):
    """A connected part of a mask.

    Attributes:
        rows, columns: the smallest box that holds it.
        mask: what of the box is in it.
    """

    rows: slice
    columns: slice
    mask: Bools


class _Runs(NamedTuple):
    """The runs of a mask, row by row: in which row each is, where it begins, and where it ends (not in it any more)."""

    row: Ints
    start: Ints
    stop: Ints


def components(mask: Bools) -> Iterator[Component]:
    """The connected parts of a mask (H, W), in the order of their first pixels; pixels that touch diagonally are connected.

    The same as by `scipy.ndimage.label` and `find_objects`, whose import takes longer than a picture takes to score.
    """
    runs = _runs(mask)
    component = _connected(len(runs.row), *_touching(runs))
    order = np.argsort(component, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(component[order])) + 1) if len(order) else []:
        row, start, stop = (values[own] for values in runs)
        top, left, right = row[0], start.min(), stop.max()
        inside = np.zeros((row[-1] + 1 - top, right - left), np.int8)
        # Each run begins with a 1 and is followed by a -1, which is in the next row where it ends at the border.
        edges = np.zeros(inside.size + 1, np.int8)
        begins = (row - top) * (right - left) - left
        edges[begins + start] += 1
        edges[begins + stop] -= 1
        found = np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_).reshape(inside.shape)
        yield Component(slice(int(top), int(row[-1]) + 1), slice(int(left), int(right)), found)


def _runs(mask: Bools) -> _Runs:
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    row, edge = np.nonzero(padded[:, 1:] != padded[:, :-1])
    return _Runs(row[::2], edge[::2], edge[1::2])


def _touching(runs: _Runs) -> tuple[Ints, Ints]:
    """Pairs of runs of neighboring rows that touch: each run, and all that it touches in the row above."""
    # Beyond the end of any row, so that runs of different rows lie apart on one line.
    stride = int(runs.stop.max(initial=0)) + 2
    line = runs.row * stride
    first = np.searchsorted(line + runs.stop, line - stride + runs.start)
    behind = np.searchsorted(line + runs.start, line - stride + runs.stop, side="right")
    counts = np.maximum(behind - first, 0)
    lower = np.repeat(np.arange(len(line)), counts)
    upper = np.arange(len(lower)) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(first, counts)
    return lower, upper


def _connected(count: int, lower: Ints, upper: Ints) -> Ints:
    """(count,) for each of some nodes, the smallest number of those that it is connected to by edges."""
    smallest = np.arange(count)
    while True:
        one, other = smallest[lower], smallest[upper]
        apart = one != other
        if not apart.any():
            return smallest
        # The larger of two roots points to the smaller one, and everything to its root.
        lower, upper, one, other = lower[apart], upper[apart], one[apart], other[apart]
        np.minimum.at(smallest, np.maximum(one, other), np.minimum(one, other))
        while (smallest[smallest] != smallest).any():
            smallest = smallest[smallest]
