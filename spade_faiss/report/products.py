"""The results of a run by product, in a bank of several: as a table and as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spade_faiss.core.types import Bools
from spade_faiss.decisions.rules import Decisions
from spade_faiss.report.metric_labels import METRICS, SCORE_RANKINGS, metric_values, rankings
from spade_faiss.report.model import Cell, Table
from spade_faiss.scoring.evaluation import Metrics
from spade_faiss.scoring.routing import NONE_LEVEL, Routes


@dataclass(frozen=True, eq=False, kw_only=True)
class ProductResult:
    """What a run found of one product.

    Args:
        name: the product.
        normals: how many normal images of it the bank has.
        images: how many images of the run show it: by the folder of a labeled set of products, else by their nearest normals or
            because the caller said so.
        other: how many of them were taken for another product; None where nothing says what they show.
        none: how many of them seem to show none of the products.
        alarms: how many of them are alarms; None without a calibration.
        false_alarms: the share of alarms among the normal ones of them; None without labels, and without a calibration.
        metrics: the metrics of them; None without labels, or if only normal or only defective ones are among them.
    """

    name: str
    normals: int
    images: int
    other: int | None
    none: int
    alarms: int | None
    false_alarms: float | None
    metrics: Metrics | None

    def numbers(self) -> dict[str, Any]:
        """The same as plain values."""
        found = {name: value for name, value in vars(self).items() if name != "metrics"}
        by_name = None if self.metrics is None else rankings(self.metrics)
        return {**found, "metrics": by_name and {label: metric_values(ranking) for label, ranking in by_name.items()}}


def product_results(
    normals: Mapping[str, int],
    routes: Routes,
    truth: Sequence[str] | None,
    decisions: Decisions | None,
    metrics: Mapping[str, Metrics],
) -> tuple[ProductResult, ...]:
    """Sum up a run over n images by product: those that the images show, in the order of the bank.

    Args:
        normals: how many normal images the bank has of each product.
        routes: which products the images were searched in.
        truth: (n,) which ones they show, where a labeled set says so.
        decisions: the verdicts, if there are any.
        metrics: those of each product that could be measured.
    """
    shown = routes.product if truth is None else np.array(truth, np.str_)
    found = []
    for name in dict.fromkeys([*normals, *shown.tolist()]):
        own: Bools = shown == name
        if not own.any():
            continue
        alarms = false_alarms = None
        if decisions is not None and (judged := own & decisions.verdicts.judged).any():
            alarms = int(decisions.verdicts.alarm[judged].sum())
            if decisions.defective is not None and (normal := judged & ~decisions.defective).any():
                false_alarms = float(decisions.verdicts.alarm[normal].mean())
        found.append(
            ProductResult(
                name=name,
                normals=normals.get(name, 0),
                images=int(own.sum()),
                other=None if truth is None else int((routes.product[own] != name).sum()),
                none=int(routes.none[own].sum()),
                alarms=alarms,
                false_alarms=false_alarms,
                metrics=metrics.get(name),
            )
        )
    return tuple(found)


def mean_metrics(products: Sequence[ProductResult]) -> dict[str, dict[str, float]]:
    """The mean of each metric over the products that have all of what the first has, by the label of its ranking."""
    each = [
        {label: metric_values(ranking) for label, ranking in rankings(product.metrics).items()}
        for product in products
        if product.metrics is not None
    ]
    shared = [label for label in (each[0] if each else ()) if all(label in found for found in each)]
    return {
        label: {name: float(np.mean([found[label][name] for found in each])) for name in each[0][label]} for label in shared
    }


def product_numbers(products: Sequence[ProductResult]) -> dict[str, Any]:
    """All products, and the mean of their metrics, as plain values."""
    found = {"by_product": [item.numbers() for item in products], "mean": mean_metrics(products)}
    return {**found, "none_level": NONE_LEVEL}


def product_table(products: Sequence[ProductResult], score: str) -> Table:
    """The table of products; with metrics, its last row is their mean.

    Args:
        products: what was found of each.
        score: the image score that ranks.
    """
    with_truth, with_metrics = (any(getattr(item, name) is not None for item in products) for name in ("other", "metrics"))
    header = ["product", "normals", "images", *(["taken for another"] if with_truth else []), "none of the products"]
    header += ["alarms", *(["false alarms"] if with_metrics else [])]
    header += [f"image {METRICS['auroc']}", f"pixel {METRICS['auroc']}", METRICS["aupro"]] if with_metrics else []
    rows: list[tuple[Cell, ...]] = []
    for item in products:
        row: list[Cell] = [item.name, item.normals, item.images, *([item.other] if with_truth else []), item.none, item.alarms]
        row += [item.false_alarms] if with_metrics else []
        row += _metric_cells(item.metrics, score) if with_metrics else []
        rows.append(tuple(row))
    if with_metrics and len(products) > 1:
        columns = list(zip(*(row[-4:] for row in rows), strict=True))
        means = [float(np.mean(known)) if (known := [c for c in column if c is not None]) else None for column in columns]
        counts = [sum(item.images for item in products), *([sum(item.other or 0 for item in products)] if with_truth else [])]
        counts += [sum(item.none for item in products), sum(item.alarms or 0 for item in products)]
        rows.append(("mean, or sum", sum(item.normals for item in products), *counts, *means))
    return Table(
        title="By product",
        header=tuple(header),
        rows=tuple(rows),
        note=f"Each picture was searched in one product. None of the products: a p-value of at most {NONE_LEVEL:g}, and as far "
        "from the nearest normals as products are from each other."
        + (
            " Products are shown by the folders of the set; a picture that was taken for another counts where it belongs."
            if with_truth
            else ""
        ),
    )


def _metric_cells(metrics: Metrics | None, score: str) -> list[Cell]:
    if metrics is None:
        return [None] * 3
    ranked = getattr(metrics, SCORE_RANKINGS[score]) or metrics.by_knn
    pixel = metrics.pixel
    return [ranked.auroc, None if pixel is None else pixel.auroc, None if pixel is None else pixel.aupro]
