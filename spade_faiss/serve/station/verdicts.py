"""From scores to records: verdicts, regions, and what is shown beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spade_faiss.core.once import once
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.calibration import Verdicts
from spade_faiss.features.stream import Extracted
from spade_faiss.report.colors import usual_colors
from spade_faiss.scoring.scores import Scores
from spade_faiss.serve.history.files import Files
from spade_faiss.serve.history.records import LaterVerdict, RegionRecord, ScoredPicture
from spade_faiss.serve.station.evidence import nearest_normals
from spade_faiss.serve.station.served import Served

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A picture that has arrived and lies in a file.

    Args:
        id: of the record that is made of it.
        path: the file.
        suffix: of the file, by its content.
        bytes: of the file.
        name: what its sender calls it; untrusted text.
        source: where it comes from; untrusted text.
        key: what its sender calls the request.
        received: when (UTC).
        product: what its sender says that it shows, in a bank of several products.
    """

    id: str
    path: Path
    suffix: str
    bytes: int
    name: str
    source: str
    key: str | None
    received: datetime
    product: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """The scores of some pictures.

    Args:
        served: the state of the bank that they were scored against.
        extracted: what the backbone saw.
        scores: the scores.
    """

    served: Served
    extracted: Extracted
    scores: Scores

    @once
    def named(self) -> dict[str, FloatArray]:
        """The image scores by their names; `structure` among them if the calibration can tell."""
        rules = self.served.rules
        return dict(self.scores.image_scores) if rules is None else rules.scores_of(self.scores)

    @property
    def verdicts(self) -> Verdicts | None:
        """The verdicts; None without a calibration."""
        rules, routes = self.served.rules, self.scores.routes
        products = None if routes is None else routes.product
        return None if rules is None else rules(self.named, self.scores.statistics, products)

    def later(self) -> list[LaterVerdict]:
        """The verdicts as those on pictures that were scored before."""
        verdicts, generation, n = self.verdicts, self.served.generation, len(self.scores)
        if verdicts is None:
            return [LaterVerdict(generation=generation, p_value=None, alarm=None)] * n
        return [
            LaterVerdict(generation=generation, p_value=_finite(p), alarm=verdicts.alarm_of(i))
            for i, p in enumerate(verdicts.p_value)
        ]


def records_of(scored: Scored, uploads: Sequence[Upload], bank: str, files: Files) -> list[ScoredPicture]:
    """Decide on pictures, write their maps, and make their records.

    Args:
        scored: their scores.
        uploads: the pictures.
        bank: what clients call the bank.
        files: where the maps are written to.
    """
    served, scores = scored.served, scored.scores
    rules, verdicts = served.rules, scored.verdicts
    placements = [image.placement for image in scored.extracted.loaded]
    regions = [[] for _ in uploads] if rules is None else rules.regions(scores, placements)
    nearest = nearest_normals(scores, served.detector.bank)
    peaks, records = scores.peak.tolist(), []
    for i, (upload, own_map, image) in enumerate(zip(uploads, scores.own_maps(), scored.extracted.loaded, strict=True)):
        found = {name: _finite(values[i]) for name, values in scored.named.items()}
        has_map = found["max"] is not None
        width, height = image.placement.original
        product, confidence, p_none = (None, None, None) if scores.routes is None else scores.routes.at(i)
        rule = None if rules is None else rules.rule_of(product)
        records.append(
            ScoredPicture(
                id=upload.id,
                bank=bank,
                name=upload.name,
                source=upload.source,
                received=upload.received,
                sha256=image.sha256,
                width=width,
                height=height,
                generation=served.generation,
                scores=found,
                ranked_by=served.detector.method.score,
                p_value=None if verdicts is None else _finite(verdicts.p_value[i]),
                alpha=None if rule is None else rule.thresholds.alpha,
                alarm=None if verdicts is None else verdicts.alarm_of(i),
                threshold=None if rule is None else _finite(rule.thresholds.pixel),
                colors=usual_colors(rule, own_map) if has_map else None,
                regions=tuple(_region(region.numbers()) for region in regions[i]),
                nearest=nearest[i],
                peak=(peaks[i][0], peaks[i][1]) if has_map else None,
                map_size=(own_map.shape[0], own_map.shape[1]) if has_map else None,
                suffix=upload.suffix,
                bytes=upload.bytes + (files.write_map(upload.id, own_map) if has_map else 0),
                key=upload.key,
                product=product,
                confidence=confidence,
                p_none=p_none,
            )
        )
    return records


def _region(numbers: RegionRecord) -> RegionRecord:
    """A region without the mask in the original: it may be as long as the picture is large, and follows from the other one."""
    original = {name: value for name, value in numbers["original"].items() if name != "segmentation"}
    return {**numbers, "original": original}


def _finite(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if math.isfinite(value) else None
