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
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.datasets import Dataset
from spade_faiss.features.pictures import load_image, to_mask
from spade_faiss.scoring.metrics import detection_metrics, localization_metrics

OWN, PEER = "spade_faiss", "anomalib PatchCore"
BASE = f"{OWN}, onnxruntime"
_MODULE = "benchmarks.deployment.own_child"
_SCRIPT = Path(__file__).with_name("peer_child.py")
# anomalib loads what it has written by pickle only if this is set. Two threads each, as ours.
_ENVIRONMENT = {"TRUST_REMOTE_CODE": "1", "OMP_NUM_THREADS": "2"}
_NO_PEER = "no environment that has it was named: --peers-python"
_LEFT_OUT = {"SPADE-fast": "there is no such package on PyPI"}


class Job(NamedTuple):
    """A command that takes the folder of the set, the folder for what it makes, and a file for what it finds."""

    command: tuple[str, ...]
    precision: str = ""

    def run(self, data: Path, made: Path) -> tuple[ProcessCost, dict[str, Any]]:
        """Run it; what it cost and what it found."""
        out = made / "found.npz"
        extra = {**_ENVIRONMENT, "PRECISION": self.precision}
        cost = run_alone((*self.command, data, made, out), extra=extra)
        with np.load(out) as file:
            return cost, {name: file[name] for name in file}


def peer_fits(places: Places) -> Iterator[Row]:
    """Seconds to fit, and memory."""
    if places.peers_python is None:
        yield no_row(PEER, _NO_PEER)
        return
    found = in_turn({name: partial(_refit, job, places) for name, job in _fits(places).items()}, places.repeats, warm_up=0)
    for name, runs in found.items():
        yield {"peer": name, **_processes(runs), "fit_s": spread([float(of["fit_s"]) for _, of in runs])}


def peers(places: Places) -> Iterator[Row]:
    """Milliseconds a picture, memory, size of the environment, and quality; what is not fitted yet is fitted first."""
    for name, reason in _LEFT_OUT.items():
        yield no_row(name, reason)
    if places.peers_python is None:
        yield no_row(PEER, _NO_PEER)
        return
    dataset, made = places.dataset("mvtec_bottle"), _made(places)
    for name, job in _fits(places).items():
        if not _is_fitted(made, name):
            _refit(job, places)
    own, peer = (sys.executable, "-m", _MODULE), (places.peers_python, str(_SCRIPT))
    jobs = {
        BASE: Job((*own, "onnxruntime")),
        f"{OWN}, openvino": Job((*own, "openvino")),
        f"{PEER}, torch": Job((*peer, "torch")),
        f"{PEER}, openvino float32": Job((*peer, "openvino"), "f32"),
        f"{PEER}, openvino as it is": Job((*peer, "openvino")),
    }
    found = in_turn({name: partial(job.run, dataset.root, made) for name, job in jobs.items()}, places.repeats, warm_up=0)
    latency = {name: [percentiles(of["latency_s"])["p50"] for _, of in runs] for name, runs in found.items()}
    folder = {name: [1000 * float(of["folder_s"]) / len(dataset.test) for _, of in runs] for name, runs in found.items()}
    masks, defective = _truth(dataset)
    for name, runs in found.items():
        last = runs[-1][1]
        pixel = localization_metrics(masks, last["maps"])
        yield {
            "peer": name,
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
    yield {"peer": PEER, "environment_bytes": folder_bytes(prefix)}


def _made(places: Places) -> Path:
    """The folder for what jobs make, with the list of the test pictures."""
    made = places.scratch / "peers"
    made.mkdir(parents=True, exist_ok=True)
    paths = [str(record.path) for record in places.dataset("mvtec_bottle").test]
    (made / "paths.json").write_text(json.dumps(paths))
    return made


def _fits(places: Places) -> dict[str, Job]:
    assert places.peers_python is not None
    own, peer = (sys.executable, "-m", _MODULE, "fit"), (places.peers_python, str(_SCRIPT), "fit")
    return {OWN: Job(own), PEER: Job(peer)}


def _is_fitted(made: Path, name: str) -> bool:
    return (made / "own.bank").is_dir() if name == OWN else any(made.rglob("model.xml"))


def _refit(job: Job, places: Places) -> tuple[ProcessCost, dict[str, Any]]:
    """Fit from the beginning."""
    made = _made(places)
    for path in made.glob("own.bank" if _MODULE in job.command else "[!o]*/"):
        shutil.rmtree(path)
    return job.run(places.dataset("mvtec_bottle").root, made)


def _processes(runs: list[tuple[ProcessCost, dict[str, Any]]]) -> Row:
    return {"process": spreads([cost for cost, _ in runs])}


def _truth(dataset: Dataset) -> tuple[Any, Any]:
    """The masks at the size of the network's input, and which pictures are defective."""
    masks = []
    for record in dataset.test:
        placement = load_image(record, Preprocess()).placement
        masks.append(np.zeros(placement.valid.shape, np.bool_) if record.mask is None else to_mask(record.mask, placement))
    return np.stack(masks), np.array([bool(record.defective) for record in dataset.test])
