"""Measures what it takes to use a bank where it is needed, see `SECTIONS`.

Run as `python -m benchmarks.deployment --data FOLDER --out benchmarks/results`, FOLDER holding `mvtec_bottle`. What is compared
takes turns, in one process or process by process. --edge-python names an environment that has onnxruntime and openvino and no
torch, --peers-python one that has anomalib; what they are for is left out without them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import spade_faiss  # noqa: F401  # before torch and faiss: idle OpenMP threads sleep only if the first import says so
from benchmarks.deployment.cold import cold, environment
from benchmarks.deployment.decoders import decoders
from benchmarks.deployment.equality import equality
from benchmarks.deployment.fitting import fitting
from benchmarks.deployment.folder import folder
from benchmarks.deployment.measure import REPEATS, Row, load, wait_for_calm
from benchmarks.deployment.passes import passes
from benchmarks.deployment.peers import peer_fits, peers
from benchmarks.deployment.places import Places
from benchmarks.deployment.single import warm
from benchmarks.process import machine

SECTIONS: Mapping[str, Callable[[Places], Iterator[Row]]] = {
    "passes": passes,
    "cold": cold,
    "environment": environment,
    "warm": warm,
    "folder": folder,
    "fitting": fitting,
    "peer_fits": peer_fits,
    "peers": peers,
    "decoders": decoders,
    "equality": equality,
}


def main() -> None:
    """Measure all sections, or those that --only names, and write them to deployment.json; the others stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the real sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edge-python", metavar="PYTHON", help="of an environment without torch")
    parser.add_argument("--peers-python", metavar="PYTHON", help="of an environment that has anomalib")
    parser.add_argument("--scratch", type=Path, help="where banks and environments are kept for the next run; some 9 GB")
    parser.add_argument("--calm-s", type=float, default=90.0, help="how long to wait for a calm machine before each section")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="how often everything is measured")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    arguments = parser.parse_args()
    target = arguments.out / "deployment.json"
    with tempfile.TemporaryDirectory() as temporary:
        places = Places(
            data=arguments.data.resolve(),
            scratch=(arguments.scratch or Path(temporary)).resolve(),
            edge_python=arguments.edge_python,
            peers_python=arguments.peers_python,
            repeats=arguments.repeats,
        )
        places.scratch.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            found: Row = {"machine": machine(), "load_before": wait_for_calm(arguments.calm_s), "rows": []}
            for row in SECTIONS[name](places):
                print(name, json.dumps(row), flush=True)
                found["rows"].append(row)
                # That of what was measured counts in it, too: above the number of cores, others took some of them.
                found["load_after"] = load()
                figures = json.loads(target.read_bytes()) if target.exists() else {}
                target.write_text(json.dumps({**figures, name: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
