"""Searching the neighbours' maps: one file per way of searching, behind the protocol `GallerySearch`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from spade_faiss.errors import InputError
from spade_faiss.features import FloatArray
from spade_faiss.knn import IntArray

# A block: one normal image's map at one level, row -> (H*W, C) float32. It may be a read-only view.
ReadBlock = Callable[[int], FloatArray]


@dataclass(frozen=True, eq=False)
class Hits:
    """The nearest gallery vectors of n images' locations.

    Args:
        sq_dist: (n, HW, kappa) squared L2 distances, ascending.
        row: (n, HW), the bank row of the normal image that holds the nearest vector.
        location: (n, HW), its location in that image's map, `y * W + x`.
    """

    sq_dist: FloatArray
    row: IntArray
    location: IntArray


class GallerySearch(Protocol):
    """A way to find, for each location of each test image, the nearest vectors in a few normal images' maps.

    An implementation is a callable without state between calls, safe to share between threads. It must return the same
    numbers whatever the other test images of the batch are, break ties between images by the smaller bank row (of equal
    vectors in one image it may name any), and never change its arguments. It may be approximate; distances it returns are
    true distances to the vectors it names.
    """

    def __call__(self, read_block: ReadBlock, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """Search one level.

        Args:
            read_block: gives the block of a bank row.
            xq: (n, HW, C) float32, the test images' vectors.
            neighbors: (n, K), each test image's own gallery: bank rows, distinct within a line.
            kappa: neighbours to return; at most K * HW.
        """
        ...


def find_gallery_search(method: str) -> GallerySearch:
    """The search that a recipe names.

    Raises:
        InputError: for an unknown name.
    """
    if method == "exact":
        from spade_faiss.gallery.exact import search

        return search
    raise InputError(f"gallery={method!r} is not one of exact")
