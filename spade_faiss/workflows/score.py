"""From images to a folder of results: scores in files and a report to look at."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Decision, ReportOptions, Run
from spade_faiss.core.timing import Timings
from spade_faiss.decisions.calibration import Verdicts, state_of
from spade_faiss.decisions.regions import Region
from spade_faiss.decisions.rules import DecisionRules, Decisions
from spade_faiss.features.datasets import Duplicate, ImageRecord, Images, Skipped, Survey, survey
from spade_faiss.features.pictures import Mask
from spade_faiss.features.placement import Placement, Visible
from spade_faiss.features.video_frames import VideoFrame
from spade_faiss.report.columns import Columns, region_columns, verdict_columns
from spade_faiss.report.csvfile import rank, write_csv, write_regions_csv
from spade_faiss.report.exchange import OVERLAYS, PARTS, REPORT, SCORES
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
from spade_faiss.report.scorefile import ScoreFile, ScoreWriter, add_tables
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.evaluation import Metrics
from spade_faiss.scoring.routing import Routes
from spade_faiss.workflows.collected import Collected, collect

if TYPE_CHECKING:
    from spade_faiss.workflows.kept_parts import ScoredPart


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
    run = bank.run if isinstance(bank, Detector) else Run()
    found = survey(images, run)
    sources = [images] if isinstance(images, str | Path) else images
    plan = OutputPlan("score", out, [*sources, *found.entered])
    with open_job(bank, decision, plan) as job, scored_images(job, found, report) as (scored, scores, pictures):
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
        run: tells the run from all others.
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
    run: str
    routes: Routes | None = None

    def part(self, part: slice) -> Scored:
        """What is known of some of the images."""
        verdicts = None if self.verdicts is None else self.verdicts[part]
        return replace(
            self,
            records=self.records[part],
            placements=self.placements[part],
            verdicts=verdicts,
            regions=self.regions[part],
            routes=None if self.routes is None else self.routes[part],
        )


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


@contextmanager
def scored_images(job: Job, found: Survey, report: ReportOptions) -> Iterator[tuple[Scored, ScoreFile, PictureStore]]:
    """Score images into scores.h5, or, on a cluster, into one for each part; find their regions, and decide.

    Args:
        job: what the run is made with.
        found: the images to score.
        report: which pictures it will show.

    Yields:
        What is known of the images; their open scores, whose maps do not fit into memory; the pictures that the report shows.

    Raises:
        InputError: if more images than allowed are unreadable, or all of them.
    """
    if job.detector.run.cluster is not None:
        from spade_faiss.workflows.score_pieces import ReadPictures, score_pieces  # what a cluster takes, one picture does not

        with job.timings("cluster"):
            run, parts = score_pieces((job.detector, job.rules), found, job.folder, _settings_text(job.detector))
        collected = Collected()
        for part in parts:
            collected.extend(part.collected)
        scored = _decided_parts(job.rules, (found, run), parts, collected)
        with ScoreParts.open(_stage_parts(job.folder.staged, parts)) as joined:
            yield scored, joined, ReadPictures(job.detector, collected)
        return
    # All of them are kept if each gets an overlay.
    store = SpooledPictures(job.folder.staged) if report.overlays else ShortlistedPictures(report.shown)
    with store as pictures:
        scored = _score_here(job, found, pictures)
        with ScoreFile.open(job.folder.staged / SCORES) as scores:
            yield scored, scores, pictures


def _score_here(job: Job, found: Survey, pictures: PictureStore) -> Scored:
    """Score images in this process."""
    detector, rules, timings = job.detector, job.rules, job.timings
    tile = detector.bank.layout.input_size if detector.bank.is_tiled else None
    with ScoreWriter(job.folder.staged / SCORES, _settings_text(detector), run=job.folder.run, tile=tile) as writer:
        collected = collect((detector, rules), (found.root, found.records), writer.append, pictures, timings)
        scored = _decided(rules, (found, job.folder.run), collected)
        for group, columns in _tables(scored, collected).items():
            writer.add_table(group, columns)
    return scored


def _stage_parts(staged: Path, parts: Sequence[ScoredPart]) -> list[Path]:
    """Give the files of all parts a second name among the results; where they are kept, they stay until these are complete."""
    files = []
    for part in parts:
        if part.file is not None:
            files.append(staged / PARTS / part.file.parent.name / SCORES)
            files[-1].parent.mkdir(parents=True)
            try:
                files[-1].hardlink_to(part.file)
            except OSError:  # of a file system without such names
                part.file.rename(files[-1])
    return files


def _decided_parts(
    rules: DecisionRules | None, images: tuple[Survey, str], parts: Sequence[ScoredPart], collected: Collected
) -> Scored:
    """Decide on the images of all parts, and write what was decided into the file of each."""
    scored, start = _decided(rules, images, collected), 0
    for part in parts:
        stop = start + len(part.collected)
        if part.file is not None:
            add_tables(part.file, _tables(scored.part(slice(start, stop)), part.collected))
        start = stop
    return scored


def _decided(rules: DecisionRules | None, images: tuple[Survey, str], collected: Collected) -> Scored:
    """Decide on images that were scored; `images` are as they were found, and the run that tells them from all others."""
    (found, run), routes = images, collected.joined_routes
    products = None if routes is None else routes.product
    return Scored(
        records=collected.records,
        placements=collected.placements,
        skipped=tuple(collected.skipped),
        verdicts=None if rules is None else rules(collected.scores, np.concatenate(collected.statistics), products),
        regions=collected.regions,
        found=found,
        in_bank=tuple(collected.in_bank),
        passed_over=collected.mean_passed_over,
        run=run,
        routes=routes,
    )


def _tables(scored: Scored, collected: Collected) -> dict[str, Columns]:
    """What scores.h5 holds of the decisions on images."""
    if scored.verdicts is None:
        return {}
    structure = {name: values for name, values in collected.scores.items() if name == "structure"}
    tables = {"verdict": verdict_columns(scored.verdicts), "regions": region_columns(scored.regions)}
    return {**({"image_scores": structure} if structure else {}), **tables}


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
        picture=partial(_shown, pictures),
        normal_ids=bank.pictures.names(np.arange(len(bank))),
        normal_picture=NormalPictures(bank),
        normal_group=bank.group_of,
        normal_places=bank.tile_places,
    )
    staged = job.folder.staged
    ranks = rank(scores.image_scores[job.detector.method.score])
    for folder, part, rows in scores.files(staged):
        _write_csv(folder, part, scored.part(rows), ranks[rows], is_labeled=evaluated is not None)
    page = run_page(inputs, report.shown)
    stamp = replace(job.folder, run=scored.run).stamp
    write_html(staged / "report.html", replace(page, run=scored.run))
    shown = _write_overlays(staged / OVERLAYS, inputs, page.colors) if report.overlays and page.colors is not None else {}
    write_json(staged / REPORT, {"run": stamp(), "overlays": shown, **run_numbers(inputs)})
    return results


def _write_csv(folder: Path, scores: ScoreFile, scored: Scored, ranks: npt.NDArray[np.int64], *, is_labeled: bool) -> None:
    """Write the tables of the images of one scores.h5; `ranks` are among all images of the run."""
    kinds = [str(record.kind) for record in scored.records] if is_labeled else None
    times = [record.time_s if isinstance(record, VideoFrame) else None for record in scored.records]
    in_video = any(time is not None for time in times)
    write_csv(folder / "scores.csv", scores, kinds, scored.verdicts, ranks, times if in_video else None)
    if scored.verdicts is not None:
        write_regions_csv(folder / "regions.csv", scores.ids, scored.regions)


def _shown(pictures: PictureStore, i: int) -> Shown:
    try:
        return Shown(pictures[i])
    except InputError as error:  # of a picture that is read again
        return Shown(None, str(error))


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
        few_images=_few_images_notice(job.detector),
    )


def _few_images_notice(detector: Detector) -> str:
    """That the bank has too few images for the usual number of neighbors, if fewer of them were taken for that."""
    bank = detector.bank
    return bank.few_images_notice if detector.method.k_image == bank.usual.method.k_image else ""


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
