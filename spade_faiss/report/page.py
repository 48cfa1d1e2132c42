"""The page of a run: headlines, notices, tables, charts, the images shown in full and the table of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.pictures import Picture
from spade_faiss.report import charts
from spade_faiss.report.cards import card_groups
from spade_faiss.report.inputs import ReportInputs
from spade_faiss.report.metric_labels import SCORE_LABELS
from spade_faiss.report.metric_tables import metric_charts, metric_headlines, metric_tables
from spade_faiss.report.model import Cell, Chart, ImageRow, Report, Table
from spade_faiss.report.pictures import color_range, overlay
from spade_faiss.report.products import product_table
from spade_faiss.report.verdicts import verdict_charts, verdict_headlines, verdict_notices, verdict_tables


def run_page(inputs: ReportInputs, shown: int) -> Report:
    """Lay out a run.

    Args:
        inputs: the run.
        shown: how many images to show in full, see `selection.select_images`.
    """
    scores, metrics, decisions = inputs.scores, inputs.results.metrics, inputs.results.decisions
    rows = [_row(inputs, i) for i in range(len(scores))]
    return Report(
        title="Evaluation" if metrics else "Anomaly scores",
        subtitle=f"{len(scores)} images against {inputs.facts.bank['images']} normal ones in {inputs.facts.bank_name}",
        notices=tuple(_notices(inputs)),
        headlines=(
            *(metric_headlines(metrics, inputs.facts.method.score) if metrics else ()),
            *(verdict_headlines(decisions) if decisions else ()),
        ),
        summary=(
            *((product_table(products, inputs.facts.method.score),) if (products := inputs.results.products) else ()),
            *(metric_tables(metrics) if metrics else ()),
            *(verdict_tables(decisions) if decisions else ()),
        ),
        charts=tuple(_charts(inputs)),
        groups=tuple(card_groups(inputs, rows, shown)),
        colors=_colors(inputs),
        levels=tuple(scores.match),
        images=tuple(rows),
        score=inputs.facts.method.score,
        details=tuple(_details(inputs)),
    )


def overlays(inputs: ReportInputs, colors: tuple[float, float]) -> Iterator[tuple[ImageRecord, Picture]]:
    """Each image that has a map under its heat map; `colors` are those of the page."""
    for i in np.flatnonzero(inputs.scores.localized).tolist():
        picture, _ = inputs.picture(i)
        if picture is not None:
            yield inputs.records[i], overlay(picture, inputs.scores.map(i), *colors)


def _row(inputs: ReportInputs, i: int) -> ImageRow:
    scores, record, decisions = inputs.scores, inputs.records[i], inputs.results.decisions
    return ImageRow(
        id=record.id,
        scores={name: float(values[i]) for name, values in scores.image_scores.items()},
        neighbor_id=str(scores.neighbor_ids[i, 0]),
        neighbor_dist=float(scores.neighbor_dist[i, 0]),
        kind=record.kind,
        defective=record.defective,
        p_value=float(decisions.verdicts.p_value[i]) if decisions is not None and decisions.verdicts.judged[i] else None,
        alarm=None if decisions is None else decisions.verdicts.alarm_of(i),
        product=None if scores.routes is None else scores.routes.at(i),
    )


def _colors(inputs: ReportInputs) -> tuple[float, float]:
    """The scores at which the colors of all heat maps start and end."""
    scores, localized = inputs.scores, np.flatnonzero(inputs.scores.localized)
    if not len(localized):
        return 0.0, 1.0  # no map is shown
    labels = None if inputs.defective is None else inputs.defective[localized].tolist()
    return color_range(scores.map_score[localized], lambda i: scores.map(int(localized[i])), labels)


def _notices(inputs: ReportInputs) -> Iterator[str]:
    facts, results = inputs.facts, inputs.results
    if without := int((~inputs.scores.localized).sum()):
        limit = f"an image score of at most {above:g}" if (above := facts.method.flag_above) is not None else "localize=none"
        yield f"{without} of {len(inputs.scores)} images have no map ({limit}); they are in the table alone."
    if notice := results.notice:
        yield notice[0].upper() + notice[1:] + "."
    if results.decisions is not None:
        yield from verdict_notices(results.decisions)
    if facts.recipe.build.gallery != "exact":
        yield f"{facts.definition} {results.search_notice()}".rstrip()
    for notice in results.notices():
        yield notice[0].upper() + notice[1:] + "."
    if results.skipped:
        yield f"{len(results.skipped)} images could not be read and were left out; they are listed at the end."
    if (metrics := results.metrics) is not None and metrics.not_visible:
        where = f"resize mode {facts.resize_mode}{', in the region of interest' if 'roi' in facts.bank else ''}"
        remedy = " To score whole images, extract a bank with --resize-mode letterbox." if facts.resize_mode == "crop" else ""
        yield (
            f"{metrics.not_visible} of {metrics.images} defective images show no defect in the region that was scored "
            f"({where}), yet count as defective.{remedy}"
        )


def _charts(inputs: ReportInputs) -> Iterator[Chart]:
    scores, defective, decisions = inputs.scores, inputs.defective, inputs.results.decisions
    if len(scores) < 2:
        return  # of one image, a chart shows nothing that the numbers beside the picture do not say
    limits = None if decisions is None or decisions.rule is None else decisions.rule.thresholds
    at_image = {} if limits is None else {f"alarm, alpha={limits.alpha:g}": limits.image}
    image = charts.histogram("image score", scores.image_score, defective, at_image)
    yield Chart(title="Image scores", svg=image, note="Mean distance to the nearest normal images.")
    if (localized := scores.localized).any():
        at_map = {} if limits is None else {f"alarm, alpha={limits.alpha:g}": limits.map, "region": limits.pixel}
        labels = None if defective is None else defective[localized]
        by_map = charts.histogram("map maximum", scores.map_score[localized], labels, at_map)
        yield Chart(title="Map maxima", svg=by_map, note="Highest pixel score of each image.")
        if "top" in (inputs.facts.method.score, *inputs.facts.method.image_scores):
            at_top = {} if limits is None else {f"alarm, alpha={limits.alpha:g}": limits.top}
            by_top = charts.histogram(SCORE_LABELS["top"], scores.top_score[localized], labels, at_top)
            yield Chart(title="Top means", svg=by_top, note="Mean of the highest pixel scores of each image.")
        structure = scores.structure_score
        if structure is not None and "structure" in (inputs.facts.method.score, *inputs.facts.method.image_scores):
            by_structure = charts.histogram(SCORE_LABELS["structure"], structure[localized], labels)
            yield Chart(title="Structure", svg=by_structure, note="Distance of each map's statistics to those of normal maps.")
    if decisions is not None:
        yield from verdict_charts(decisions)
    if inputs.results.metrics is not None:
        yield from metric_charts(inputs.results.metrics)


def _details(inputs: ReportInputs) -> Iterator[Table]:
    results = inputs.results
    yield Table(title="Method", header=("setting", "value"), rows=_as_rows(inputs.facts.settings))
    yield Table(title="Bank", header=("fact", "value"), rows=_as_rows(inputs.facts.bank))
    count = max(1, results.images)
    timings = {**results.timing_s, "wall clock": results.total_s}
    yield Table(
        title="Where the time went",
        header=("step", "seconds", "ms an image"),
        rows=tuple((name, seconds, 1000 * seconds / count) for name, seconds in timings.items()),
        note="Images are decoded in threads beside the other steps. "
        f"Peak memory of the process: {results.peak_memory_bytes / 2**30:.2f} GiB.",
        decimals=2,
    )
    if skipped := results.skipped:
        yield Table(title="Skipped", header=("image", "reason"), rows=tuple((item.id, item.reason) for item in skipped))


def _as_rows(facts: dict[str, Any]) -> tuple[tuple[Cell, ...], ...]:
    plain = {key: json.dumps(value) if isinstance(value, dict | list | tuple) else str(value) for key, value in facts.items()}
    return tuple(plain.items())
