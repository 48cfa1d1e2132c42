"""Everything that the report of a run is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.facts import facts_of
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.memory import MemoryPlan
from spade_faiss.core.settings import Method
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.tiles import Places
from spade_faiss.report.pictures import Mask, Picture
from spade_faiss.report.results import Results
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.search.recipe import Recipe

if TYPE_CHECKING:
    from spade_faiss.scoring.detector import Detector


class Shown(NamedTuple):
    """A picture (H, W, 3) uint8 as the backbone saw it, or None and the reason why it is missing."""

    picture: Picture | None
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class DetectorFacts:
    """How images were scored, as the report states it.

    Args:
        method: the parameters of SPADE.
        recipe: how the bank is searched.
        definition: what the gallery search finds, in a sentence.
        bank: what identifies the bank, see `Snapshot.facts`.
        memory: how the memory budget is spent.
    """

    method: Method
    recipe: Recipe
    definition: str
    bank: dict[str, Any]
    memory: MemoryPlan

    @staticmethod
    def of(detector: Detector) -> DetectorFacts:
        """The facts of a detector."""
        return DetectorFacts(
            method=detector.method,
            recipe=detector.recipe,
            definition=detector.resolved.method.definition,
            bank=facts_of(detector.bank),
            memory=detector.plan,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The method and the recipe as plain values."""
        return {**asdict(self.method), "recipe": asdict(self.recipe), "search": self.definition}

    @property
    def bank_name(self) -> str:
        """The name of the bank's folder."""
        return Path(self.bank["path"]).resolve().name

    @property
    def resize_mode(self) -> str:
        """Which part of an image is scored."""
        source = self.bank["source"]
        if source and source["preprocess"]["tile"] is not None:
            return "tiles"
        return str(source["preprocess"]["resize_mode"]) if source else Preprocess().resize_mode


@dataclass(frozen=True, eq=False, kw_only=True)
class ReportInputs:
    """A run over n images, as its report needs it.

    Args:
        facts: how the images were scored.
        results: the metrics, decisions and times of the run.
        scores: the scores of the images.
        records: the images, in the order of `scores`.
        masks: (n, H, W), True for a defective pixel; None without masks.
        picture: gives the picture of an image by its number.
        normal_ids: the names of the bank's pictures by row.
        normal_picture: gives the picture of a normal image by its name, or what the entry in a bank row shows of it; of a tile,
            that is the whole picture. It is shrunk, if it is large, see `pictures.shrink`.
        normal_group: the group of each of the bank's pictures that belongs to one.
        normal_places: (rows, 4) where the tiles of the bank lie in its pictures, by row; None if it holds whole pictures.
    """

    facts: DetectorFacts
    results: Results
    scores: ScoreFile
    records: Sequence[ImageRecord]
    masks: Mask | None
    picture: Callable[[int], Shown]
    normal_ids: Sequence[str]
    normal_picture: Callable[[str, int | None], Shown]
    normal_group: Mapping[str, str] = field(default_factory=dict)
    normal_places: Places | None = None

    @property
    def ranked(self) -> npt.NDArray[np.float32]:
        """(n,) the image scores that images are ranked by; NaN for an image that has none."""
        return self.scores.image_scores[self.facts.method.score]

    @property
    def defective(self) -> npt.NDArray[np.bool_] | None:
        """(n,) labels; None without labels."""
        return None if self.results.metrics is None else np.array([bool(record.defective) for record in self.records])
