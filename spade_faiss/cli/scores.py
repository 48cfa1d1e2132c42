"""The commands that score images: score, evaluate."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from spade_faiss.cli.options import (
    Commands,
    add_cluster,
    add_method,
    add_product,
    add_run,
    add_settings,
    open_detector,
    read_settings,
)
from spade_faiss.cli.text import Output, format_times
from spade_faiss.core.memory import format_bytes
from spade_faiss.core.settings import Decision, LabeledSet, ReportOptions

if TYPE_CHECKING:
    from spade_faiss.report.results import Results
    from spade_faiss.scoring.evaluation import Metrics


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    score = commands.add(
        "score",
        _score,
        "score images and write scores, maps and a report",
        "spade-faiss score new/ --bank parts.bank --out results/ --overlays",
    )
    score.add_argument("images", nargs="+", metavar="IMAGES", help="a folder, an image, or several")
    _add_scoring(score)
    evaluate = commands.add(
        "evaluate",
        _evaluate,
        "score a labeled set (test/<kind>, ground_truth/<kind>) and measure",
        "spade-faiss evaluate bottle/ --bank bottle.bank --out results/",
    )
    evaluate.add_argument(
        "dataset", metavar="DATASET", help="a folder laid out as MVTec AD, or one of such folders, each named after a product"
    )
    add_settings(evaluate, LabeledSet)
    _add_scoring(evaluate)


def _score(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.score import score_folder

    detector = open_detector(arguments)
    done = score_folder(
        arguments.images,
        bank=detector,
        out=arguments.out,
        decision=read_settings(arguments, Decision),
        report=read_settings(arguments, ReportOptions),
    )
    return _describe_results(done, detector.method.score)


def _evaluate(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.evaluate import evaluate

    detector = open_detector(arguments)
    done = evaluate(
        arguments.dataset,
        bank=detector,
        out=arguments.out,
        decision=read_settings(arguments, Decision),
        report=read_settings(arguments, ReportOptions),
        normal_kind=read_settings(arguments, LabeledSet).normal_kind,
    )
    return _describe_results(done, detector.method.score)


def _describe_results(done: Results, score: str) -> Output:
    from spade_faiss.report.exchange import PARTS
    from spade_faiss.report.verdicts import verdict_notices

    numbers: dict[str, Any] = {
        "out": str(done.out),
        **done.inspected_numbers(),
        "passed_over": done.passed_over,
        "time": {"total_s": done.total_s, "timing_s": done.timing_s},
        "peak_memory_bytes": done.peak_memory_bytes,
    }
    lines = [f"{done.images} images scored, {len(done.skipped)} skipped"]
    lines += [f"  skipped {item.id}: {item.reason}" for item in done.skipped]
    lines += [f"  {notice}" for notice in done.notices()]
    if done.metrics is not None:
        numbers["metrics"], table = _describe_metrics(done.metrics)
        lines += table
    if done.products:
        numbers["products"], table = _describe_products(done, score)
        lines += table
    numbers["calibration"] = None if done.decisions is None else done.decisions.numbers()
    numbers["calibration_notice"] = done.notice or None
    if (decisions := done.decisions) is not None:
        lines.append(f"{int(decisions.verdicts.alarm.sum())} alarms of {done.images} images at {decisions.at}")
        lines += [f"  {notice}" for notice in verdict_notices(decisions)]
    else:
        lines.append(done.notice)
    if notice := done.search_notice():
        lines.append(notice)
    lines.append(format_times(done.timing_s, done.total_s, done.images))
    lines.append(f"peak memory {format_bytes(done.peak_memory_bytes)}")
    tables = f", and for each part in {PARTS}/," if (done.out / PARTS).exists() else ", scores.csv and scores.h5"
    lines.append(f"look at {done.out / 'report.html'}; numbers are in report.json{tables} beside it")
    return numbers, lines


def _describe_products(done: Results, score: str) -> tuple[dict[str, Any], list[str]]:
    from spade_faiss.report.products import product_numbers, product_table

    table = product_table(done.products, score)
    cells = [[_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return product_numbers(done.products), lines


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _describe_metrics(metrics: Metrics) -> tuple[dict[str, Any], list[str]]:
    from spade_faiss.report.metric_labels import METRICS, metric_values, rankings

    numbers = {label: metric_values(found) for label, found in rankings(metrics).items()}
    lines = [f"{'':24}" + "".join(f"{name:>8}" for name in METRICS.values())]
    lines += [f"{label:24}" + "".join(f"{value:8.3f}" for value in values.values()) for label, values in numbers.items()]
    return numbers, lines


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bank", required=True, help="the bank's folder")
    command.add_argument("--out", required=True, help="the folder to write results to")
    add_product(command)
    add_method(command)
    add_run(command, scores=True)
    add_cluster(command, searches=True)
    add_settings(command.add_mutually_exclusive_group(), Decision)
    add_settings(command, ReportOptions)
