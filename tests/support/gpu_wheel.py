"""Runs our lines that call FAISS's GPU functions against the FAISS on the path: a GPU build, on a machine without a card.

Started by test_gpu_wheel.py, with the wheel before everything else on the path; it prints what it found as JSON. Nothing here
runs on a card: what would is taken down, with its arguments, where it leaves Python.
"""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

import numpy as np
import torch

from spade_faiss.core.device import Device
from spade_faiss.diagnostics.software import wheel_flavor
from spade_faiss.index.gpu import to_card

faiss: Any = importlib.import_module("faiss")


def main() -> None:
    """Everything that needs no card."""
    print(json.dumps({"facts": facts(), "clone": clone()}))


def facts() -> dict[str, Any]:
    """What the wheel says of itself."""
    graph = faiss.IndexHNSWFlat(8, 8)
    return {
        "file": faiss.__file__,
        "version": faiss.__version__,
        "flavor": wheel_flavor(faiss.get_compile_options(), hasattr(faiss, "StandardGpuResources")),
        "cards": faiss.get_num_gpus(),
        "simd": faiss.SIMDConfig.get_level_name(),
        "implemented": [bool(faiss.isGpuIndexImplemented(index)) for index in (faiss.IndexFlatL2(8), graph)],
        "index_cpu_to_gpu": list(inspect.signature(faiss.index_cpu_to_gpu).parameters),
        "options": sorted(name for name in dir(faiss.GpuClonerOptions) if not name.startswith("_")),
    }


def clone() -> str:
    """How far our cloning comes: to FAISS's own complaint that there is no such card."""
    faiss.get_num_gpus = lambda: 1
    fakes: Any = torch.cuda
    fakes.mem_get_info = lambda device: (1 << 33, 1 << 33)
    index = faiss.IndexFlatL2(8)
    index.add(np.zeros((5, 8), np.float32))
    try:
        to_card(index, Device("cuda"))
    except RuntimeError as error:
        return str(error)
    return "it was copied"


if __name__ == "__main__":
    main()
