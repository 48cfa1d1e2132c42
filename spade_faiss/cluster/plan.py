"""The plan of a job: a list of pictures or rows is cut into pieces, each for one worker. Pure functions, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from spade_faiss.core.schema import check_at_least

T = TypeVar("T")

# Where there is enough to do, each worker gets so many pieces, so that none waits long for the last one.
_PIECES_A_WORKER = 4
# A worker is started for images with so many bytes of features, or more. They take 5 to 7 CPU seconds, by small networks and by
# large ones, which have more features and take longer; to start Python, Ray, the package and a network takes nearly 2.
_LEAST_BYTES = 64 << 20


class Piece(NamedTuple):
    """A part of a list: its number among the pieces, and which items of the list it has."""

    number: int
    start: int
    stop: int

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """The items of the piece."""
        return items[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"piece {self.number} (number {self.start + 1} to {self.stop})"


def least_images(image_bytes: int) -> int:
    """The fewest images that pay for the start of a worker; `image_bytes` is what the features of one take."""
    return max(1, _LEAST_BYTES // image_bytes)


def plan_pieces(count: int, *, batch: int, most: int, workers: int, least: int = 1) -> list[Piece]:
    """Cut a list into pieces that together are the list, in its order.

    All pieces but the last have as many items, a multiple of `batch`: so batches are the same ones as where the list is worked
    on as a whole, and with them what a network computes, to the bit.

    Args:
        count: how many items the list has.
        batch: how many items are computed together.
        most: the most items of a piece, such as those that fill a shard; a piece holds one batch at least.
        workers: how many workers there are.
        least: the fewest items that a worker is started for. Where there are too few items for all workers, there is one piece
            for each worker that has enough, or more if these had more than `most`.
    """
    return pieces_of(count, piece_size(count, batch=batch, most=most, workers=workers, least=least))


def piece_size(count: int, *, batch: int, most: int, workers: int, least: int = 1) -> int:
    """How many items a piece has; arguments are those of `plan_pieces`."""
    checked = {"count": (count, 0), "batch": (batch, 1), "most": (most, 1), "workers": (workers, 1), "least": (least, 1)}
    for name, (value, fewest) in checked.items():
        check_at_least(name, value, fewest)
    busy = max(1, min(workers, count // least))
    shared = -(-count // (busy * _PIECES_A_WORKER if busy == workers else busy))
    return batch * max(1, min(-(-shared // batch), -(-most // batch)))


def pieces_of(count: int, size: int) -> list[Piece]:
    """A list cut into pieces of so many items; the last one may have fewer."""
    check_at_least("size", size, 1)
    return [Piece(number, start, min(start + size, count)) for number, start in enumerate(range(0, count, size))]
