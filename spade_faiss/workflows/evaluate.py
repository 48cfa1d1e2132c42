"""From a labeled set to a folder of results: what `score_folder` writes, with metrics and labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError
from spade_faiss.core.hints import score_command
from spade_faiss.core.settings import Decision, LabeledSet, ReportOptions, Run
from spade_faiss.features.datasets import Dataset, is_read, load_dataset
from spade_faiss.features.folders import name_some
from spade_faiss.features.pages import hash_image
from spade_faiss.features.pictures import to_mask
from spade_faiss.features.product_sets import is_product_set, load_product_set, product_of
from spade_faiss.features.roi import mask_of
from spade_faiss.features.roi_files import place_roi
from spade_faiss.report.results import Results
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.evaluation import PixelTruth, measure
from spade_faiss.storage.pictures import local_pictures
from spade_faiss.tuning.record import read_record
from spade_faiss.workflows.score import Evaluated, OutputPlan, Scored, open_job, scored_images, write_results

_log = logging.getLogger(__name__)


def evaluate(
    dataset: str | Path,
    *,
    bank: str | Path | Detector,
    out: str | Path,
    decision: Decision = Decision(),
    report: ReportOptions = ReportOptions(),
    normal_kind: str = LabeledSet.normal_kind,
) -> Results:
    """Score the test images of a labeled set laid out as MVTec AD; write what `score_folder` writes, with metrics and labels.

    Args:
        dataset: a folder, or a URL, with `test/<kind>` and, for pixel metrics, `ground_truth/<kind>`; or a folder of such
            folders, each named after a product.
        bank, out, decision, report: as for `score_folder`.
        normal_kind: the folder of `test` that holds normal images; all others hold a kind of defect.

    Raises:
        InputError: for bad input, a set without normal or without defective test images, a kind that is normal by its name and
            not the normal kind, a defective image with two masks or, in a set that has masks, with none, too many unreadable
            images, or a rate that so few calibration images cannot promise; if `out` is no place for results, as for
            `score_folder`.
        NotFoundError: if a path does not exist.
        BankError: if a rate is asked for and there is no calibration, or one that is out of date.
    """
    if isinstance(bank, Detector) and bank.method.localize != "all":
        raise InputError(
            f"localize={bank.method.localize!r} leaves images without a map to measure; evaluate with localize='all'"
        )
    run = bank.run if isinstance(bank, Detector) else Run()
    dataset = local_pictures(dataset, is_read, progress=run.progress)
    of_products = is_product_set(dataset)
    loaded = (load_product_set if of_products else load_dataset)(dataset, normal_kind=normal_kind, run=run)
    _check_classes(loaded, normal_kind)
    _check_not_tuned_on(loaded, bank)
    plan = OutputPlan("evaluate", out, [dataset, *loaded.found.entered])
    with open_job(bank, decision, plan) as job, scored_images(job, loaded.found, report) as (scored, scores, pictures):
        with job.timings("metrics"):
            truth = [product_of(record) for record in scored.records] if of_products else None
            evaluated = _measure(scored, scores, job.detector, with_masks=loaded.has_masks, truth=truth)
        return write_results(job, scored, scores, pictures, report, evaluated)


def _check_not_tuned_on(dataset: Dataset, bank: str | Path | Detector) -> None:
    """Warn if the bank's settings were chosen by pictures of the set: they fit those better than new ones."""
    record = read_record(bank.bank if isinstance(bank, Detector) else Bank.open(bank))
    if record is None or not record.labels_sha256:
        return
    known = {*record.labels_sha256}
    if same := sum(hash_image(each.path) in known for each in dataset.test):
        _log.warning(
            "%d of %d test images are among those that the settings of the bank were chosen by (tune --labels): metrics look "
            "better than they are; measure on other images",
            same,
            len(dataset.test),
        )


def _check_classes(dataset: Dataset, normal_kind: str) -> None:
    kinds = sorted({str(record.kind) for record in dataset.test})
    for name, defective in ((f"normal (test/{normal_kind})", False), ("defective", True)):
        if not any(record.defective == defective for record in dataset.test):
            raise InputError(
                f"{dataset.root} has no {name} test images, so there is nothing to measure; its test folder holds the kinds "
                f"{name_some(kinds)} (say which one is normal: --normal-kind KIND). To score without labels: {score_command()}"
            )


def _measure(
    scored: Scored, scores: ScoreFile, detector: Detector, *, with_masks: bool, truth: Sequence[str] | None
) -> Evaluated:
    kinds = [str(record.kind) for record in scored.records]
    defective = np.array([bool(record.defective) for record in scored.records])
    pixels = _read_pixels(scored, scores, detector) if with_masks else None
    metrics = measure(kinds, defective, scores.image_scores, pixels)
    masks = None if pixels is None else pixels.masks
    if scored.routes is None:
        return Evaluated(metrics=metrics, masks=masks)
    shown = scored.routes.product if truth is None else np.array(truth, np.str_)
    products = {}
    for name in dict.fromkeys(shown.tolist()):
        own = np.flatnonzero(shown == name)
        if not defective[own].any() or defective[own].all():
            continue  # nothing to tell apart
        pixels_of = None if pixels is None else PixelTruth(**{part: values[own] for part, values in vars(pixels).items()})
        if pixels_of is not None and not pixels_of.masks.any():
            pixels_of = None
        of_images = {score: values[own] for score, values in scores.image_scores.items()}
        products[name] = measure([kinds[i] for i in own], defective[own], of_images, pixels_of)
    return Evaluated(metrics=metrics, masks=masks, products=products, truth=truth)


def _read_pixels(scored: Scored, scores: ScoreFile, detector: Detector) -> PixelTruth:
    # Images that were scored in tiles have maps of their own sizes.
    width, height = np.max([placement.size for placement in scored.placements], axis=0)
    shape = (len(scored.records), int(height), int(width))
    masks, shown, maps = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_), np.zeros(shape, np.float32)
    for i, (record, placement) in enumerate(zip(scored.records, scored.placements, strict=True)):
        own = i, slice(placement.size[1]), slice(placement.size[0])
        shown[own], maps[own] = placement.valid, scores.map(i)
        if record.mask is not None:
            masks[own] = to_mask(record.mask, placement)
    valid = detector.bank.layout.inspected(len(masks), shown)
    assert valid is not None
    if (rois := detector.rois) is not None:
        for inspected, record in zip(valid, scored.records, strict=True):
            roi = place_roi(rois.preprocess(record, detector.backbone.source.preprocess))
            assert roi is not None
            inspected &= mask_of(roi)
    masks &= valid  # a defect that lies outside of what is inspected is none
    return PixelTruth(masks=masks, valid=valid, maps=maps)
