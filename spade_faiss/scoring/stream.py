"""Scores of images, in order: the one loop from files over features to scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from spade_faiss.core.timing import Timings
from spade_faiss.features.datasets import ImageRecord, Skipped
from spade_faiss.features.stream import Extracted, FeatureStream
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores


class ScoreStream:
    """Scores images batch by batch and shows progress under `label`; unreadable images are left out and listed."""

    def __init__(self, detector: Detector, timings: Timings, label: str) -> None:
        self._detector = detector
        self._timings = timings
        self._label = label
        run = replace(detector.run, memory=detector.decode_bytes)
        self._features = FeatureStream(detector.backbone, run, batch_size=detector.plan.batch, timings=timings)

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
            yield extracted, self._detector.score_features(extracted.batch, timings=self._timings)
