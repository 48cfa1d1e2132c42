"""Whether normal has moved: recent scores against those of the calibration, by the two-sample Kolmogorov-Smirnov test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from spade_faiss.bank.bank import Bank
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.decisions.calibration import Calibration, stored_calibrations
from spade_faiss.decisions.conformal import Doubles, check_rate, p_values
from spade_faiss.report import charts
from spade_faiss.report.html import write_html
from spade_faiss.report.jsonfile import write_json
from spade_faiss.report.model import Chart, Headline, Report, Table
from spade_faiss.report.scorefile import ScoreFile

LEVEL = 0.01
DEFECTS = 0.05

_TESTS = {"image": "image score", "map": "map maximum"}
# Numbers of defects that are tried, from none to as many as there may be.
_TRIED = 21
# Up to here the exact distribution takes no time.
_EXACT = 1000


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What one kind of score says.

    `distance`: the Kolmogorov-Smirnov distance, the most by which the shares of recent and of calibration images below a score
    differ. `p_value`: of it or a larger one, had nothing moved and were at most the given share defects. `median_p`: the median
    of the recent images' p-values among the calibration's scores; 0.5 is normal, less is higher scores.
    """

    distance: float
    p_value: float
    median_p: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Drift:
    """Whether recent scores are those of normal images as they were calibrated.

    `moved`: whether they are not, at `level`. `p_value`: of all tests together (Bonferroni). `tests`: `image` and, where all
    images have one, `map`. `p_values`: of the recent images, by test.
    """

    moved: bool
    verdict: str
    p_value: float
    level: float
    defects: float
    images: int
    calibration: Calibration
    outdated: str
    tests: dict[str, Moved]
    p_values: dict[str, Doubles]


def drift(results: Sequence[str | Path], *, bank: str | Path, level: float = LEVEL, defects: float = DEFECTS) -> Drift:
    """Compare the scores of recent images with those that the bank was calibrated with.

    Args:
        results: folders that `score_folder` wrote, or their scores.h5: of the same way of scoring and state of the bank.
        bank: the bank's folder.
        level: the chance of a false verdict that normal has moved.
        defects: the share of recent images, the highest scores, that may be defects without counting as drift.

    Raises:
        NotFoundError: if there is no such bank or result.
        InputError: for results that were scored in different ways, or against a state of the bank that is not calibrated.
        BankError: for a damaged bank or calibration.
    """
    check_rate("level", level)
    if defects != 0:
        check_rate("defects", defects)
    if not results:
        raise InputError("drift needs results to look at; give folders that spade-faiss score wrote")
    opened = Bank.open(bank)
    parts = [_read(Path(item)) for item in results]
    (config, generation), *others = dict.fromkeys(part[0] for part in parts)
    if others:
        raise InputError(
            f"the results were scored with {len(others) + 1} scoring configs, or against as many states of the bank: "
            f"{config} at generation {generation}, {others[0][0]} at {others[0][1]}; compare results of one"
        )
    calibration = next((found for found in stored_calibrations(opened) if found.scoring_config.key == config), None)
    if calibration is None or calibration.generation != generation:
        has = "none for it" if calibration is None else f"one of generation {calibration.generation}"
        raise InputError(
            f"the results were scored at generation {generation} with scoring config {config}, the bank {opened.path} has "
            f"{has}; calibrate with the same settings (spade-faiss calibrate {opened.path}), then score the images again"
        )
    image, by_map = (np.concatenate([part[1][name] for part in parts]) for name in _TESTS)
    recent = {"image": image, **({} if np.isnan(by_map).any() else {"map": by_map})}
    before = dict(zip(_TESTS, calibration.scores.T, strict=True))
    p = {name: p_values(before[name], scores) for name, scores in recent.items()}
    tests = {
        name: Moved(
            distance=_compare(scores, before[name])[0],
            p_value=moved_p_value(before[name], scores, defects),
            median_p=float(np.median(p[name])),
        )
        for name, scores in recent.items()
    }
    together = min(1.0, len(tests) * min(test.p_value for test in tests.values()))
    moved = together <= level
    return Drift(
        moved=moved,
        verdict=_verdict(tests, together, len(image), level, defects),
        p_value=together,
        level=level,
        defects=defects,
        images=len(image),
        calibration=calibration,
        outdated=calibration.outdated(opened),
        tests=tests,
        p_values=p,
    )


def moved_p_value(calibration: npt.NDArray[Any], recent: npt.NDArray[Any], defects: float) -> float:
    """The p-value of two samples being of one distribution, the second with at most a share of `defects`, its highest.

    How many defects there are is not known: the number among those allowed that makes the samples most alike is taken, so that
    the p-value is too high, never too low, if defects score above normal images.

    Args:
        calibration: (n,) scores.
        recent: (m,) scores.
        defects: a share from 0 to below 1.
    """
    ordered = np.sort(recent)
    most = min(int(defects * len(ordered)), len(ordered) - 1)
    tried = np.unique(np.linspace(0, most, min(_TRIED, most + 1)).round().astype(int))
    return max(_compare(ordered[: len(ordered) - count], calibration)[1] for count in tried)


def _compare(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> tuple[float, float]:
    """Distance and p-value of two samples."""
    found = stats.ks_2samp(a.tolist(), b.tolist(), method="exact" if max(len(a), len(b)) <= _EXACT else "asymp")
    return float(found.statistic), float(found.pvalue)


def write_drift(out: str | Path, found: Drift) -> None:
    """Write drift.json and drift.html into a folder; it is made if there is none."""
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "drift.json", drift_numbers(found))
    curves = {name: found.p_values[name] for name in found.tests}
    note = "Share of recent images with a p-value of at most alpha: on the diagonal where nothing has moved."
    chart = Chart(
        title="P-values of recent images",
        svg=charts.rate_chart({_TESTS[name]: p for name, p in curves.items()}, 1.0, "p-values of recent images"),
        note=note,
    )
    table = Table(
        title="By score",
        header=("score", "distance", "p-value", "median p-value of images"),
        rows=tuple((_TESTS[name], test.distance, f"{test.p_value:.2g}", test.median_p) for name, test in found.tests.items()),
        note="Kolmogorov-Smirnov, recent against calibration scores.",
    )
    report = Report(
        title="Drift",
        subtitle=found.verdict,
        notices=(found.outdated,) if found.outdated else (),
        headlines=(
            Headline(label="Normal has moved", value="yes" if found.moved else "no", note=f"at level {found.level:g}"),
            Headline(label="P-value", value=f"{found.p_value:.2g}", note=f"{found.images} recent images"),
        ),
        summary=(table,),
        charts=(chart,),
    )
    write_html(Path(out) / "drift.html", report)


def drift_numbers(found: Drift) -> dict[str, Any]:
    """Every number of it, for programs."""
    return {
        "moved": found.moved,
        "verdict": found.verdict,
        "p_value": found.p_value,
        "level": found.level,
        "defects": found.defects,
        "images": found.images,
        "calibration_images": len(found.calibration),
        "generation": found.calibration.generation,
        "notice": found.outdated or None,
        "tests": {name: dict(vars(test)) for name, test in found.tests.items()},
    }


def _read(path: Path) -> tuple[tuple[str, int], dict[str, npt.NDArray[Any]]]:
    file = path / "scores.h5" if path.is_dir() else path
    if not file.exists():
        raise NotFoundError(f"there are no results at {path} (no scores.h5); make some with: spade-faiss score")
    with ScoreFile.open(file) as scores:
        settings = json.loads(scores.settings)
        if not isinstance(settings, dict) or not {"scoring_config", "generation"} <= set(settings):
            raise InputError(f"{file} does not say how it was scored; score the images again with this version")
        columns = {"image": scores.image_score.astype(np.float64), "map": scores.map_score.astype(np.float64)}
    return (str(settings["scoring_config"]), int(settings["generation"])), columns


def _verdict(tests: dict[str, Moved], p_value: float, images: int, level: float, defects: float) -> str:
    allowed = f", even if {100 * defects:g} % of them are defects" if defects else ""
    if p_value > level:
        return f"Nothing says that normal has moved: {images} recent images score like the calibration's (p = {p_value:.2g})."
    name, strongest = min(tests.items(), key=lambda item: item[1].p_value)
    which = "higher" if strongest.median_p < 0.5 else "lower"
    return (
        f"Normal has moved: the {_TESTS[name]} of {images} recent images is {which} than the calibration's (p = {p_value:.2g})"
        f"{allowed}. Look at them; if they are normal, add some to the bank and calibrate again."
    )
