"""What finds candidates on a device: products by torch, or by FAISS's GPU build. Distances are evaluated elsewhere."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spade_faiss.core.errors import DependencyError
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.gpu_memory import FAISS_BYTES

# Rows of which one minimum is taken: the candidates are whole groups. Neighboring locations are alike, so that a vector's
# rivals stand in its own group.
GROUP = 8
# How many times as many of them are asked for where those did not settle it.
_MORE = 8
# A product's rounding, see `knn.rounding_of`; without its upper limit: a GPU may sum one channel after the other.
_ROUNDING = 1e-7
# What float32 may lose of the lengths that bound a rounded product's error.
_OF_BOUNDS = 1 + 1e-5
# FAISS's GPU search lists no more.
_MOST_LISTED = 2048


class Look(NamedTuple):
    """What a product says of queries and a block.

    Args:
        nearest: (nq,) a squared distance that none is below, rounding apart.
        candidates: given which queries (m,), locations in the block (m, some), -1 for none, and (m,) what every other location
            is at least as far as, rounding apart. Asked again (0, 1, 2 ... times) it names more of them, in the end all.
    """

    nearest: Tensor
    candidates: Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Product(Protocol):
    """A way to find a block's candidates."""

    def rounding(self, channels: int) -> float:
        """The share of |q|^2 + |x|^2 by which its squared distances may be off."""
        ...

    def prepare(self, xb: Tensor) -> Callable[[Tensor, Tensor, int], Look]:
        """Take up a block's centered rows (nb, C) float32; returns how to look at it: queries (nq, C), |q|^2, kappa."""
        ...


@dataclass(frozen=True)
class TorchProduct:
    """-2 q x + |x|^2 by torch, and the minima of groups of rows.

    Args:
        half: of numbers rounded to bfloat16, q' and x'. What is lost is known, and is taken off:
            |q x - q' x'| <= |q - q'| |x| + |q'| |x - x'|, by group.
        margin: how much of that; less than 1 is for tests that show that less does not do.
    """

    half: bool = False
    margin: float = 1.0

    def rounding(self, channels: int) -> float:
        """See `Product`."""
        return _ROUNDING * math.sqrt(channels)

    def prepare(self, xb: Tensor) -> Callable[[Tensor, Tensor, int], Look]:
        """See `Product`."""
        nb, channels = xb.shape
        groups = -(-nb // GROUP)
        # Column j * groups + g is row g * GROUP + j: minima of groups are then of whole columns.
        padded = torch.nn.functional.pad(xb, (0, 0, 0, groups * GROUP - nb))
        spread = padded.view(groups, GROUP, channels).transpose(0, 1).reshape(-1, channels)
        norms = torch.nn.functional.pad(xb.square().sum(1), (0, groups * GROUP - nb), value=torch.inf)
        norms = norms.view(groups, GROUP).t().reshape(1, -1)
        members = torch.arange(GROUP, device=xb.device)
        bounds = self._bounds(spread, groups) if self.half else None

        def look(q: Tensor, norm: Tensor, kappa: int) -> Look:
            minima = self._multiply(norms, q, spread).view(len(q), GROUP, groups).amin(1)
            if bounds is not None:
                left = (q - q.bfloat16().float()).square().sum(1).sqrt()
                minima = torch.addmm(minima, torch.stack([left, norm.sqrt() + left], 1), bounds, alpha=-1)

            def candidates(which: Tensor, attempt: int) -> tuple[Tensor, Tensor]:
                # The kappa nearest stand in as many groups at most; one more for rounding.
                listed = min((kappa + 1) * _MORE**attempt, groups)
                least, found = minima[which].topk(min(listed + 1, groups), largest=False)
                rows = (found[:, :listed, None] * GROUP + members).flatten(1)
                beyond = least[:, listed] + norm[which] if listed < groups else torch.full_like(least[:, 0], torch.inf)
                return rows.where(rows < nb, -1), beyond

            return Look(minima.amin(1) + norm, candidates)

        return look

    def _bounds(self, xb: Tensor, groups: int) -> Tensor:
        """(2, groups), twice the most of |x| and of |x - x'| in each group: what a query's error is a product with."""
        lengths = [x.square().sum(1).sqrt().view(GROUP, groups).amax(0) for x in (xb, xb - xb.bfloat16().float())]
        return torch.stack(lengths) * (2 * _OF_BOUNDS * self.margin)

    def _multiply(self, norms: Tensor, q: Tensor, xb: Tensor) -> Tensor:
        if not self.half:
            return torch.addmm(norms, q, xb.t(), alpha=-2)
        q, xb = q.bfloat16(), xb.bfloat16()
        if q.device.type == "cuda":
            return torch.addmm(norms, q, xb.t(), torch.float32, alpha=-2)
        return torch.addmm(norms, q.float(), xb.float().t(), alpha=-2)  # the same products, summed in float32


class FaissProduct:
    """`faiss.knn_gpu` on what already is on the card: its candidates are the nearest few.

    FAISS asks for one StandardGpuResources in each thread. It is called without `faiss.contrib.torch_utils`, which would
    replace functions of FAISS for the whole process.
    """

    # Beyond kappa.
    _SPARE = 7

    def __init__(self) -> None:
        self._faiss = import_faiss()
        if not hasattr(self._faiss, "StandardGpuResources"):
            raise DependencyError(
                "engine=knn_gpu needs FAISS's GPU build; run: pip uninstall faiss-cpu && pip install 'spade-faiss[gpu]', "
                "or use engine=torch"
            )
        self._of_thread = threading.local()

    def rounding(self, channels: int) -> float:
        """See `Product`."""
        return _ROUNDING * math.sqrt(channels)

    def prepare(self, xb: Tensor) -> Callable[[Tensor, Tensor, int], Look]:
        """See `Product`."""

        def look(q: Tensor, norm: Tensor, kappa: int) -> Look:
            listed = min(kappa + self._SPARE, len(xb), _MOST_LISTED)
            D, I = self._search(q, xb, listed)

            def candidates(which: Tensor, attempt: int) -> tuple[Tensor, Tensor]:
                if attempt == 0 and listed < len(xb):
                    return I[which], D[which, -1]
                every = torch.arange(len(xb), device=xb.device).expand(len(which), -1)
                return every, torch.full_like(D[which, 0], torch.inf)

            return Look(D[:, 0], candidates)

        return look

    def _search(self, q: Tensor, xb: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss, device = self._faiss, xb.device
        card = device.index or 0
        if not hasattr(self._of_thread, "resources"):
            self._of_thread.resources = faiss.StandardGpuResources()
            self._of_thread.resources.setTempMemory(FAISS_BYTES)
        resources = self._of_thread.resources
        D = torch.empty(len(q), k, device=device)
        I = torch.empty(len(q), k, dtype=torch.int64, device=device)
        asked = faiss.GpuDistanceParams()
        asked.metric, asked.k, asked.dims, asked.device = faiss.METRIC_L2, k, q.shape[1], card
        asked.vectors, asked.numVectors = faiss.cast_integer_to_void_ptr(xb.data_ptr()), len(xb)
        asked.queries, asked.numQueries = faiss.cast_integer_to_void_ptr(q.data_ptr()), len(q)
        asked.vectorType = asked.queryType = faiss.DistanceDataType_F32
        asked.vectorsRowMajor = asked.queriesRowMajor = True
        asked.outDistances = faiss.cast_integer_to_float_ptr(D.data_ptr())
        asked.outIndices, asked.outIndicesType = faiss.cast_integer_to_void_ptr(I.data_ptr()), faiss.IndicesDataType_I64
        asked.use_cuvs = False
        stream = faiss.cast_integer_to_cudastream_t(torch.cuda.current_stream(device).cuda_stream)
        resources.setDefaultStream(card, stream)
        try:
            faiss.bfKnn(resources, asked)
        except RuntimeError as error:
            if "out of memory" in str(error) or "alloc" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        return D, I
