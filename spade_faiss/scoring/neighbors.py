"""Which normal images each image is compared with: its nearest ones, and the gallery of each level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from spade_faiss.bank.snapshot import Part, Snapshot
from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.hints import add_command, calibrate_command
from spade_faiss.core.schema import shorten
from spade_faiss.core.settings import Method
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.scoring.level_search import gallery_sizes
from spade_faiss.scoring.same_place import SamePlace
from spade_faiss.search.levels import searched_levels

# Finds the rows of the k nearest of embeddings (n, D): squared L2 distances (n, k), ascending, and rows (n, k).
ImageSearch = Callable[[FloatArray, int], tuple[FloatArray, IntArray]]


class Neighbors:
    """Looks up the nearest normal images of images; of the bank's own, among all but their siblings.

    Args:
        bank: the bank.
        method: how many neighbors are looked up, and where those of tiles lie.
        nearest: searches all normal images.
        whole_bank: whether the gallery of each image is the whole bank.
    """

    def __init__(
        self,
        bank: Snapshot,
        method: Method,
        nearest: ImageSearch,
        *,
        whole_bank: bool,
    ) -> None:
        self.count = most_neighbors(method)
        self._bank = bank
        self._nearest = nearest
        self._whole_bank = whole_bank
        self._same_place = None if method.tile_neighbors == Method.tile_neighbors else SamePlace(bank)

    def search(self, query: FeatureBatch, own: IntArray | None = None) -> tuple[FloatArray, IntArray]:
        """Look up the `count` nearest.

        Args:
            query: n images, or tiles.
            own: (n,) their rows, if they are the bank's own: their siblings, of which all have as many, are left out.

        Returns:
            Squared L2 distances (n, count), ascending, and rows (n, count).
        """
        if self._same_place is not None:
            return self._same_place.search(query, self.count, own)
        if own is None:
            return self._nearest(query.embedding, self.count)
        siblings = self._bank.siblings
        # As many more as the largest group has entries: what an index finds must not depend on what is searched with it.
        sq_dist, rows = self._nearest(query.embedding, self.count + siblings.largest)
        others = siblings.of(rows) != siblings.of(own)[:, None]
        # There may be more than enough: the group may have fewer entries, and an approximate index may have missed some.
        others &= np.cumsum(others, axis=1) <= self.count
        return sq_dist[others].reshape(-1, self.count), rows[others].reshape(-1, self.count)

    def gallery(self, k_gallery: int | str, query: FeatureBatch, rows: IntArray, own: IntArray | None) -> IntArray:
        """(n, K) the bank rows that n images are searched in; nearest first, as far as the nearest `rows` (n, k) are known.

        For `own`, see `search`.
        """
        if k_gallery != ALL and not self._whole_bank:
            return rows[:, : int(k_gallery)]
        if self._same_place is not None:
            return self._same_place.gallery(query, rows, own)
        every, line = np.arange(len(self._bank)), []
        if own is None and self._whole_bank:
            # Written out, it would be as large as the bank for each image.
            return np.broadcast_to(every, (len(rows), len(every)))
        siblings = self._bank.siblings
        left_out = [] if own is None else [siblings.rows(number) for number in siblings.of(own).tolist()]
        for index, nearest in enumerate(rows):
            known = nearest if own is None else np.append(nearest, left_out[index])
            line.append(np.concatenate([nearest, np.delete(every, known)]))
        return np.stack(line)

    def check_leave_one_out(self) -> None:
        """Raise InputError if an image of the bank cannot be compared with as many others as are looked up."""
        bank = self._bank
        if not (others := len(bank) - bank.siblings.largest):
            raise InputError(
                f"{bank.path} holds {bank.size_text} and no others to compare one with; add images: "
                f"{add_command(bank.path)}; or calibrate by images that are not in it: "
                f"{calibrate_command(bank.path, '--holdout IMAGES', bank.product)}"
            )
        if self.count > others:
            raise InputError(
                f"each of the {bank.size_text} in {bank.path} has {others} others, "
                f"k={self.count} were asked for; lower k_image and k_gallery, or add images"
            )

    def batches_of_one_size(self, rows: IntArray, size: int) -> Iterator[IntArray]:
        """Split rows into batches, of at most `size`, of those that have as many siblings each: as many others are left."""
        sizes = self._bank.siblings.sizes[self._bank.siblings.of(rows)]
        for part in np.split(rows, np.flatnonzero(np.diff(sizes)) + 1):
            yield from (part[start : start + size] for start in range(0, max(1, len(part)), size))


def most_neighbors(method: Method) -> int:
    """The most neighbors that a method looks up, however many images there are."""
    several = method.k_gallery if isinstance(method.k_gallery, tuple) else (method.k_gallery,)
    return max([method.k_image, *(int(k) for k in several if k != ALL)])


def method_of(bank: Snapshot, part: Part, method: Method) -> Method:
    """The method that pictures of a product are scored with, in a bank of several that is searched with `method`.

    Where the product has too few images for a number of neighbors that is usual for the bank, it takes all, see `of_few`; any
    other number was asked for, and stays.
    """
    usual, fitted = bank.usual.method, part.fitted(method)
    return replace(
        method,
        k_image=fitted.k_image if method.k_image == usual.k_image else method.k_image,
        k_gallery=fitted.k_gallery if method.k_gallery == usual.k_gallery else method.k_gallery,
    )


def check_neighbors(bank: Snapshot, method: Method) -> None:
    """Raise InputError if a bank, or a product of it, has fewer images, or vectors, than a method asks for."""
    if not len(bank):
        raise InputError(f"the bank {bank.path} is empty; add normal images: {add_command(bank.path)}")
    levels = searched_levels(bank.layout.levels, method.fusion, method.levels)
    sizes = gallery_sizes(method, len(levels), len(bank))
    for name, k in (("k_image", method.k_image), ("k_gallery", max(sizes))):
        if k > len(bank):
            raise InputError(
                f"{name}={k} is larger than the number of {_entries(bank)} in {bank.path}; lower it, leave it out to take as "
                f"many as there are, or add images: {add_command(bank.path, bank.product)}"
            )
    for level, size in zip(levels, sizes, strict=True):
        if method.kappa > (most := size * level.locations):
            raise InputError(
                f"kappa={method.kappa} is larger than the gallery, {most} vectors at level {level.name!r}; lower it"
            )
    for name in bank.products if bank.is_of_products else ():
        part = bank.part(name)
        check_neighbors(part, method_of(bank, part, method))


def _entries(bank: Snapshot) -> str:
    """What k counts, and how many there are."""
    pictures = bank.pictures
    counted = f"normal images, {len(bank)}" if pictures.are_rows else f"entries, {len(bank)} of {len(pictures)} normal images"
    return f"{counted} of product {shorten(bank.product)}" if bank.product else counted
