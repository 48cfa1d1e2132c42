"""Runs spade_faiss on pictures in a process of its own, as `peer_child` runs a peer.

Its arguments are the step (`fit`, or the engine that scores), the folder of the set, a folder for what it makes, and where to
write what it found (.npz).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss import Detector, Extraction, Run, fit, score_folder
from spade_faiss._version import __version__


def main() -> None:
    """Run the step."""
    step, data, made, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    found = _fit(data, made) if step == "fit" else _score(step, made)
    np.savez(out, version=__version__, **found)


def _fit(data: Path, made: Path) -> dict[str, Any]:
    start = time.perf_counter()
    done = fit(data / "train" / "good", bank=made / "own.bank", extraction=Extraction(backbone="efficientnet_lite0"))
    return {"fit_s": time.perf_counter() - start, "vectors": sum(v.height * v.width for v in done.bank.layout.levels)}


def _score(engine: str, made: Path) -> dict[str, Any]:
    paths = json.loads((made / "paths.json").read_bytes())
    start = time.perf_counter()
    detector = Detector.open(made / "own.bank", run=Run(engine=engine))
    detector.score(paths[0])
    open_s = time.perf_counter() - start
    latency, scores, maps = [], [], []
    for path in paths:
        begun = time.perf_counter()
        found = detector.score(path)
        latency.append(time.perf_counter() - begun)
        scores.append(found.image_scores[detector.method.score])
        maps.append(found.maps)
    start = time.perf_counter()
    score_folder(paths, bank=detector, out=made / "own")
    return {
        "open_s": open_s,
        "latency_s": np.array(latency),
        "folder_s": time.perf_counter() - start,
        "score": np.concatenate(scores),
        "maps": np.concatenate(maps),
    }


if __name__ == "__main__":
    main()
