"""From scores to records: verdicts, regions, and what is shown beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spade_faiss.decisions.calibration import Verdicts
from spade_faiss.features.stream import Extracted
from spade_faiss.scoring.scores import Scores
from spade_faiss.serve.history.files import Files
from spade_faiss.serve.history.records import LaterVerdict, RegionRecord, ScoredPicture
from spade_faiss.serve.station.evidence import colors_of, nearest_normals
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
    """

    id: str
    path: Path
    suffix: str
    bytes: int
    name: str
    source: str
    key: str | None
    received: datetime


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

    def verdicts(self) -> Verdicts | None:
        """The verdicts; None without a calibration."""
        rule, scores = self.served.rule, self.scores
        if rule is None:
            return None
        named = dict(scores.image_scores)
        if (structure := rule.calibration.structure(scores.statistics)) is not None:
            named["structure"] = structure
        return rule(named, scores.statistics)

    def later(self) -> list[LaterVerdict]:
        """The verdicts as those on pictures that were scored before."""
        verdicts, generation, n = self.verdicts(), self.served.generation, len(self.scores)
        if verdicts is None:
            return [LaterVerdict(generation=generation, p_value=None, alarm=None)] * n
        return [
            LaterVerdict(generation=generation, p_value=float(p), alarm=bool(alarm))
            for p, alarm in zip(verdicts.p_value, verdicts.alarm, strict=True)
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
    rule, verdicts = served.rule, scored.verdicts()
    placements = [image.placement for image in scored.extracted.loaded]
    regions = [[] for _ in uploads] if rule is None else rule.regions(scores, placements)
    structure = None if rule is None else rule.calibration.structure(scores.statistics)
    nearest = nearest_normals(scores, served.detector.bank)
    named = scores.image_scores if structure is None else {**scores.image_scores, "structure": structure}
    peaks, records = scores.peak.tolist(), []
    for i, (upload, own_map, image) in enumerate(zip(uploads, scores.own_maps(), scored.extracted.loaded, strict=True)):
        found = {name: _finite(values[i]) for name, values in named.items()}
        has_map = found["max"] is not None
        width, height = image.placement.original
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
                p_value=None if verdicts is None else float(verdicts.p_value[i]),
                alpha=None if rule is None else rule.thresholds.alpha,
                alarm=None if verdicts is None else bool(verdicts.alarm[i]),
                threshold=None if rule is None else _finite(rule.thresholds.pixel),
                colors=colors_of(rule, own_map) if has_map else None,
                regions=tuple(_region(region.numbers()) for region in regions[i]),
                nearest=nearest[i],
                peak=(peaks[i][0], peaks[i][1]) if has_map else None,
                map_size=(own_map.shape[0], own_map.shape[1]) if has_map else None,
                suffix=upload.suffix,
                bytes=upload.bytes + (files.write_map(upload.id, own_map) if has_map else 0),
                key=upload.key,
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
