"""Products that nominate candidates on a device, by torch or by FAISS's GPU build; distances are evaluated elsewhere."""

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

# Rows that share one minimum: candidates are whole groups. Neighboring locations are alike, so that a vector's rivals stand in
# its own group.
GROUP = 8
# How many times as many groups are nominated where those before did not settle it.
_MORE = 8
# A product's rounding, see `distances.rounding_of`, without its upper limit: a GPU may sum one channel after the other.
_ROUNDING = 1e-7
# What float32 may lose of the lengths that bound a rounded product's error.
_OF_BOUNDS = 1 + 1e-5
# The most neighbors that FAISS's GPU search lists.
_MOST_LISTED = 2048


class Nominations(NamedTuple):
    """What a product says of queries and a block.

    Attributes:
        nearest: (nq,) a squared distance that no vector of the block is below, rounding apart.
        candidates: nominates candidates. Its arguments are which queries (m,), and how often they were nominated for already:
            each time it nominates more, in the end all. It returns locations in the block (m, some), -1 for none, and (m,) the
            squared distance that every other location is at least at, rounding apart.
    """

    nearest: Tensor
    candidates: Callable[[Tensor, int], tuple[Tensor, Tensor]]


# Nominates for queries: their vectors less the center (nq, C), their squared norms (nq,), and kappa.
Nominate = Callable[[Tensor, Tensor, int], Nominations]


class Product(Protocol):
    """A way to compute approximate distances to a block, with a known rounding."""

    def rounding(self, channels: int) -> float:
        """The share of |q|^2 + |x|^2 by which its squared distances may be off."""
        ...

    def prepare(self, xb: Tensor) -> Nominate:
        """Prepare a block's vectors, less the center, (nb, C) float32."""
        ...


@dataclass(frozen=True)
class TorchProduct:
    """The product -2 q x + |x|^2 by torch, and its minima over groups of rows.

    Attributes:
        half: whether numbers are rounded to bfloat16, to q' and x'. What is lost is known, and taken off each group's minimum:
            |q x - q' x'| <= |q - q'| |x| + |q'| |x - x'|.
        margin: the share of that bound that is taken off; less than 1 is for tests, which show that less is not enough.
    """

    half: bool = False
    margin: float = 1.0

    def rounding(self, channels: int) -> float:
        """See `Product`."""
        return _ROUNDING * math.sqrt(channels)

    def prepare(self, xb: Tensor) -> Nominate:
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

        def nominate(q: Tensor, norm: Tensor, kappa: int) -> Nominations:
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

            return Nominations(minima.amin(1) + norm, candidates)

        return nominate

    def _bounds(self, xb: Tensor, groups: int) -> Tensor:
        """(2, groups), twice the largest |x| and |x - x'| of each group: a query's error is at most its product with them."""
        lengths = [x.square().sum(1).sqrt().view(GROUP, groups).amax(0) for x in (xb, xb - xb.bfloat16().float())]
        return torch.stack(lengths) * (2 * _OF_BOUNDS * self.margin)

    def _multiply(self, norms: Tensor, q: Tensor, xb: Tensor) -> Tensor:
        if not self.half:
            return torch.addmm(norms, q, xb.t(), alpha=-2)
        q, xb = q.bfloat16(), xb.bfloat16()
        if q.device.type == "cuda":
            return torch.addmm(norms, q, xb.t(), torch.float32, alpha=-2)
        return torch.addmm(norms, q.float(), xb.float().t(), alpha=-2)  # the same factors, multiplied and summed in float32


class FaissProduct:
    """`faiss.knn_gpu` on vectors that are on the card already: the nearest few are the candidates, then all.

    FAISS needs one StandardGpuResources in each thread. It is called without `faiss.contrib.torch_utils`, which would replace
    functions of FAISS for the whole process.
    """

    # Candidates beyond kappa.
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

    def prepare(self, xb: Tensor) -> Nominate:
        """See `Product`."""

        def nominate(q: Tensor, norm: Tensor, kappa: int) -> Nominations:
            listed = min(kappa + self._SPARE, len(xb), _MOST_LISTED)
            D, I = self._search(q, xb, listed)

            def candidates(which: Tensor, attempt: int) -> tuple[Tensor, Tensor]:
                if attempt == 0 and listed < len(xb):
                    return I[which], D[which, -1]
                every = torch.arange(len(xb), device=xb.device).expand(len(which), -1)
                return every, torch.full_like(D[which, 0], torch.inf)

            return Nominations(D[:, 0], candidates)

        return nominate

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
