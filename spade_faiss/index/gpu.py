"""FAISS indexes on a CUDA card: an index that fits is copied there once, any other stays on the CPU."""

from __future__ import annotations

import logging
import threading
from typing import Any

from spade_faiss.core.device import Device
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.gpu_memory import FAISS_BYTES, index_fits

_log = logging.getLogger(__name__)

# A row's number, which inverted lists store beside its code.
_ID_BYTES = 8


class CardIndex:
    """An index on a card. Its search takes no selector, because FAISS's GPU build ignores selectors.

    FAISS's resources must be used by one thread at a time, so searches wait for each other.
    """

    def __init__(self, index: Any, resources: Any) -> None:
        self.ntotal: int = index.ntotal
        self._index = index
        self._resources = resources  # they must outlive the index
        self._lock = threading.Lock()

    def search(self, xq: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Search as a FAISS index does."""
        with self._lock:
            D, I = self._index.search(xq, k)
        return D, I


def to_card(index: Any, device: Device) -> Any:
    """Copy an index to the card of a device; return it as it is if FAISS cannot use a card, or the index cannot go there.

    Args:
        index: a CPU index whose vectors were added and whose query parameters were set; both are copied with it.
        device: the CPU, or a card.
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

    free, _ = torch.cuda.mem_get_info(device.card)
    if not index_fits(index.ntotal * (index.sa_code_size() + _ID_BYTES), free):
        _log.info("images are searched on the CPU: the index does not fit beside the blocks on %s", device)
        return index
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(FAISS_BYTES)
    options = faiss.GpuClonerOptions()
    options.use_cuvs = False
    return CardIndex(faiss.index_cpu_to_gpu(resources, device.card, index, options), resources)
