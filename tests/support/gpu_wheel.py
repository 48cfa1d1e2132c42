"""Runs our lines that call FAISS's GPU functions against the FAISS on the path: a GPU build, on a machine without a card.

Started by test_gpu_wheel.py, with the wheel before everything else on the path; it prints what it found as JSON. Nothing here
runs on a card: what would is taken down, with its arguments, where it leaves Python.
"""

from __future__ import annotations

import importlib
import inspect
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from spade_faiss.core.device import Device
from spade_faiss.diagnostics.software import wheel_flavor
from spade_faiss.index.gpu import to_cards
from spade_faiss.search.engines.products import FaissProduct

faiss: Any = importlib.import_module("faiss")


def main() -> None:
    """Everything that needs no card."""
    print(json.dumps({"facts": facts(), "knn_gpu": knn_gpu(), "clone": [clone(cards) for cards in ((0,), (0, 1))]}))


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
        "knn_gpu": list(inspect.signature(faiss.knn_gpu).parameters),
        "index_cpu_to_gpu": list(inspect.signature(faiss.index_cpu_to_gpu).parameters),
        "index_cpu_to_gpu_multiple_py": list(inspect.signature(faiss.index_cpu_to_gpu_multiple_py).parameters),
        "fields": sorted(name for name in dir(faiss.GpuDistanceParams) if not name.startswith("_")),
        "options": {
            kind: sorted(name for name in dir(getattr(faiss, kind)) if not name.startswith("_"))
            for kind in ("GpuClonerOptions", "GpuMultipleClonerOptions")
        },
    }


def knn_gpu() -> dict[str, Any]:
    """What our product asks bfKnn for; SWIG has checked the type of each field by then."""
    seen: dict[str, Any] = {}

    class Resources(faiss.StandardGpuResources):  # type: ignore[misc]
        def setDefaultStream(self, card: int, stream: Any) -> None:
            seen["stream"] = [card, "CUstream" in repr(stream) or "cudaStream" in repr(stream)]

    def record(resources: Any, asked: Any) -> None:
        names = ("k", "dims", "numVectors", "numQueries", "vectorsRowMajor", "queriesRowMajor", "device", "use_cuvs")
        seen.update({name: getattr(asked, name) for name in names})
        seen["types"] = [
            asked.metric == faiss.METRIC_L2,
            asked.vectorType == asked.queryType == faiss.DistanceDataType_F32,
            asked.outIndicesType == faiss.IndicesDataType_I64,
            isinstance(asked, faiss.GpuDistanceParams),
            isinstance(resources, faiss.GpuResourcesProvider),
        ]
        # Where FAISS would read and write.
        places = (asked.vectors, asked.queries, asked.outDistances, asked.outIndices)
        seen["pointers"] = [int(place) for place in places] == [tensor.data_ptr() for tensor in tensors]

    xb, q = torch.zeros(5, 8), torch.zeros(4, 8)
    tensors: list[torch.Tensor] = [xb, q]
    empty = torch.empty

    def noted(*shape: Any, **options: Any) -> torch.Tensor:
        made: torch.Tensor = empty(*shape, **options)
        tensors.append(made)
        return made

    before = faiss.StandardGpuResources, faiss.bfKnn
    fakes: Any = torch
    faiss.StandardGpuResources, faiss.bfKnn, fakes.empty = Resources, record, noted
    fakes.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=4096)  # never followed: nothing runs
    try:
        FaissProduct().prepare(xb)(q, q.square().sum(1), 1)
    finally:
        (faiss.StandardGpuResources, faiss.bfKnn), fakes.empty = before, empty
    return seen


def clone(cards: tuple[int, ...]) -> str:
    """How far our cloning comes: to FAISS's own complaint that there is no such card."""
    faiss.get_num_gpus = lambda: 2
    fakes: Any = torch.cuda
    fakes.mem_get_info = lambda device: (1 << 33, 1 << 33)
    index = faiss.IndexFlatL2(8)
    index.add(np.zeros((5, 8), np.float32))
    try:
        to_cards(index, Device("cuda", cards))
    except RuntimeError as error:
        return str(error)
    return "it was copied"


if __name__ == "__main__":
    main()
