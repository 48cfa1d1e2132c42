"""Whole jobs on the same pictures by spade_faiss and by anomalib's PatchCore, with the same network on the same threads.

Each job is a process of its own, and jobs take turns. Fitting counts reading pictures; PatchCore keeps 1 % of its vectors.
Maps of both have the size of the network's input, and the metrics of both are computed here.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.deployment.measure import (
    ProcessCost,
    Row,
    folder_bytes,
    in_turn,
    percentiles,
    ratio,
    run_alone,
    spreads,
)
from benchmarks.deployment.places import Places, no_row
from benchmarks.process import spread
from spade_faiss.core.settings import Preprocess
from spade_faiss.features.datasets import Dataset
from spade_faiss.features.pictures import load_image, to_mask
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics

OWN, PEER = "spade_faiss", "anomalib PatchCore"
BASE = f"{OWN}, onnxruntime"
# PatchCore's fit takes minutes, and its jobs a minute.
FITS, JOBS = 1, 3
_MODULE = "benchmarks.deployment.own_child"
_SCRIPT = Path(__file__).with_name("peer_child.py")
# anomalib loads what it has written by pickle only if this is set. Two threads each, as ours.
_ENVIRONMENT = {"TRUST_REMOTE_CODE": "1", "OMP_NUM_THREADS": "2"}
_LEFT_OUT = {"SPADE-fast": "there is no such package on PyPI"}


class Job(NamedTuple):
    """A command that takes the folder of the set, the folder for what it makes, and a file for what it finds."""

    command: tuple[str, ...]
    precision: str = ""

    def run(self, data: Path, made: Path, out: Path) -> tuple[ProcessCost, dict[str, Any]]:
        """Run it; what it cost and what it found."""
        extra = {**_ENVIRONMENT, "PRECISION": self.precision}
        cost = run_alone((*self.command, data, made, out), extra=extra)
        with np.load(out) as file:
            return cost, {name: file[name] for name in file}


def peers(places: Places) -> Iterator[Row]:
    """Seconds to fit, milliseconds a picture, memory, size of the environment, and quality."""
    for name, reason in _LEFT_OUT.items():
        yield {"peer": name, **no_row(reason)}
    if places.peers_python is None:
        yield {"peer": PEER, **no_row("no environment that has it was named: --peers-python")}
        return
    dataset, made = places.dataset("mvtec_bottle"), places.scratch / "peers"
    made.mkdir(parents=True, exist_ok=True)
    (made / "paths.json").write_text(json.dumps([str(record.path) for record in dataset.test]))
    own, peer = (sys.executable, "-m", _MODULE), (places.peers_python, str(_SCRIPT))

    def run(job: Job) -> tuple[ProcessCost, dict[str, Any]]:
        return job.run(dataset.root, made, made / "found.npz")

    def refit(job: Job) -> tuple[ProcessCost, dict[str, Any]]:
        for path in made.glob("own.bank" if job.command[0] == own[0] else "[Pw]*"):
            shutil.rmtree(path)
        return run(job)

    fits = {OWN: Job((*own, "fit")), PEER: Job((*peer, "fit"))}
    for name, fitted in in_turn({name: partial(refit, job) for name, job in fits.items()}, FITS, warm_up=0).items():
        yield {"peer": name, "job": "fit", **_processes(fitted), "fit_s": spread([float(of["fit_s"]) for _, of in fitted])}
    jobs = {
        BASE: Job((*own, "onnxruntime")),
        f"{OWN}, openvino": Job((*own, "openvino")),
        f"{PEER}, torch": Job((*peer, "torch")),
        f"{PEER}, openvino float32": Job((*peer, "openvino"), "f32"),
        f"{PEER}, openvino as it is": Job((*peer, "openvino")),
    }
    found = in_turn({name: partial(run, job) for name, job in jobs.items()}, JOBS, warm_up=0)
    latency = {name: [percentiles(of["latency_s"])["p50"] for _, of in runs] for name, runs in found.items()}
    folder = {name: [1000 * float(of["folder_s"]) / len(dataset.test) for _, of in runs] for name, runs in found.items()}
    masks, defective = _truth(dataset)
    for name, runs in found.items():
        last = runs[-1][1]
        pixel = localization_metrics(masks, last["maps"])
        yield {
            "peer": name,
            "job": "score",
            "version": str(last["version"]),
            **_processes(runs),
            "open_s": spread([float(of["open_s"]) for _, of in runs]),
            "ms_one": spread(latency[name]),
            "ms_folder": spread(folder[name]),
            "times_own_one": ratio(latency[name], latency[BASE]),
            "times_own_folder": ratio(folder[name], folder[BASE]),
            "image_auroc": detection_metrics(defective, last["score"]).auroc,
            "pixel_auroc": pixel.auroc,
            "aupro": pixel.aupro,
        }
    prefix = Path(places.peers_python).parents[1]
    yield {"peer": PEER, "job": "environment", "bytes": folder_bytes(prefix)}


def _processes(runs: list[tuple[ProcessCost, dict[str, Any]]]) -> Row:
    return {"process": spreads([cost for cost, _ in runs])}


def _truth(dataset: Dataset) -> tuple[Any, Any]:
    """The masks at the size of the network's input, and which pictures are defective."""
    masks = []
    for record in dataset.test:
        placement = load_image(record, Preprocess()).placement
        masks.append(np.zeros(placement.valid.shape, np.bool_) if record.mask is None else to_mask(record.mask, placement))
    return np.stack(masks), np.array([bool(record.defective) for record in dataset.test])
