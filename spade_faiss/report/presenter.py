"""What a run over images says: its numbers for programs, its report for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Preprocess
from spade_faiss.decisions.regions import Region
from spade_faiss.decisions.rule import Decisions
from spade_faiss.features.datasets import ImageRecord, Skipped
from spade_faiss.features.pictures import Picture, load_image, to_mask
from spade_faiss.features.placement import Placement
from spade_faiss.report import charts
from spade_faiss.report.csvfile import rank
from spade_faiss.report.model import Card, CardGroup, Cell, Chart, Headline, ImageRow, Match, NormalPicture, Report, Table
from spade_faiss.report.pictures import Box, cell_box, color_range, overlay
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.metrics import Detection, Localization

_NORMALS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class KindMetrics:
    """How well defective images are told from normal ones.

    `images` are the defective ones, `unseen` those of them whose mask has nothing inside the region that was scored.
    `by_knn` ranks by SPADE's image score, `by_map` by the map's maximum. `pixel` covers that region; None without masks.
    """

    images: int
    unseen: int
    by_knn: Detection
    by_map: Detection
    pixel: Localization | None


@dataclass(frozen=True, kw_only=True)
class Metrics(KindMetrics):
    """Metrics of a labeled set, all defects together and, in `kinds`, each kind against all normal test images."""

    kinds: dict[str, KindMetrics]


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a run did: it wrote its files to `out`; `metrics` is None where there are no labels.

    `decisions` are its verdicts; None where there are none, and `notice` says why.
    `timing_s` are seconds by stage (timings in other threads overlap), `total_s` is the wall clock until the report was begun,
    `peak_memory_bytes` the most that the process has held since it started.
    """

    out: Path
    images: int
    skipped: tuple[Skipped, ...]
    metrics: Metrics | None
    decisions: Decisions | None
    notice: str
    timing_s: dict[str, float]
    total_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, eq=False)
class Presenter:
    """Lays out one run: `records` and `placements` belong to the images of `scores`, in its order."""

    detector: Detector
    results: Results
    scores: ScoreFile
    records: Sequence[ImageRecord]
    placements: Sequence[Placement]

    def numbers(self) -> dict[str, Any]:
        """Every number of the run, for report.json."""
        scores, metrics, decisions = self.scores, self.results.metrics, self.results.decisions
        places = rank(scores.image_score)
        return {
            "method": self._method(),
            "bank": self.detector.bank.facts(),
            "images": self.results.images,
            "localized": int(self._localized.sum()),
            "skipped": [asdict(item) for item in self.results.skipped],
            "metrics": None if metrics is None else metric_numbers(metrics),
            "calibration": None if decisions is None else decisions.numbers(),
            "calibration_notice": self.results.notice or None,
            "time": {"total_s": self.results.total_s, "timing_s": self.results.timing_s},
            "peak_memory_bytes": self.results.peak_memory_bytes,
            "memory": asdict(self.detector.plan),
            "scores": [
                {
                    "id": record.id,
                    "kind": record.kind,
                    "image_score": scores.image_score[i],
                    "map_score": scores.map_score[i],
                    "rank": places[i],
                    **({} if decisions is None else decisions.image_numbers(i)),
                    "neighbors": [
                        {"id": str(name), "dist": dist}
                        for name, dist in zip(scores.neighbor_ids[i], scores.neighbor_dist[i], strict=True)
                    ],
                }
                for i, record in enumerate(self.records)
            ],
        }

    def report(self, shown: int) -> Report:
        """The page for people; `shown` images are laid out in full."""
        scores, bank, metrics, decisions = self.scores, self.detector.bank, self.results.metrics, self.results.decisions
        rows = [self._row(i) for i in range(len(scores))]
        return Report(
            title="Evaluation" if metrics else "Anomaly scores",
            subtitle=f"{len(scores)} images against {len(bank)} normal ones in {bank.path.resolve().name}",
            notices=tuple(self._notices()),
            headlines=(*(_headlines(metrics) if metrics else ()), *(decisions.headlines() if decisions else ())),
            summary=(*(_metric_tables(metrics) if metrics else ()), *(decisions.tables() if decisions else ())),
            charts=tuple(self._charts()),
            groups=tuple(self._groups(rows, shown)),
            colors=self.colors,
            levels=tuple(scores.match),
            images=tuple(rows),
            details=tuple(self._details()),
        )

    @cached_property
    def colors(self) -> tuple[float, float]:
        """The scores at which the colors of all heat maps start and end."""
        labels = None if self.results.metrics is None else [bool(record.defective) for record in self.records]
        if not self._localized.any():
            return 0.0, 1.0  # of no map
        return color_range(map(self.scores.map, np.flatnonzero(self._localized).tolist()), labels)

    @property
    def _localized(self) -> npt.NDArray[np.bool_]:
        """Which images have a map."""
        found: npt.NDArray[np.bool_] = np.isfinite(self.scores.map_score)
        return found

    def overlays(self) -> Iterator[tuple[ImageRecord, Picture]]:
        """Each image under its heat map, if it has one and its file is still there."""
        for i, record in enumerate(self.records):
            picture, _ = self._picture(record)
            if picture is not None and self._localized[i]:
                yield record, overlay(picture, self.scores.map(i), *self.colors)

    def _method(self) -> dict[str, Any]:
        search = self.detector.resolved.method.definition
        return {**asdict(self.detector.method), "recipe": asdict(self.detector.recipe), "search": search}

    def _notices(self) -> Iterator[str]:
        if unseen := int((~self._localized).sum()):
            yield f"{unseen} of {len(self.scores)} images have no map ({self._left_out()}); they are in the table alone."
        if notice := self.results.notice:
            yield notice[0].upper() + notice[1:] + "."
        if decisions := self.results.decisions:
            yield from decisions.notices()
        if self.detector.recipe.build.gallery != "exact":
            yield self.detector.resolved.method.definition
        if skipped := self.results.skipped:
            yield f"{len(skipped)} images could not be read and were left out; they are listed at the end."
        if (metrics := self.results.metrics) is not None and metrics.unseen:
            framing = self._preprocess.resize_mode
            yield (
                f"{metrics.unseen} of {metrics.images} defective images show no defect in the region that was scored "
                f"(framing {framing}), yet count as defective. "
                + ("To score whole images, extract a bank with --resize-mode letterbox." if framing == "crop" else "")
            )

    def _left_out(self) -> str:
        method = self.detector.method
        return "localize=none" if method.localize == "none" else f"an image score of at most {method.flag_above:g}"

    def _row(self, i: int) -> ImageRow:
        scores, record, decisions = self.scores, self.records[i], self.results.decisions
        return ImageRow(
            id=record.id,
            image_score=float(scores.image_score[i]),
            map_score=float(scores.map_score[i]),
            neighbor_id=str(scores.neighbor_ids[i, 0]),
            neighbor_dist=float(scores.neighbor_dist[i, 0]),
            kind=record.kind,
            defective=record.defective,
            p_value=None if decisions is None else float(decisions.verdicts.p_value[i]),
            alarm=None if decisions is None else bool(decisions.verdicts.alarm[i]),
        )

    def _groups(self, rows: Sequence[ImageRow], shown: int) -> Iterator[CardGroup]:
        order = [i for i in np.argsort(-self.scores.image_score, kind="stable").tolist() if self._localized[i]]
        if self.results.metrics is None:
            if order:
                yield self._group("Most anomalous images", rows, order[:shown])
            return
        defective = [i for i in order if self.records[i].defective]
        normal = [i for i in order if not self.records[i].defective]
        share = max(1, shown // 3)
        yield self._group("Most anomalous images", rows, order[:share], "The highest image scores.")
        rest = [i for i in reversed(defective) if i not in order[:share]]
        yield self._group("Defects hardest to find", rows, rest[:share], "Defective images with the lowest image scores.")
        rest = [i for i in normal if i not in order[:share]]
        yield self._group("Normal images most suspected", rows, rest[:share], "Normal images with the highest image scores.")

    def _group(self, title: str, rows: Sequence[ImageRow], chosen: Sequence[int], note: str = "") -> CardGroup:
        return CardGroup(title=title, cards=tuple(self._card(i, rows[i]) for i in chosen), note=note)

    def _card(self, i: int, row: ImageRow) -> Card:
        record, scores = self.records[i], self.scores
        picture, missing = self._picture(record)
        mask = None if record.mask is None else to_mask(record.mask, self.placements[i])
        peak_y, peak_x = scores.peak[i].tolist()
        matches: dict[int, list[Match]] = {}
        for level, match in scores.match.items():
            column, y, x, bank_row = match[i].tolist()
            matches.setdefault(column if column >= 0 else -1 - bank_row, []).append(
                Match(level=level, corners=cell_box((y, x), scores.grid[level], scores.size))
            )
        # Neighbors by their column, other normal images that a level matched by the negative of their row and one more.
        columns = sorted({*range(min(_NORMALS_SHOWN, scores.neighbor_ids.shape[1])), *matches}, key=lambda at: (at < 0, at))
        normals = tuple(self._normal(i, column, tuple(matches.get(column, ()))) for column in columns)
        return Card(
            image=row,
            map=scores.map(i),
            peak=(peak_y, peak_x),
            picture=picture,
            mask=mask,
            normals=normals,
            missing=missing,
            regions=() if self.results.decisions is None else tuple(map(_corners, self.results.decisions.regions[i])),
        )

    def _normal(self, i: int, column: int, matches: tuple[Match, ...]) -> NormalPicture:
        is_neighbor = column >= 0
        name = str(self.scores.neighbor_ids[i, column]) if is_neighbor else self.detector.bank.ids[-1 - column]
        path = self.detector.bank.image_path(name)
        if path is None:
            picture, missing = None, "the bank does not know its file"
        else:
            picture, missing = self._picture(ImageRecord(name, path), self.detector.bank.sha256_of.get(name))
        return NormalPicture(
            id=name,
            place=column + 1 if is_neighbor else None,
            distance=float(self.scores.neighbor_dist[i, column]) if is_neighbor else math.nan,
            picture=picture,
            matches=matches,
            missing=missing,
        )

    def _picture(self, record: ImageRecord, sha256: str | None = None) -> tuple[Picture | None, str]:
        if self.detector.bank.manifest.source is None:
            return None, "the features came from another extractor"
        try:
            loaded = load_image(record, self._preprocess)
        except InputError as error:
            return None, str(error)
        if sha256 not in (None, loaded.sha256):
            return None, f"{record.path} has changed since the bank took it"
        return loaded.picture, ""

    @property
    def _preprocess(self) -> Preprocess:
        source = self.detector.bank.manifest.source
        return Preprocess() if source is None else source.preprocess

    def _charts(self) -> Iterator[Chart]:
        scores, metrics = self.scores, self.results.metrics
        labels = None if metrics is None else np.array([bool(record.defective) for record in self.records])
        decisions = self.results.decisions
        limits = None if decisions is None else decisions.rule.thresholds
        at_image = {} if limits is None else {f"alarm, alpha={limits.alpha:g}": limits.image}
        image = charts.histogram("image score", scores.image_score, labels, at_image)
        yield Chart(title="Image scores", svg=image, note="Mean distance to the nearest normal images.")
        if (localized := self._localized).any():
            at_map = {} if limits is None else {f"alarm, alpha={limits.alpha:g}": limits.map, "region": limits.pixel}
            of_maps = None if labels is None else labels[localized]
            by_map = charts.histogram("map maximum", scores.map_score[localized], of_maps, at_map)
            yield Chart(title="Map maxima", svg=by_map, note="Highest pixel score of each image.")
        if decisions is not None:
            yield from decisions.charts()
        if metrics is None:
            return
        named = [("image, by kNN", metrics.by_knn), ("image, by map maximum", metrics.by_map), ("pixel", metrics.pixel)]
        curves = [charts.Curve(label, found.roc.x, found.roc.y, found.auroc) for label, found in named if found is not None]
        yield Chart(title="ROC", svg=charts.roc_chart(curves))
        if (pixel := metrics.pixel) is not None:
            curve = charts.Curve("regions", pixel.pro.x, pixel.pro.y, pixel.aupro)
            yield Chart(title="Per-region overlap", svg=charts.pro_chart([curve], pixel.aupro_fpr_limit))

    def _details(self) -> Iterator[Table]:
        yield Table(title="Method", header=("setting", "value"), rows=_as_rows(self._method()))
        yield Table(title="Bank", header=("fact", "value"), rows=_as_rows(self.detector.bank.facts()))
        count = max(1, self.results.images)
        timings = {**self.results.timing_s, "wall clock": self.results.total_s}
        yield Table(
            title="Where the time went",
            header=("stage", "seconds", "ms an image"),
            rows=tuple((name, seconds, 1000 * seconds / count) for name, seconds in timings.items()),
            note="Decoding runs in threads beside the rest. "
            f"Peak memory of the process: {self.results.peak_memory_bytes / 2**30:.2f} GiB.",
            decimals=2,
        )
        if skipped := self.results.skipped:
            yield Table(title="Skipped", header=("image", "reason"), rows=tuple((item.id, item.reason) for item in skipped))


def _corners(region: Region) -> Box:
    x, y, width, height = region.input.box
    return y, x, y + height, x + width


def _headlines(metrics: Metrics) -> Iterator[Headline]:
    yield Headline(label="Image AUROC", value=metrics.by_knn.auroc, note="by distance to the nearest normals")
    yield Headline(label="Image AUROC", value=metrics.by_map.auroc, note="by the map's maximum")
    if metrics.pixel is not None:
        yield Headline(label="Pixel AUROC", value=metrics.pixel.auroc)
        note = f"to a false positive rate of {metrics.pixel.aupro_fpr_limit:g}"
        yield Headline(label="AUPRO", value=metrics.pixel.aupro, note=note)


def _metric_tables(metrics: Metrics) -> Iterator[Table]:
    rows: list[tuple[Cell, ...]] = []
    for name, found in (("image, by kNN", metrics.by_knn), ("image, by map maximum", metrics.by_map), ("pixel", metrics.pixel)):
        if found is not None:
            aupro = found.aupro if isinstance(found, Localization) else None
            rows.append((name, found.auroc, found.ap, found.f1_max, found.f1_threshold, aupro))
    yield Table(title="Metrics", header=("ranking", "AUROC", "AP", "F1-max", "at threshold", "AUPRO"), rows=tuple(rows))
    yield Table(
        title="By kind of defect",
        header=("kind", "images", "unseen", "AUROC by kNN", "AUROC by map", "pixel AUROC", "AUPRO"),
        rows=tuple(
            (
                kind,
                found.images,
                found.unseen,
                found.by_knn.auroc,
                found.by_map.auroc,
                found.pixel.auroc if found.pixel else None,
                found.pixel.aupro if found.pixel else None,
            )
            for kind, found in metrics.kinds.items()
        ),
        note="Each kind against all normal test images. Unseen: the mask has nothing inside the region that was scored.",
    )


def metric_numbers(metrics: Metrics) -> dict[str, Any]:
    """All metrics as nested plain values; curves only for all defects together, where the report draws them."""
    numbers = asdict(metrics)
    for kind in numbers["kinds"].values():
        for found in filter(None, (kind["by_knn"], kind["by_map"], kind["pixel"])):
            for curve in ("roc", "precision_recall", "pro"):
                found.pop(curve, None)
    return numbers


def _as_rows(facts: dict[str, Any]) -> tuple[tuple[Cell, ...], ...]:
    plain = {key: json.dumps(value) if isinstance(value, dict | list | tuple) else str(value) for key, value in facts.items()}
    return tuple(plain.items())
