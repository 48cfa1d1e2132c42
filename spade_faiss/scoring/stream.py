"""Scores of images, in order: the one loop from files over features to scores."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import ImageRecord, Skipped
from spade_faiss.features.stream import Extracted, FeatureStream
from spade_faiss.scoring.scores import Scores


class ScoreStream:
    """Scores images batch by batch; unreadable images are left out and listed. `Detector.stream` makes one.

    Args:
        features: reads the images and computes their features.
        score: scores a batch of features; returns None for tiles after which others of their image follow.
        label: what the progress bar says.
        prepare: called once in the thread that scores, before it does.
    """

    def __init__(
        self,
        features: FeatureStream,
        score: Callable[[FeatureBatch], Scores | None],
        label: str,
        prepare: Callable[[], None],
    ) -> None:
        self._features = features
        self._score = score
        self._label = label
        self._prepare = prepare

    @property
    def skipped(self) -> Sequence[Skipped]:
        """The images that were left out so far, each with the reason."""
        return self._features.skipped

    def __call__(self, root: Path, records: Sequence[ImageRecord]) -> Generator[tuple[Extracted, Scores], None, None]:
        """Yield the pictures and features of each batch with its scores, while the next one is scored.

        Of images that are scored in tiles, it is one at a time, with the features of its last tiles.

        Args:
            root: the folder that the ids of the records start from.
            records: the images to score, in this order.

        Raises:
            InputError: when more images than allowed were skipped, or all of them.
        """
        with (
            ThreadPoolExecutor(1, "score", initializer=self._prepare) as pool,
            closing(self._features(root, records, self._label)) as batches,
        ):
            last: tuple[Extracted, Future[Scores | None]] | None = None
            for extracted in batches:
                before, last = last, (extracted, pool.submit(self._score, extracted.batch))
                if before is not None and (scores := before[1].result()) is not None:
                    yield before[0], scores
            if last is not None and (scores := last[1].result()) is not None:
                yield last[0], scores
