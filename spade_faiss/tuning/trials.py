"""Trying options: each is a bank and a detector as it would be used, and what it scores is kept on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.origin import Origin
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.settings import Run
from spade_faiss.core.signed_json import hash_json
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import FloatArray
from spade_faiss.features.layout import Layout
from spade_faiss.index.build import build_index
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.scores import Scores
from spade_faiss.search.recipe import load_recipe
from spade_faiss.tuning.options import MapOption, Option, Stored
from spade_faiss.tuning.samples import Samples
from spade_faiss.tuning.statistics import Bools, Doubles, Trials, map_areas

_SCORES = ("knn", "max", "top")
_BATCH = 32
# Of the pixels that are not defective, every third in a row and in a column is enough to rank the others among.
_STEP = 3
_SEARCHING = ("image search", "pixel search", "fusion")


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """What one way to make maps measured.

    Args:
        normal: (n,) scores of normal pictures by the name of the image score.
        spoilt: (S,) scores of defective ones.
        areas: (S,) see `statistics.map_areas`.
        shown: the maps of the defects that are shown, in the order of `Samples.shown`, in half precision.
        ms: the milliseconds that an image took to be searched, where it was tried.
        bytes: what an image takes in the bank and its index, on average.
        s: the seconds that the trial took.
    """

    normal: dict[str, Doubles]
    spoilt: dict[str, Doubles]
    areas: Doubles
    shown: npt.NDArray[np.float16]
    ms: float
    bytes: float
    s: float


def run_trials(
    folder: Path, samples: Samples, layout: Layout, maps: Sequence[MapOption], run: Run, deadline: float | None = None
) -> dict[MapOption, Trial]:
    """Try ways to make maps, in their order; those that were tried before are read.

    Args:
        folder: where banks are made, and what was measured is kept.
        samples: the pictures.
        layout: that of the bank, but for what options choose.
        maps: what to try; the first is always tried.
        run: the device and the memory.
        deadline: the `time.monotonic()` after which nothing is begun; None for no limit.
    """
    found: dict[MapOption, Trial] = {}
    bank: tuple[Stored, Bank] | None = None
    with progress_bar(len(maps), "options", run.progress, unit="option") as bar:
        for option in maps:
            path = folder / f"trial-{hash_json({'option': asdict(option)})[:16]}.npz"
            if path.exists():
                found[option] = _read(path)
            elif not found or deadline is None or time.monotonic() < deadline:
                if bank is None or bank[0] != option.stored:
                    bank = option.stored, _make_bank(folder / "try.bank", samples, layout, option.stored)
                found[option] = _try(bank[1], samples, option, run)
                _write(path, found[option])
            bar.update()
    shutil.rmtree(folder / "try.bank", ignore_errors=True)
    return found


def _make_bank(path: Path, samples: Samples, layout: Layout, stored: Stored) -> Bank:
    shutil.rmtree(path, ignore_errors=True)
    bank = Bank.create(path, replace(layout, **vars(stored)), Origin())
    for start in range(0, len(samples.references), 2 * _BATCH):
        bank.append(samples.references[start : start + 2 * _BATCH])
    return bank


def _try(bank: Bank, samples: Samples, option: MapOption, run: Run) -> Trial:
    start, timings = time.perf_counter(), Timings()
    recipe = load_recipe(option.recipe).with_levels(option.method.levels if option.recipe != "exact" else ())
    built = build_index(bank, recipe, rebuild=True)
    detector = Detector(bank, recipe, replace(option.method, score="knn", image_scores=("knn",)), replace(run, weights=None))
    outside: list[FloatArray] = []
    normal, spoilt = _Gathered(), _Gathered()
    for at in range(0, samples.normal_count, _BATCH):
        if samples.normals is None:
            scores = detector.score_rows(samples.rows[at : at + _BATCH].tolist(), timings=timings)
        else:
            scores = detector.score_features(samples.normals[at : at + _BATCH], timings=timings)
        normal.add(scores)
        outside.append(_outside(scores, np.zeros(scores.maps.shape, np.bool_)))
    defects: list[tuple[FloatArray, Bools]] = []
    shown: list[npt.NDArray[np.float16]] = []
    for at in range(0, len(samples.spoilt), _BATCH):
        batch = samples.spoilt[at : at + _BATCH]
        if samples.normals is None:
            own = samples.rows[samples.owner[at : at + _BATCH]].tolist()
            scores = detector.score_copies(batch, own, timings=timings)
        else:
            scores = detector.score_features(batch, timings=timings)
        spoilt.add(scores)
        shown += [scores.maps[number - at].astype(np.float16) for number in samples.shown if at <= number < at + len(batch)]
        if samples.masks is not None:
            masks = samples.masks[at : at + _BATCH]
            masks = masks if scores.valid is None else masks & scores.valid
            outside.append(_outside(scores, masks))
            defects.append((scores.maps, masks))
    others = np.sort(np.concatenate(outside))
    areas = [map_areas(maps, masks, others) for maps, masks in defects]
    images = samples.normal_count + len(samples.spoilt)
    return Trial(
        normal=normal.scores,
        spoilt=spoilt.scores,
        areas=np.concatenate(areas) if areas else np.full(len(samples.spoilt), np.nan),
        shown=np.stack(shown),
        ms=1000 * sum(timings.seconds.get(stage, 0.0) for stage in _SEARCHING) / images,
        bytes=(bank.bytes_on_disk + (built.bytes if built else 0)) / len(bank),
        s=time.perf_counter() - start,
    )


class _Gathered:
    """The image scores of batch after batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[FloatArray]] = {name: [] for name in _SCORES}

    def add(self, scores: Scores) -> None:
        for name, parts in self._parts.items():
            parts.append(scores.image_scores[name])

    @property
    def scores(self) -> dict[str, Doubles]:
        return {name: np.concatenate(parts).astype(np.float64) for name, parts in self._parts.items()}


def _outside(scores: Scores, masks: Bools) -> FloatArray:
    """The scores of some pixels that are inspected and not defective."""
    inside = ~masks[:, ::_STEP, ::_STEP]
    if scores.valid is not None:
        inside &= scores.valid[:, ::_STEP, ::_STEP]
    return scores.maps[:, ::_STEP, ::_STEP][inside]


def _write(path: Path, trial: Trial) -> None:
    arrays = {f"normal-{name}": values for name, values in trial.normal.items()}
    arrays |= {f"spoilt-{name}": values for name, values in trial.spoilt.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, areas=trial.areas, shown=trial.shown, cost=np.array([trial.ms, trial.bytes, trial.s]))  # type: ignore[arg-type]


def _read(path: Path) -> Trial:
    with np.load(path) as file:
        ms, size, seconds = file["cost"].tolist()
        return Trial(
            normal={name: file[f"normal-{name}"] for name in _SCORES},
            spoilt={name: file[f"spoilt-{name}"] for name in _SCORES},
            areas=file["areas"],
            shown=file["shown"],
            ms=ms,
            bytes=size,
            s=seconds,
        )


def table_of(options: Sequence[Option], trials: dict[MapOption, Trial], samples: Samples) -> Trials:
    """What was measured of options, as statistics take it."""
    own = [_trial_of(option, trials) for option in options]
    normal_group, spoilt_group = samples.groups
    return Trials(
        normal=np.stack([trial.normal[option.score] for option, trial in zip(options, own, strict=True)]),
        spoilt=np.stack([trial.spoilt[option.score] for option, trial in zip(options, own, strict=True)]),
        areas=np.stack([trial.areas for trial in own]),
        normal_group=normal_group,
        spoilt_group=spoilt_group,
    )


def _trial_of(option: Option, trials: dict[MapOption, Trial]) -> Trial:
    return trials[of_map(option, trials)]


def of_map(option: Option, maps: dict[MapOption, Trial]) -> MapOption:
    """Which of the maps that were tried is that of an option, whatever score it ranks by."""
    plain = comparable(option.map)
    found = next((each for each in maps if comparable(each) == plain), None)
    if found is None:
        raise InputError(f"{option.name} was not tried")
    return found


def comparable(option: MapOption) -> MapOption:
    """The same map option, but for the scores that rank images."""
    method = replace(option.method, score="knn", image_scores=("knn",))
    return replace(option, method=method, stored=option.stored.comparable())
