"""From images to a folder of results: scores in files and a report to look at."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.settings import Decision, ReportOptions, Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.calibration import Verdicts, state_of
from spade_faiss.decisions.regions import Region
from spade_faiss.decisions.rules import DecisionRules, Decisions
from spade_faiss.features.datasets import Duplicate, ImageRecord, Images, Skipped, Survey, survey
from spade_faiss.features.pictures import Mask
from spade_faiss.features.placement import Placement, Visible
from spade_faiss.features.video_frames import VideoFrame
from spade_faiss.report.columns import region_columns, verdict_columns
from spade_faiss.report.csvfile import write_csv, write_regions_csv
from spade_faiss.report.exchange import OVERLAYS, REPORT, SCORES
from spade_faiss.report.html import write_html
from spade_faiss.report.inputs import DetectorFacts, ReportInputs, Shown
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.normals import NormalPictures
from spade_faiss.report.numbers import run_numbers
from spade_faiss.report.output_folder import OutputFolder, output_folder
from spade_faiss.report.output_place import check_place
from spade_faiss.report.overlay_files import OverlayFiles
from spade_faiss.report.page import overlays, run_page
from spade_faiss.report.picture_store import PictureStore, ShortlistedPictures, SpooledPictures
from spade_faiss.report.products import ProductResult, product_results
from spade_faiss.report.results import Results
from spade_faiss.report.scorefile import ScoreFile, ScoreWriter
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.evaluation import Metrics
from spade_faiss.scoring.routing import Routes


def score_folder(
    images: Images,
    *,
    bank: str | Path | Detector,
    out: str | Path,
    decision: Decision = Decision(),
    report: ReportOptions = ReportOptions(),
) -> Results:
    """Score images and write scores.h5, scores.csv, regions.csv, report.json and report.html.

    If the bank has a calibration for the detector's scoring config, every image gets p-values and a verdict, and the regions
    above the pixel threshold are written; if it has none, or one that is out of date, the results say so.

    Args:
        images: a folder, an image, or a list of them.
        bank: a bank's folder, to be searched with the default settings, or an opened detector.
        out: the folder to write to; it is made if there is none, and results that are there are replaced as a whole, when all
            of this run are complete.
        decision: the false-alarm rate that verdicts promise.
        report: what the report shows.

    Raises:
        InputError: for bad input, too many unreadable images, or a rate that so few calibration images cannot promise; if
            `out` holds other files and no results, lies inside of images or of a bank, or if another process is writing to it.
        NotFoundError: if a path does not exist.
        BankError: if a rate is asked for and there is no calibration, or one that is out of date.
    """
    found = survey(images, bank.run if isinstance(bank, Detector) else Run())
    sources = [images] if isinstance(images, str | Path) else images
    plan = OutputPlan("score", out, [*sources, *found.entered])
    with open_job(bank, decision, plan) as job, open_pictures(job, report) as pictures:
        scored = score_images(job, found, pictures)
        # The maps do not fit into memory: they are read from the file.
        with ScoreFile.open(job.folder.staged / SCORES) as scores:
            return write_results(job, scored, scores, pictures, report)


class OutputPlan(NamedTuple):
    """Which command writes results, to which folder, and what it reads."""

    command: str
    out: str | Path
    images: Sequence[str | Path]


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """What a run is made with.

    Args:
        detector: scores the images.
        folder: the folder of the results.
        rules: decide which images are alarms; None if there are none, then `notice` says why.
        notice: why there are no decision rules.
        timings: where the seconds of each step are added.
    """

    detector: Detector
    folder: OutputFolder
    rules: DecisionRules | None
    notice: str
    timings: Timings


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """What is known of the n images that were scored, beside scores.h5.

    Args:
        records: the images.
        placements: how each image lies in the backbone's input.
        skipped: the images that could not be read, each with the reason.
        verdicts: the verdicts; None without a decision rule.
        regions: the regions of each image; empty without a decision rule.
        found: the images as they were found, and what was left out.
        in_bank: the images whose content is in the bank.
        passed_over: for each level whose search counts it, see `Results`.
        routes: which products they show, of a bank of several.
    """

    records: Sequence[ImageRecord]
    placements: Sequence[Placement]
    skipped: tuple[Skipped, ...]
    verdicts: Verdicts | None
    regions: Sequence[Sequence[Region]]
    found: Survey
    in_bank: tuple[Duplicate, ...]
    passed_over: dict[str, float]
    routes: Routes | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated:
    """The metrics of a labeled set, and the masks (n, H, W) that they were measured with, if it has masks; see `PixelTruth`.

    Of a bank of several products, `products` are the metrics of each, and `truth` is which one each image shows, if the set is
    of several as well.
    """

    metrics: Metrics
    masks: Mask | None
    products: Mapping[str, Metrics] = field(default_factory=dict)
    truth: Sequence[str] | None = None


@contextmanager
def open_job(bank: str | Path | Detector, decision: Decision, plan: OutputPlan) -> Iterator[Job]:
    """Open the detector, find its decision rule, and hold the folder of the results; raises as `score_folder`."""
    timings = Timings()
    with timings("load"):
        detector = bank if isinstance(bank, Detector) else Detector.open(bank)
    check_place(plan.out, bank=detector.bank, images=plan.images)
    rules, notice = DecisionRules.of(detector, decision)
    with output_folder(plan.out, plan.command) as folder:
        with timings("load"):
            _ = detector.backbone  # loaded now, so that it counts as loading
        yield Job(detector=detector, folder=folder, rules=rules, notice=notice, timings=timings)


def open_pictures(job: Job, report: ReportOptions) -> AbstractContextManager[PictureStore]:
    """Where the pictures are kept that the report shows: all of them if each gets an overlay."""
    return SpooledPictures(job.folder.staged) if report.overlays else ShortlistedPictures(report.shown)


def score_images(job: Job, found: Survey, pictures: PictureStore) -> Scored:
    """Score images into scores.h5, find their regions, and decide.

    Args:
        job: what the run is made with.
        found: the images to score.
        pictures: takes their pictures.

    Raises:
        InputError: if more images than allowed are unreadable, or all of them.
    """
    detector, rules, timings = job.detector, job.rules, job.timings
    read: list[ImageRecord] = []
    placements: list[Placement] = []
    regions: list[list[Region]] = []
    of_images: list[dict[str, FloatArray]] = []
    statistics, passed_over = [], []
    routes: list[Routes] = []
    normal_of = {digest: name for name, digest in detector.bank.sha256_of.items()}
    in_bank: list[Duplicate] = []
    stream = detector.stream(timings, "score")
    tile = detector.bank.layout.input_size if detector.bank.is_tiled else None
    with ScoreWriter(job.folder.staged / SCORES, _settings_text(detector), run=job.folder.run, tile=tile) as writer:
        for extracted, scores in stream(found.root, found.records):
            batch = [item.placement for item in extracted.loaded]
            if rules is not None:
                with timings("regions"):
                    regions += rules.regions(scores, batch)
            with timings("write"):
                writer.append(scores)
            of_images.append(dict(scores.image_scores) if rules is None else rules.scores_of(scores))
            statistics.append(scores.statistics)
            routes += [] if scores.routes is None else [scores.routes]
            passed_over.append(scores.passed_over)
            labels = [record.defective for record in extracted.records]
            pictures.add(
                [item.picture for item in extracted.loaded],
                of_images[-1][detector.method.score],
                np.isfinite(of_images[-1]["max"]),
                None if None in labels else np.array(labels, np.bool_),
            )
            in_bank += (
                Duplicate(record.id, normal_of[item.sha256])
                for record, item in zip(extracted.records, extracted.loaded, strict=True)
                if item.sha256 in normal_of
            )
            read += extracted.records
            placements += batch
        verdicts = None
        joined = Routes.join(routes) if routes else None
        if rules is not None:
            whole = {name: np.concatenate([batch[name] for batch in of_images]) for name in of_images[0]}
            verdicts = rules(whole, np.concatenate(statistics), None if joined is None else joined.product)
            if "structure" in whole:
                writer.add_table("image_scores", {"structure": whole["structure"]})
            writer.add_table("verdict", verdict_columns(verdicts))
            writer.add_table("regions", region_columns(regions))
    return Scored(
        records=read,
        placements=placements,
        skipped=tuple(stream.skipped),
        verdicts=verdicts,
        regions=regions,
        found=found,
        in_bank=tuple(in_bank),
        passed_over=_mean_shares(passed_over),
        routes=joined,
    )


def _mean_shares(batches: Sequence[Mapping[str, FloatArray]]) -> dict[str, float]:
    """The mean of each level over the images of all batches that have a number."""
    found = {level: np.concatenate([batch[level] for batch in batches]) for level in batches[0]}
    return {level: float(np.nanmean(shares)) for level, shares in found.items() if np.isfinite(shares).any()}


def _settings_text(detector: Detector) -> str:
    """How images were scored, for scores.h5."""
    settings = {**asdict(detector.method), "recipe": detector.recipe.name, "scoring_config": detector.scoring_config.key}
    found = {**settings, "generation": detector.bank.generation}
    if products := _product_states(detector):
        found["products"] = products
    return json.dumps(found)


def _product_states(detector: Detector) -> dict[str, dict[str, str]]:
    """By product, the scoring config and the state that images were scored with; none in a bank of one product."""
    bank = detector.bank
    configs = {bank.product: detector.scoring_config} if bank.product else detector.product_configs
    parts = {name: bank if bank.product else bank.part(name) for name in configs}
    return {
        name: {"scoring_config": config.key, "state": state_of(parts[name])["shards_sha256"]}
        for name, config in configs.items()
    }


def write_results(
    job: Job,
    scored: Scored,
    scores: ScoreFile,
    pictures: PictureStore,
    report: ReportOptions,
    evaluated: Evaluated | None = None,
) -> Results:
    """Write everything beside scores.h5.

    Args:
        job: what the run was made with.
        scored: the images.
        scores: the open scores.h5.
        pictures: their pictures.
        report: what the report shows.
        evaluated: the metrics of a labeled set.
    """
    results, bank = _summarize(job, scored, evaluated), job.detector.bank
    inputs = ReportInputs(
        facts=DetectorFacts.of(job.detector),
        results=results,
        scores=scores,
        records=scored.records,
        masks=None if evaluated is None else evaluated.masks,
        picture=lambda i: Shown(pictures[i]),
        normal_ids=bank.pictures.names(np.arange(len(bank))),
        normal_picture=NormalPictures(bank),
        normal_group=bank.group_of,
        normal_places=bank.tile_places,
    )
    kinds = None if evaluated is None else [str(record.kind) for record in scored.records]
    times = [record.time_s if isinstance(record, VideoFrame) else None for record in scored.records]
    staged = job.folder.staged
    write_csv(
        staged / "scores.csv",
        scores,
        kinds,
        scored.verdicts,
        job.detector.method.score,
        times if any(time is not None for time in times) else None,
    )
    if results.decisions is not None:
        write_regions_csv(staged / "regions.csv", scores.ids, scored.regions)
    page = run_page(inputs, report.shown)
    write_html(staged / "report.html", replace(page, run=job.folder.run))
    shown = _write_overlays(staged / OVERLAYS, inputs, page.colors) if report.overlays and page.colors is not None else {}
    write_json(staged / REPORT, {"run": job.folder.stamp(), "overlays": shown, **run_numbers(inputs)})
    return results


def _write_overlays(folder: Path, inputs: ReportInputs, colors: tuple[float, float]) -> dict[str, str]:
    """Write the overlays; returns where each image's is, below the folder of the results."""
    files = OverlayFiles(folder)
    found = overlays(inputs, colors)
    return {record.id: f"{folder.name}/{files.write(record.id, picture)}" for record, picture in found}


def _summarize(job: Job, scored: Scored, evaluated: Evaluated | None) -> Results:
    decisions = None
    if job.rules is not None and scored.verdicts is not None:
        defective = None if evaluated is None else np.array([bool(record.defective) for record in scored.records])
        decisions = Decisions(
            rules=job.rules,
            verdicts=scored.verdicts,
            regions=scored.regions,
            defective=defective,
            products=None if scored.routes is None else scored.routes.product,
        )
    return Results(
        out=job.folder.out,
        images=len(scored.records),
        skipped=scored.skipped,
        left_out=scored.found.left_out,
        visible=Visible.of(scored.placements, job.detector.backbone.source.preprocess.input_mode),
        in_bank=scored.in_bank,
        metrics=None if evaluated is None else evaluated.metrics,
        decisions=decisions,
        notice=job.notice,
        passed_over=scored.passed_over,
        timing_s=job.timings.seconds,
        total_s=job.timings.total_s,
        peak_memory_bytes=peak_memory_bytes(),
        products=_by_product(job.detector.bank, scored, decisions, evaluated),
    )


def _by_product(
    bank: Snapshot, scored: Scored, decisions: Decisions | None, evaluated: Evaluated | None
) -> tuple[ProductResult, ...]:
    if scored.routes is None:
        return ()
    normals = {bank.product: len(bank.pictures)} if bank.product else {name: bank.images_of(name) for name in bank.products}
    truth, metrics = (None, {}) if evaluated is None else (evaluated.truth, evaluated.products)
    return product_results(normals, scored.routes, truth, decisions, metrics)


def peak_memory_bytes() -> int:
    """The most memory that the process has used since it started."""
    # Linux counts in kilobytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
