"""From images to a folder of results: scores in files, a report to look at and, where there are labels, metrics."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Decision, ReportOptions
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.regions import Region, find_regions
from spade_faiss.decisions.rule import DecisionRule, Decisions, region_columns, verdict_columns
from spade_faiss.features.datasets import ImageRecord, Images, find_images, load_dataset
from spade_faiss.features.pictures import Mask, to_mask
from spade_faiss.features.placement import Placement
from spade_faiss.report.csvfile import write_csv, write_regions_csv
from spade_faiss.report.html import write_html
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.pictures import write_png
from spade_faiss.report.presenter import KindMetrics, Metrics, Presenter, Results
from spade_faiss.report.scorefile import ScoreFile, ScoreWriter
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics
from spade_faiss.scoring.stream import ScoreStream

SCORES, REGIONS = "scores.h5", "regions.csv"


def score_folder(
    images: Images,
    *,
    bank: str | Path | Detector,
    out: str | Path,
    decision: Decision = Decision(),
    report: ReportOptions = ReportOptions(),
) -> Results:
    """Score images and write scores.h5, scores.csv, regions.csv, report.json and report.html.

    Where the bank has a calibration for the detector's scoring config, every image gets p-values and a verdict, and the regions
    above the pixel threshold are written; where it has none, or one that is out of date, the results say so.

    Args:
        images: a folder, an image, or a list of them.
        bank: a bank's folder, to be searched with the defaults, or an opened detector.
        out: the folder to write to; made if there is none, files of the same names are replaced.
        decision: the rate of false alarms that verdicts keep.
        report: what is shown.

    Raises:
        InputError: for bad input, too many unreadable images, or a rate that so few calibration images cannot promise.
        NotFoundError: if a path does not exist.
        BankError: if a rate is asked for and there is no calibration, or one that is out of date.
    """
    root, records = find_images(images)
    for source in [images] if isinstance(images, str | Path) else images:
        if Path(source).is_dir() and Path(out).resolve().is_relative_to(Path(source).resolve()):
            raise InputError(f"out={out} lies inside of {source}: its pictures would be scored the next time; choose another")
    run = _Run(bank, Path(out), decision)
    run.score(records, root)
    return run.write(None, report)


def evaluate(
    dataset: str | Path,
    *,
    bank: str | Path | Detector,
    out: str | Path,
    decision: Decision = Decision(),
    report: ReportOptions = ReportOptions(),
) -> Results:
    """Score the test images of a labeled set laid out as MVTec AD; write what `score_folder` writes, with metrics and labels.

    Args:
        dataset: a folder with `test/<kind>` and, for pixel metrics, `ground_truth/<kind>`.
        bank, out, decision, report: as for `score_folder`.

    Raises:
        InputError: for bad input, a set without normal or without defective test images, a defective image without its mask
            in a set that has masks, too many unreadable images, or a rate that so few calibration images cannot promise.
        NotFoundError: if a path does not exist.
        BankError: if a rate is asked for and there is no calibration, or one that is out of date.
    """
    if isinstance(bank, Detector) and bank.method.localize != "all":
        raise InputError(
            f"localize={bank.method.localize!r} leaves images without a map to measure; evaluate with localize='all'"
        )
    loaded = load_dataset(dataset)
    for name, defective in (("normal (test/good)", False), ("defective", True)):
        if not any(record.defective == defective for record in loaded.test):
            raise InputError(f"{dataset} has no {name} test images, so there is nothing to measure; use: spade-faiss score")
    run = _Run(bank, Path(out), decision)
    run.score(loaded.test, loaded.root)
    return run.write(run.measure(with_masks=loaded.has_masks), report)


class _Run:
    """One pass over images: score them into a file, measure, write the rest."""

    def __init__(self, bank: str | Path | Detector, out: Path, decision: Decision) -> None:
        if out.exists() and not out.is_dir():
            raise InputError(f"out={out} is a file; choose a folder")
        self._timings = Timings()
        with self._timings("load"):
            self._detector = bank if isinstance(bank, Detector) else Detector.open(bank)
            self._preprocess = self._detector.backbone.source.preprocess
        self._out = out
        self._rule, self._notice = DecisionRule.of(self._detector, decision)

    def score(self, records: Sequence[ImageRecord], root: Path) -> None:
        self._records: list[ImageRecord] = []
        self._placements: list[Placement] = []
        self._regions: list[list[Region]] = []
        image_score, map_score = [], []
        detector = self._detector
        stream = ScoreStream(detector, self._timings, "score")
        settings = {**asdict(detector.method), "recipe": detector.recipe.name, "scoring_config": detector.scoring_config.key}
        settings["generation"] = detector.bank.generation
        self._out.mkdir(parents=True, exist_ok=True)
        with ScoreWriter(self._out / SCORES, json.dumps(settings)) as writer:
            for extracted, scores in stream(root, records):
                placements = [item.placement for item in extracted.loaded]
                if self._rule is not None:
                    with self._timings("regions"):
                        self._regions += map(self._find_regions, scores.maps, placements)
                with self._timings("write"):
                    writer.append(scores)
                image_score.append(scores.image_score)
                map_score.append(scores.map_score)
                self._records += extracted.records
                self._placements += placements
            if self._rule is not None:
                maps = None if detector.method.localize == "none" else np.concatenate(map_score)
                self._verdicts = self._rule(np.concatenate(image_score), maps)
                writer.add_table("verdict", verdict_columns(self._verdicts))
                writer.add_table("regions", region_columns(self._regions))
        self._skipped = tuple(stream.skipped)

    def _find_regions(self, scores: FloatArray, placement: Placement) -> list[Region]:
        assert self._rule is not None
        return find_regions(scores, self._rule.thresholds.pixel, self._rule.p_of_pixel, placement)

    def measure(self, *, with_masks: bool) -> Metrics:
        kinds = np.array([str(record.kind) for record in self._records])
        defective = np.array([bool(record.defective) for record in self._records])
        with self._timings("metrics"), ScoreFile.open(self._out / SCORES) as scores:
            masks, valid = self._ground_truth(scores.size) if with_masks else (None, None)
            maps = np.stack(list(scores.maps())) if with_masks else None

            def metrics_of(chosen: Mask) -> KindMetrics:
                unseen, pixel = 0, None
                if masks is not None and maps is not None and valid is not None:
                    unseen = int((defective & ~masks.any(axis=(1, 2)))[chosen].sum())
                    if masks[chosen].any():
                        pixel = localization_metrics(masks[chosen], maps[chosen], valid[chosen])
                return KindMetrics(
                    images=int(defective[chosen].sum()),
                    unseen=unseen,
                    by_knn=detection_metrics(defective[chosen], scores.image_score[chosen]),
                    by_map=detection_metrics(defective[chosen], scores.map_score[chosen]),
                    pixel=pixel,
                )

            return Metrics(
                **vars(metrics_of(np.ones(len(kinds), np.bool_))),
                kinds={str(kind): metrics_of(~defective | (kinds == kind)) for kind in np.unique(kinds[defective])},
            )

    def _ground_truth(self, size: tuple[int, ...]) -> tuple[Mask, Mask]:
        """(n, H, W) of defective pixels, and of pixels that were scored."""
        masks = np.zeros((len(self._records), *size), np.bool_)
        valid = np.stack([placement.valid for placement in self._placements])
        for mask, record, placement in zip(masks, self._records, self._placements, strict=True):
            if record.mask is not None:
                mask[:] = to_mask(record.mask, placement)
        return masks, valid

    def write(self, metrics: Metrics | None, report: ReportOptions) -> Results:
        decisions = None
        if self._rule is not None:
            defective = None if metrics is None else np.array([bool(record.defective) for record in self._records])
            decisions = Decisions(rule=self._rule, verdicts=self._verdicts, regions=self._regions, defective=defective)
        results = Results(
            out=self._out,
            images=len(self._records),
            skipped=self._skipped,
            metrics=metrics,
            decisions=decisions,
            notice=self._notice,
            timing_s=self._timings.seconds,
            total_s=self._timings.total_s,
            peak_memory_bytes=peak_memory_bytes(),
        )
        kinds = None if metrics is None else [str(record.kind) for record in self._records]
        with ScoreFile.open(self._out / SCORES) as scores:
            presenter = Presenter(self._detector, results, scores, self._records, self._placements)
            write_csv(self._out / "scores.csv", scores, kinds, None if decisions is None else decisions.verdicts)
            if decisions is None:
                (self._out / REGIONS).unlink(missing_ok=True)  # of a run before: they are not of these scores
            else:
                write_regions_csv(self._out / REGIONS, scores.ids, decisions.regions)
            write_json(self._out / "report.json", presenter.numbers())
            write_html(self._out / "report.html", presenter.report(report.shown))
            if report.overlays:
                for record, picture in presenter.overlays():
                    target = self._out / "overlays" / f"{record.id}.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_png(target, picture)
        return results


def peak_memory_bytes() -> int:
    """The most that the process has held since it started."""
    # Linux counts in kilobytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
