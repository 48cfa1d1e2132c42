"""FAISS indexes on CUDA cards: an index that fits is copied there once, any other stays on the CPU."""

from __future__ import annotations

import logging
import threading
from typing import Any

from spade_faiss.core.device import Device
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.gpu_memory import FAISS_BYTES, place_index

_log = logging.getLogger(__name__)

# A row's number, which inverted lists store beside its code.
_ID_BYTES = 8


class CardIndex:
    """An index on cards. Its search takes no selector, because FAISS's GPU build ignores selectors.

    FAISS's resources must be used by one thread at a time, so searches wait for each other.
    """

    def __init__(self, index: Any, resources: list[Any]) -> None:
        self.ntotal: int = index.ntotal
        self._index = index
        self._resources = resources  # they must outlive the index
        self._lock = threading.Lock()

    def search(self, xq: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Search as a FAISS index does."""
        with self._lock:
            D, I = self._index.search(xq, k)
        return D, I


def to_cards(index: Any, device: Device) -> Any:
    """Copy an index to the cards of a device; return it as it is if FAISS cannot use a card, or the index cannot go there.

    Args:
        index: a CPU index whose vectors were added and whose query parameters were set; both are copied with it.
        device: the CPU, one card, or several cards: each then holds a replica, or a part where a replica does not fit.
    """
    faiss = import_faiss()
    if device.kind == "cpu" or index.ntotal == 0:
        return index
    if not hasattr(faiss, "index_cpu_to_gpu") or faiss.get_num_gpus() == 0:
        _log.info("images are searched on the CPU: the FAISS that is installed was built without CUDA, or finds no card")
        return index
    if not faiss.isGpuIndexImplemented(index):
        _log.info("images are searched on the CPU: FAISS has no %s for cards", type(index).__name__)
        return index
    import torch

    free = [torch.cuda.mem_get_info(torch.device(name))[0] for name in device.torch_names]
    place = place_index(index.ntotal * (index.sa_code_size() + _ID_BYTES), free)
    if place == "host":
        _log.info("images are searched on the CPU: the index does not fit beside the blocks on %s", device)
        return index
    resources = []
    for _ in device.cards:
        of_card = faiss.StandardGpuResources()
        of_card.setTempMemory(FAISS_BYTES)
        resources.append(of_card)
    if len(device.cards) == 1:
        options = faiss.GpuClonerOptions()
        options.use_cuvs = False
        return CardIndex(faiss.index_cpu_to_gpu(resources[0], device.cards[0], index, options), resources)
    spread = faiss.GpuMultipleClonerOptions()
    spread.use_cuvs = False
    spread.shard = place == "shards"
    return CardIndex(faiss.index_cpu_to_gpu_multiple_py(resources, index, spread, list(device.cards)), resources)
