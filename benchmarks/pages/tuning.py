"""What tuning is worth: by set, the default, the choice and the best option in hindsight, from tuning.json; and inputs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from benchmarks.pages.text import Figures, markdown_table

_METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
# What foresees each metric: the number of the search.
_FORESEEN_BY = {"image_auroc": "image", "pixel_auroc": "maps", "aupro": "maps"}
_PATCHCORE = ("PatchCore 1 %", "PatchCore 1 %, our k-center")
_AIMS = {"image_auroc": 0.01, "aupro": 0.02}
_BELOW = 0.005

# What stands in place of a table as long as no set was measured.
_NOTHING = "No set was measured yet."

Row = Mapping[str, Any]


def table(figures: Figures) -> str:
    """One table a metric, with the means over the sets."""
    rows = figures["tuning"]["rows"]
    if not rows:
        return _NOTHING
    return "\n\n".join(_table(figures, rows, metric) for metric in _METRICS)


def _table(figures: Figures, rows: Sequence[Row], metric: str) -> str:
    patchcore = _patchcore(figures)
    lines: list[tuple[str, ...]] = []
    numbers: list[tuple[float, float, float]] = []
    besides: list[float] = []
    for row in rows:
        if metric not in row["options"][0]["real"]:
            continue
        default, tuned, best, best_name = _figures(row, metric)
        beside = patchcore.get(row["set"], {}).get(metric)
        numbers.append((default, tuned, best))
        besides += [] if beside is None else [beside]
        lines.append(
            (
                f"{row['set']} ({row['normals']})",
                f"{default:.3f}",
                f"{tuned:.3f}",
                f"{best:.3f}",
                best_name,
                f"{best - tuned:.3f} ({best - default:.3f})",
                f"{_correlation(row, metric):.2f}",
                "–" if beside is None else f"{beside:.3f}",
            )
        )
    if not numbers:
        return f"**{_METRICS[metric]}**\n\n{_NOTHING}"
    means = [statistics.mean(each[place] for each in numbers) for place in range(3)]
    mean_beside = f"{statistics.mean(besides):.3f}" if len(besides) == len(numbers) else "–"
    regret = f"{means[2] - means[1]:.3f} ({means[2] - means[0]:.3f})"
    lines.append(("mean", *(f"{mean:.3f}" for mean in means), "", regret, "", mean_beside))
    header = (
        "set (normals)",
        "default",
        "tuned",
        "best in hindsight",
        "which is",
        "regret of the choice (of the default)",
        "rank correlation",
        "PatchCore 1 %",
    )
    return f"**{_METRICS[metric]}**\n\n{markdown_table(header, lines)}"


def choices(figures: Figures) -> str:
    """What was chosen by which evidence, and how long it took."""
    if not figures["tuning"]["rows"]:
        return _NOTHING
    lines = []
    for row in figures["tuning"]["rows"]:
        spoils, seconds = row["spoils"], row["s"]
        lines.append(
            (
                row["set"],
                row["chosen"] if row["chosen"] != row["default"] else "the default",
                f"{spoils['copies']} of {spoils['pictures']}",
                spoils["found"],
                f"{seconds['cpu']:.0f} s",
                f"{seconds['clock']:.0f} s at a load of {seconds['load']:.0f}",
            )
        )
    header = ("set", "choice", "spoilt copies of pictures", "of which count", "time of the processors", "by the clock")
    return markdown_table(header, lines)


def aims(figures: Figures) -> str:
    """Which aims are met, and where one is missed."""
    rows, patchcore, lines = figures["tuning"]["rows"], _patchcore(figures), []
    if not rows:
        return _NOTHING
    for metric, aim in _AIMS.items():
        own = [_figures(row, metric) for row in rows if metric in row["options"][0]["real"]]
        if not own:
            continue
        regret = statistics.mean(best - tuned for _, tuned, best, _ in own)
        met = "met" if regret <= aim else "missed"
        lines.append(f"- Mean regret of {_METRICS[metric]} over {len(own)} sets: {regret:.4f}; the aim is {aim:g} ({met}).")
    below = [
        f"{row['set']} ({_METRICS[metric]} {tuned - default:+.3f})"
        for row in rows
        for metric in _METRICS
        if metric in row["options"][0]["real"]
        for default, tuned, _, _ in [_figures(row, metric)]
        if tuned < default - _BELOW
    ]
    lines.append(f"- Below the default by more than {_BELOW:g}: {', '.join(below) or 'none'}.")
    for metric in _METRICS:
        both = [
            (_figures(row, metric)[1], patchcore[row["set"]][metric])
            for row in rows
            if metric in row["options"][0]["real"] and metric in patchcore.get(row["set"], {})
        ]
        if both:
            tuned, beside = (statistics.mean(each[place] for each in both) for place in (0, 1))
            met = "above" if tuned > beside else "not above"
            lines.append(
                f"- Mean {_METRICS[metric]} over {len(both)} sets: {tuned:.4f} tuned, {beside:.4f} by PatchCore 1 % ({met})."
            )
    return "\n".join(lines)


def _figures(row: Row, metric: str) -> tuple[float, float, float, str]:
    """The default's, the choice's and the best option's figure, and which option that is."""
    real = {option["name"]: float(option["real"][metric]) for option in row["options"]}
    best = max(real, key=lambda name: real[name])
    return real[row["default"]], real[row["chosen"]], real[best], best


def _correlation(row: Row, metric: str) -> float:
    """Spearman's rank correlation over options between what spoils said and what is so."""
    spoilt = [option["spoilt"][_FORESEEN_BY[metric]]["value"] for option in row["options"]]
    return float(spearmanr(spoilt, [option["real"][metric] for option in row["options"]]).statistic)


def _patchcore(figures: Figures) -> dict[str, Row]:
    """PatchCore's figures by set; anomalib's own pick where there is one."""
    rows = {(row["set"], row["search"]): row for row in figures["whole_bank"]["patchcore"]["rows"]}
    names = dict.fromkeys(name for name, _ in rows)
    return {name: next((rows[name, search] for search in _PATCHCORE if (name, search) in rows), {}) for name in names}


def inputs(figures: Figures) -> str:
    """Inputs by set: what spoilt copies said about them, what is so, and what they cost."""
    rows = figures["tuning_inputs"]["rows"]
    if not rows:
        return _NOTHING
    lines = []
    for row in rows:
        for each in row["inputs"]:
            mark = " (chosen)" if each["name"] == row["chosen"] else " (default)" if each["name"] == row["default"] else ""
            said = [
                f"{own['difference']:+.3f} ({own['low']:+.3f} to {own['high']:+.3f}{', sure' if own['sure'] else ''})"
                for own in (each["spoilt"]["image"], each["spoilt"]["maps"])
            ]
            real = [f"{each['real'][metric]:.3f}" if metric in each["real"] else "–" for metric in _METRICS]
            costs = f"{each['bytes'] / 1000:.0f} kB, {each['memory'] / 2**20:.0f} MiB"
            lines.append((f"{row['set']} ({row['normals']})", each["name"] + mark, *said, *real, costs))
    header = (
        *("set (normals)", "input", "spoilt: images", "spoilt: maps", *(f"real: {name}" for name in _METRICS.values())),
        "an image in the bank, and memory",
    )
    return markdown_table(header, lines)
