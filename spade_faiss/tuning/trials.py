"""Trying options: each is a bank and a detector as it would be used, and what it scores is kept on disk."""

from __future__ import annotations

import shutil
import time
from collections import Counter
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
from spade_faiss.tuning.options import MapOption, Option, Stored, within_few
from spade_faiss.tuning.overlaps import Overlaps
from spade_faiss.tuning.picture_grid import on_picture
from spade_faiss.tuning.samples import Samples
from spade_faiss.tuning.statistics import Doubles, Trials
from spade_faiss.tuning.weighted import fused, light, standardizing_weights

_SCORES = ("knn", "max", "top")
_BATCH = 32
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
        memory: the bytes that scoring takes while it runs, as it is planned, without the cache.
        s: the seconds that the trial took.
        in_picture: (S,) the areas of defects on the grid of the picture, see `picture_grid`; None where other inputs are not
            compared.
        weights: what levels were weighted by, where that was found from the normal pictures; empty otherwise.
    """

    normal: dict[str, Doubles]
    spoilt: dict[str, Doubles]
    areas: Doubles
    shown: npt.NDArray[np.float16]
    ms: float
    bytes: float
    memory: float
    s: float
    in_picture: Doubles | None = None
    weights: tuple[float, ...] = ()


def run_trials(
    folder: Path, samples: Samples, layout: Layout, maps: Sequence[MapOption], run: Run, deadline: float | None = None
) -> dict[MapOption, Trial]:
    """Try ways to make maps, in their order; those that were tried before are read.

    Where levels are searched apart and weigh the same, their weighted mean is tried as well, see `standardizing_weights`: it
    takes no other search.

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
            key = hash_json({"option": asdict(option)})[:16]
            path, standardized = folder / f"trial-{key}.npz", folder / f"trial-{key}-standardized.npz"
            if path.exists():
                found[option] = _read(path)
                weighted = _read(standardized) if standardized.exists() else None
            elif not found or deadline is None or time.monotonic() < deadline:
                if bank is None or bank[0] != option.stored:
                    bank = option.stored, _make_bank(folder / "try.bank", samples, layout, option.stored)
                found[option], weighted = _try(bank[1], samples, option, run)
                if weighted is not None:  # first: where the plain one is, the weighted one is, if there is any
                    _write(standardized, weighted)
                _write(path, found[option])
            else:
                weighted = None
            if weighted is not None:
                found[option.weighted_by(weighted.weights)] = weighted
            bar.update()
    shutil.rmtree(folder / "try.bank", ignore_errors=True)
    return found


def _least_others(samples: Samples) -> int:
    """How many others the normal picture has that has fewest: a picture that is left out takes its group with it."""
    if samples.normals is not None:
        return len(samples.references) - 1
    sizes = Counter(group for group in samples.references.groups or () if group)
    return len(samples.references) - max(sizes.values(), default=1)


def _make_bank(path: Path, samples: Samples, layout: Layout, stored: Stored) -> Bank:
    shutil.rmtree(path, ignore_errors=True)
    bank = Bank.create(path, replace(layout, **vars(stored)), Origin())
    for start in range(0, len(samples.references), 2 * _BATCH):
        bank.append(samples.references[start : start + 2 * _BATCH])
    return bank


def _try(bank: Bank, samples: Samples, option: MapOption, run: Run) -> tuple[Trial, Trial | None]:
    """Score all pictures by an option, and by the same with standardized levels, where there are several."""
    start, timings = time.perf_counter(), Timings()
    recipe = load_recipe(option.recipe).with_levels(option.method.levels if option.recipe != "exact" else ())
    built = build_index(bank, recipe, rebuild=True)
    method = replace(within_few(option, _least_others(samples)).method, score="knn", image_scores=("knn",))
    detector = Detector(bank, recipe, method, replace(run, weights=None))
    plain, kept = _Collected(samples), _Kept()
    for at in range(0, samples.normal_count, _BATCH):
        if samples.normals is None:
            scores = detector.score_rows(samples.rows[at : at + _BATCH].tolist(), timings=timings)
        else:
            scores = detector.score_features(samples.normals[at : at + _BATCH], timings=timings)
        plain.add_normal(scores)
        kept.normal.append(light(scores))
    for at in range(0, len(samples.spoilt), _BATCH):
        batch = samples.spoilt[at : at + _BATCH]
        if samples.normals is None:
            own = samples.rows[samples.owner[at : at + _BATCH]].tolist()
            scores = detector.score_copies(batch, own, timings=timings)
        else:
            scores = detector.score_features(batch, timings=timings)
        plain.add_spoilt(scores)
        kept.spoilt.append(light(scores))
    images = samples.normal_count + len(samples.spoilt)
    costs = _Costs(
        ms=1000 * sum(timings.seconds.get(stage, 0.0) for stage in _SEARCHING) / images,
        bytes=(bank.bytes_on_disk + (built.bytes if built else 0)) / len(bank),
        memory=float(detector.plan.working_bytes),
    )
    found = plain.trial(costs, start)
    weights = () if option.method.level_weights else standardizing_weights(kept.normal)
    if not weights:
        return found, None
    start = time.perf_counter()
    weighted = _Collected(samples)
    method = replace(method, level_weights=weights)
    for scores in kept.normal:
        weighted.add_normal(fused(scores, bank.layout.input_size, method))
    for scores in kept.spoilt:
        weighted.add_spoilt(fused(scores, bank.layout.input_size, method))
    return found, replace(weighted.trial(costs, start), weights=weights)


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """See `Trial`."""

    ms: float
    bytes: float
    memory: float


class _Kept:
    """The scores of all batches, without their maps."""

    def __init__(self) -> None:
        self.normal: list[Scores] = []
        self.spoilt: list[Scores] = []


class _Collected:
    """What is measured of batch after batch: first normal pictures, then defective ones."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._normal, self._spoilt = _Gathered(), _Gathered()
        self._own, self._grid = Overlaps(), Overlaps()
        self._normals = self._defects = 0
        self._shown: list[npt.NDArray[np.float16]] = []

    def add_normal(self, scores: Scores) -> None:
        self._normal.add(scores)
        inside = np.ones(scores.maps.shape, np.bool_) if scores.valid is None else scores.valid
        self._own.add_normal(scores.maps, inside)
        if (where := self._samples.in_picture) is not None:
            sizes = where.normal_sizes[self._normals : self._normals + len(scores)]
            self._grid.add_normal(on_picture(scores.maps, sizes, where.preprocess))
        self._normals += len(scores)

    def add_spoilt(self, scores: Scores) -> None:
        samples, part = self._samples, slice(self._defects, self._defects + len(scores))
        self._spoilt.add(scores)
        self._shown += [scores.maps[n - part.start].astype(np.float16) for n in samples.shown if part.start <= n < part.stop]
        if samples.masks is not None:
            inside = np.ones(scores.maps.shape, np.bool_) if scores.valid is None else scores.valid
            self._own.add_defects(scores.maps, samples.masks[part] & inside, inside)
        if (where := samples.in_picture) is not None and where.masks is not None:
            maps = on_picture(scores.maps, where.spoilt_sizes[part], where.preprocess)
            self._grid.add_defects(maps, where.masks[part])
        self._defects = part.stop

    def trial(self, costs: _Costs, start: float) -> Trial:
        return Trial(
            normal=self._normal.scores,
            spoilt=self._spoilt.scores,
            areas=self._own.areas(self._defects),
            shown=np.stack(self._shown),
            ms=costs.ms,
            bytes=costs.bytes,
            memory=costs.memory,
            s=time.perf_counter() - start,
            in_picture=None if self._samples.in_picture is None else self._grid.areas(self._defects),
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


def _write(path: Path, trial: Trial) -> None:
    arrays = {f"normal-{name}": values for name, values in trial.normal.items()}
    arrays |= {f"spoilt-{name}": values for name, values in trial.spoilt.items()}
    arrays |= {} if trial.in_picture is None else {"in_picture": trial.in_picture}
    cost = np.array([trial.ms, trial.bytes, trial.memory, trial.s])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, areas=trial.areas, shown=trial.shown, cost=cost, weights=np.array(trial.weights, np.float64))  # type: ignore[arg-type]


def _read(path: Path) -> Trial:
    with np.load(path) as file:
        ms, size, memory, seconds = file["cost"].tolist()
        return Trial(
            normal={name: file[f"normal-{name}"] for name in _SCORES},
            spoilt={name: file[f"spoilt-{name}"] for name in _SCORES},
            areas=file["areas"],
            shown=file["shown"],
            ms=ms,
            bytes=size,
            memory=memory,
            s=seconds,
            in_picture=file.get("in_picture"),
            weights=tuple(file["weights"].tolist()),
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
