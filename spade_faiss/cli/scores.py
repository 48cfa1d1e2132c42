"""The commands that score images: score, evaluate."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from spade_faiss.cli.options import Commands, add_method, add_run, add_settings, open_detector, read_settings
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
    evaluate.add_argument("dataset", metavar="DATASET", help="a folder laid out as MVTec AD")
    add_settings(evaluate, LabeledSet)
    _add_scoring(evaluate)


def _score(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.score import score_folder

    return _describe_results(
        score_folder(
            arguments.images,
            bank=open_detector(arguments),
            out=arguments.out,
            decision=read_settings(arguments, Decision),
            report=read_settings(arguments, ReportOptions),
        )
    )


def _evaluate(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.evaluate import evaluate

    return _describe_results(
        evaluate(
            arguments.dataset,
            bank=open_detector(arguments),
            out=arguments.out,
            decision=read_settings(arguments, Decision),
            report=read_settings(arguments, ReportOptions),
            normal_kind=read_settings(arguments, LabeledSet).normal_kind,
        )
    )


def _describe_results(done: Results) -> Output:
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
    numbers["calibration"] = None if done.decisions is None else done.decisions.numbers()
    numbers["calibration_notice"] = done.notice or None
    if (decisions := done.decisions) is not None:
        given = decisions.verdicts
        lines.append(f"{int(given.alarm.sum())} alarms of {done.images} images at {given.rule}={given.level:g}")
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


def _describe_metrics(metrics: Metrics) -> tuple[dict[str, Any], list[str]]:
    from spade_faiss.report.metric_labels import METRICS, metric_values, rankings

    numbers = {label: metric_values(found) for label, found in rankings(metrics).items()}
    lines = [f"{'':24}" + "".join(f"{name:>8}" for name in METRICS.values())]
    lines += [f"{label:24}" + "".join(f"{value:8.3f}" for value in values.values()) for label, values in numbers.items()]
    return numbers, lines


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bank", required=True, help="the bank's folder")
    command.add_argument("--out", required=True, help="the folder to write results to")
    add_method(command)
    add_run(command, scores=True, cluster=True)
    add_settings(command.add_mutually_exclusive_group(), Decision)
    add_settings(command, ReportOptions)
