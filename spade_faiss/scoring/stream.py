"""Scores of images, in order: the one loop from files over features to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.datasets import ImageRecord, Skipped
from spade_faiss.features.stream import Extracted, FeatureStream
from spade_faiss.scoring.scores import Scores


class ScoreStream:
    """Scores images batch by batch; unreadable images are left out and listed. `Detector.stream` makes one.

    Args:
        features: reads the images and computes their features.
        score: scores a batch of features.
        label: what the progress bar says.
    """

    def __init__(self, features: FeatureStream, score: Callable[[FeatureBatch], Scores], label: str) -> None:
        self._features = features
        self._score = score
        self._label = label

    @property
    def skipped(self) -> Sequence[Skipped]:
        """The images that were left out so far, each with the reason."""
        return self._features.skipped

    def __call__(self, root: Path, records: Sequence[ImageRecord]) -> Iterator[tuple[Extracted, Scores]]:
        """Yield the pictures and features of each batch with its scores.

        Args:
            root: the folder that the ids of the records start from.
            records: the images to score, in this order.

        Raises:
            InputError: when more images than allowed were skipped, or all of them.
        """
        for extracted in self._features(root, records, self._label):
            yield extracted, self._score(extracted.batch)
