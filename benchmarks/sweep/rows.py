"""Computes rows from raw results: every number of the report follows from the stored points, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from benchmarks.sweep import measures
from benchmarks.sweep.measures import Bootstrap, Doubles, Estimate, estimate
from benchmarks.sweep.points import ImagePoint, LookPoint, PeerPoint, PixelPoint, as_mapping, point_id
from benchmarks.sweep.store import Raw
from spade_faiss.scoring.metrics import localization_metrics

Row = dict[str, Any]
Say = Callable[[str], None]

_QUANTILES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
# Curves are resampled by so many ranges of scores; their values are computed from every single score.
_BINS = 1000
_COPIED = ("train_s", "load_cold_s", "load_warm_s", "load_dropped", "build_peak_bytes", "peak_bytes")
_TOUCHING = np.ones((3, 3))


def rows_of(raws: Iterable[Raw], say: Say = lambda _: None) -> list[Row]:
    """Compute a row for each point, in a fixed order. Differences are to the exact point of the same task.

    Args:
        raws: what was measured.
        say: takes a line for each point.
    """
    raws = sorted(raws, key=lambda raw: _order(as_mapping(raw.point)))
    exact = {
        _task(raw.point): raw
        for raw in raws
        if isinstance(raw.point, PixelPoint) and raw.point.recipe == "exact" and raw.point.threads == max_threads(raws)
    }
    rows = []
    for raw in raws:
        row: Row = {"id": point_id(raw.point), **as_mapping(raw.point), "label": raw.point.label}
        if isinstance(raw.point, ImagePoint):
            row |= _image(raw)
        elif isinstance(raw.point, LookPoint):
            row |= {name: value for name, value in raw.facts.items() if name != "machine"}
        else:
            row |= _maps(raw, exact.get(_task(raw.point)))
        rows.append({**row, "machine": raw.facts.get("machine", {})})
        say(row["id"])
    flat = {(row["set"], row["n"], row["k"], row["threads"]): row for row in rows if row.get("factory") == "Flat"}
    for row in rows:
        best = flat.get((row["set"], row.get("n"), row.get("k"), row.get("threads"))) if row["kind"] == "image" else None
        if best:
            row["times_flat"] = best["p50_ms"] / row["p50_ms"]
            row["times_flat_batch"] = row["per_s"] / best["per_s"]
    return rows


def max_threads(raws: Iterable[Raw]) -> int:
    """Return the number of threads of most points; points with fewer threads measure what threads are worth."""
    return max((raw.point.threads for raw in raws if isinstance(raw.point, PixelPoint)), default=1)


def _image(raw: Raw) -> Row:
    point, arrays, facts = raw.point, raw.arrays, raw.facts
    assert isinstance(point, ImagePoint)
    ids, true_dist, truth = arrays["ids"], arrays["true_dist"], arrays["truth"]
    score, best = arrays["dist"].astype(np.float64).mean(axis=1), truth[:, : point.k].mean(axis=1)
    excess = measures.score_excess(score, best)
    found = {
        "recall_1": measures.recall(ids, true_dist, truth, 1),
        "recall_k": measures.recall(ids, true_dist, truth, point.k),
        "excess_mean": float(excess.mean()),
        "excess_p99": float(np.quantile(excess, 0.99)),
        "rank_correlation": measures.rank_correlation(score, best),
        # The error of the distances that an engine gives, against float64.
        "off_float64": float((np.abs(arrays["dist"] - true_dist) / np.maximum(true_dist, 1e-12))[ids >= 0].max(initial=0)),
        **_image_auroc(arrays["defective"], score, best),
        "build_s": facts["train_s"] + facts["add_s"],
        "disk_bytes_per_image": facts["bytes"] / point.n,
        "memory_bytes_per_image": facts["memory_bytes"] / point.n,
        **{name: facts.get(name) for name in _COPIED},
        **_times(arrays["latency_s"]),
        "batch": facts["batch"],
        "per_s": facts["batch"] / float(np.median(arrays["batch_s"])),
        "dim": facts["dim"],
    }
    if "cold_latency_s" in arrays:
        found |= {"cold_p50_ms": 1000 * float(np.median(arrays["cold_latency_s"])), "cold_dropped": facts["cold_dropped"]}
    return found


def _maps(raw: Raw, exact: Raw | None) -> Row:
    point, arrays, facts = raw.point, raw.arrays, raw.facts
    row: Row = {
        name: facts[name]
        for name in ("normals", "build_peak_bytes", "peak_bytes", "memory_bytes", "off_float64", "extrapolated", "off_exact")
        if name in facts
    }
    row |= _times(arrays["latency_s"])
    if "all_s" in facts:
        count = len(arrays["image_score"])
        row |= {"images": count, "batch": facts["batch"], "per_s": count / facts["all_s"]}
    if "latency_s pixel search" in arrays:
        row["pixel_ms"] = 1000 * float(np.median(arrays["latency_s pixel search"]))
        row["image_ms"] = 1000 * float(np.median(arrays["latency_s image search"]))
    if "cold_latency_s" in arrays:
        row |= {"cold_p50_ms": 1000 * float(np.median(arrays["cold_latency_s"])), "cold_dropped": facts["cold_dropped"]}
    if "bytes" in facts:
        row |= {"build_s": facts["train_s"] + facts["add_s"], "disk_bytes_per_image": facts["bytes"] / facts["normals"]}
    if "bank_bytes" in facts:
        row["bank_bytes_per_image"] = facts["bank_bytes"] / facts["normals"]
    if "levels" in facts:
        row |= {"levels": facts["levels"], "locations": facts["levels"][0][0] * facts["levels"][0][1]}
    if exact is not None and (levels := [name for name in arrays if name.startswith("level_dist ")]):
        ours, best = (np.concatenate([source[name].ravel() for name in levels]) for source in (arrays, exact.arrays))
        excess = measures.score_excess(ours, best)
        row |= {
            "recall_1": measures.share_as_near(ours, best),
            "excess_mean": float(excess[np.isfinite(excess)].mean()),
            "excess_p99": float(np.quantile(excess, 0.99)),
        }
    if exact is not None and "map_score" in arrays:
        row["rank_correlation"] = measures.rank_correlation(arrays["map_score"], exact.arrays["map_score"])
        if isinstance(point, PixelPoint):
            row["map_excess_mean"] = float(measures.score_excess(arrays["map_score"], exact.arrays["map_score"]).mean())
            row["same_maps"] = bool((arrays["map_sha256"] == exact.arrays["map_sha256"]).all())
    if "defective" in arrays:
        row |= _image_auroc(arrays["defective"], arrays["map_score"], None if exact is None else exact.arrays["map_score"])
        row["knn_auroc"] = asdict(estimate(_bootstrap(arrays["defective"]).image_auroc(arrays["image_score"])))
    if "maps" in arrays:
        row |= _pixel(arrays, None if exact is None else exact)
    return row


def _times(taken: npt.NDArray[Any]) -> Row:
    return {**{name: 1000 * float(np.quantile(taken, at)) for name, at in _QUANTILES.items()}, "timed": len(taken)}


def _image_auroc(defective: npt.NDArray[np.bool_], score: npt.NDArray[Any], best: npt.NDArray[Any] | None) -> Row:
    resamples = _bootstrap(defective)
    ours = resamples.image_auroc(score)
    found = {"image_auroc": asdict(estimate(ours))}
    if best is not None:
        found["image_auroc_difference"] = asdict(estimate(ours - resamples.image_auroc(best)))
    return found


def _pixel(arrays: Mapping[str, npt.NDArray[Any]], exact: Raw | None) -> Row:
    ours = _pixel_estimates(arrays)
    found = {name: asdict(value) for name, (value, _) in ours.items()}
    if exact is not None:
        for name, (value, samples) in ours.items():
            best, of_best = _exact_pixel_estimates(exact)[name]
            apart = samples - of_best
            shift = value.value - best.value - apart[0]
            low, high = np.quantile(apart[1:], (0.025, 0.975)) + shift
            found[f"{name}_difference"] = asdict(Estimate(value.value - best.value, float(low), float(high)))
    return found


def _pixel_estimates(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[Estimate, Doubles]]:
    """Pixel AUROC and AUPRO, with their resamples.

    Values are computed from all scores, resamples from `_BINS` ranges of scores. The interval is shifted by the difference that
    the ranges make on all images.
    """
    maps, masks, valid = arrays["maps"], arrays["masks"], arrays["valid"]
    exactly = localization_metrics(masks, maps, valid)
    regions, count = np.zeros(masks.shape, np.int64), 0
    for image in np.flatnonzero((masks & valid).any(axis=(1, 2))):
        labels, several = ndimage.label(masks[image] & valid[image], _TOUCHING)
        regions[image] = np.where(labels > 0, labels + count, 0)
        count += several
    at = np.linspace(0, 1, _BINS)
    edges = np.unique(np.concatenate([np.quantile(maps[valid & (masks == of)], at) for of in (True, False)]))
    samples = _bootstrap(arrays["defective"]).pixel(measures.pixel_counts(maps, regions, valid, edges))
    found = {}
    for name, value, of_name in zip(("pixel_auroc", "aupro"), (exactly.auroc, exactly.aupro), samples, strict=True):
        interval = estimate(of_name)
        shift = value - interval.value
        found[name] = (Estimate(value, interval.low + shift, interval.high + shift), of_name)
    return found


_last_exact: dict[str, dict[str, tuple[Estimate, Doubles]]] = {}


def _exact_pixel_estimates(exact: Raw) -> dict[str, tuple[Estimate, Doubles]]:
    """The same for an exact point, with which many others are compared."""
    name = point_id(exact.point)
    if name not in _last_exact:
        _last_exact.clear()
        _last_exact[name] = _pixel_estimates(exact.arrays)
    return _last_exact[name]


def _bootstrap(defective: npt.NDArray[np.bool_]) -> Bootstrap:
    return _bootstrap_of(defective.tobytes())


@lru_cache(maxsize=4)
def _bootstrap_of(defective: bytes) -> Bootstrap:
    return Bootstrap(np.frombuffer(defective, np.bool_))


def _task(point: object) -> tuple[Any, ...]:
    """The settings that must be equal for results to be compared."""
    if isinstance(point, PixelPoint):
        return point.set, point.k, point.normals, point.side, point.images
    if isinstance(point, PeerPoint):
        return point.set, point.k, point.normals, 0, point.images
    return ()


def _order(mapping: Mapping[str, Any]) -> tuple[str, ...]:
    return (*(f"{mapping.get(name, ''):>12}" for name in ("kind", "set", "n", "k", "normals", "side")), str(mapping))
