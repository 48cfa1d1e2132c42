"""The loop over the images of a run: scores go to a file batch by batch, and what is small of each image is collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.regions import Region
from spade_faiss.decisions.rules import DecisionRules
from spade_faiss.features.datasets import Duplicate, ImageRecord, Skipped
from spade_faiss.features.placement import Placement
from spade_faiss.report.picture_store import PictureStore
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.routing import Routes
from spade_faiss.scoring.scores import Scores


@dataclass(eq=False)
class Collected:
    """What is known of images that were scored, beside their maps; it grows batch by batch, and part by part.

    Args:
        records: the images.
        placements: how each image lies in the backbone's input.
        regions: the regions of each image; empty without a decision rule.
        image_scores: for each batch, the image scores of its images by their names.
        statistics: for each batch, the statistics of its maps.
        passed_over: for each batch, see `Scores`.
        in_bank: the images whose content is in the bank.
        skipped: the images that could not be read.
        routes: for each batch, which products its images show; empty for a bank of one product.
        sha256: what each image's file had as its checksum when it was read.
    """

    records: list[ImageRecord] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    regions: list[list[Region]] = field(default_factory=list)
    image_scores: list[dict[str, FloatArray]] = field(default_factory=list)
    statistics: list[FloatArray] = field(default_factory=list)
    passed_over: list[dict[str, FloatArray]] = field(default_factory=list)
    in_bank: list[Duplicate] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    routes: list[Routes] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def extend(self, others: Collected) -> None:
        """Take in what is known of the images that follow."""
        for name, values in vars(others).items():
            getattr(self, name).extend(values)

    @property
    def scores(self) -> dict[str, FloatArray]:
        """The (n,) image scores of all images by their names."""
        return {name: np.concatenate([batch[name] for batch in self.image_scores]) for name in self.image_scores[0]}

    @property
    def joined_routes(self) -> Routes | None:
        """Which products all images show; None for a bank of one product."""
        return Routes.join(self.routes) if self.routes else None

    @property
    def shares(self) -> dict[str, FloatArray]:
        """The share that each level's search passed over, of the images of the batches that count it; see `Scores`."""
        levels = dict.fromkeys(level for batch in self.passed_over for level in batch)  # not every batch counts them
        return {level: np.concatenate([batch[level] for batch in self.passed_over if level in batch]) for level in levels}

    @property
    def mean_passed_over(self) -> dict[str, float]:
        """The mean of each level's share over the images that have a number."""
        return {level: float(np.nanmean(found)) for level, found in self.shares.items() if np.isfinite(found).any()}


def collect(
    job: tuple[Detector, DecisionRules | None],
    images: tuple[Path, Sequence[ImageRecord]],
    append: Callable[[Scores], None],
    pictures: PictureStore,
    timings: Timings,
    *,
    allow_none: bool = False,
) -> Collected:
    """Score images, find their regions, and collect what is known of them.

    Args:
        job: what scores the images, and what decides about them.
        images: the folder that ids start from, and the images.
        append: takes the scores of each batch.
        pictures: takes their pictures.
        timings: takes the seconds of each step.
        allow_none: whether all of them may be unreadable.

    Raises:
        InputError: if more images than allowed are unreadable, or all of them.
    """
    (detector, rules), found = job, Collected()
    normal_of = {digest: name for name, digest in detector.bank.sha256_of.items()}
    stream = detector.stream(timings, "score", allow_none=allow_none)
    for extracted, scores in stream(*images):
        batch = [item.placement for item in extracted.loaded]
        if rules is not None:
            with timings("regions"):
                found.regions += rules.regions(scores, batch)
        with timings("write"):
            append(scores)
        of_images = dict(scores.image_scores) if rules is None else rules.scores_of(scores)
        found.image_scores.append(of_images)
        found.statistics.append(scores.statistics)
        found.passed_over.append(scores.passed_over)
        found.routes += [] if scores.routes is None else [scores.routes]
        labels = [record.defective for record in extracted.records]
        pictures.add(
            [item.picture for item in extracted.loaded],
            of_images[detector.method.score],
            np.isfinite(of_images["max"]),
            None if None in labels else np.array(labels, np.bool_),
        )
        found.in_bank += (
            Duplicate(record.id, normal_of[item.sha256])
            for record, item in zip(extracted.records, extracted.loaded, strict=True)
            if item.sha256 in normal_of
        )
        found.records += extracted.records
        found.placements += batch
        found.sha256 += (item.sha256 for item in extracted.loaded)
    found.skipped += stream.skipped
    return found
