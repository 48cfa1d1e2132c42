"""Measures the server, see `SECTIONS`.

    python -m benchmarks.serve --data FOLDER --out benchmarks/results --scratch SCRATCH

FOLDER holds `mvtec_bottle`. Servers run in processes of their own on this machine, clients in this one. A section that ends is
in serve.json; the others stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import spade_faiss  # noqa: F401  # before torch and faiss: idle OpenMP threads sleep only if the first import says so
from benchmarks.process import machine
from benchmarks.serve.cases import cases
from benchmarks.serve.feedback import feedback
from benchmarks.serve.kills import kills
from benchmarks.serve.load import Row, load, memory
from benchmarks.serve.places import Places

SECTIONS: Mapping[str, Callable[[Places], Iterator[Row]]] = {
    "load": load,
    "memory": memory,
    "kills": kills,
    "feedback": feedback,
    "schema": cases,
}


def main() -> None:
    """Measure all sections, or those that --only names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the real sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="where pictures, banks and histories are kept; some 3 GB")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    for name in ("pictures", "requests", "kills", "feedbacks", "cases", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Places, name))
    arguments = parser.parse_args()
    numbers = {name: getattr(arguments, name) for name in ("pictures", "requests", "kills", "feedbacks", "cases", "repeats")}
    places = Places(data=arguments.data.resolve(), scratch=arguments.scratch.resolve(), **numbers)
    places.scratch.mkdir(parents=True, exist_ok=True)
    target = arguments.out / "serve.json"
    for name in arguments.only:
        found: Row = {"machine": machine(), "rows": []}
        for row in SECTIONS[name](places):
            print(name, json.dumps(row)[:2000], flush=True)
            found["rows"].append(row)
        figures = json.loads(target.read_bytes()) if target.exists() else {}
        target.write_text(json.dumps({**figures, name: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
