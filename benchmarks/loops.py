"""Searches a gallery as others do: by the published loop, by an index rebuilt for every image, and by plain calls of FAISS."""

from __future__ import annotations

import time

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.distances import import_faiss

# So many chunks of the published loop are measured; the rest is extrapolated.
MEASURED_CHUNKS = 2
# SPADE-pytorch compares so many gallery rows at a time.
_CHUNK = 100
_LOW_THRESHOLD = 1000


def published(xq: FloatArray, xb: FloatArray, chunks: int | None = None) -> tuple[FloatArray, float]:
    """Search as SPADE-pytorch does: compute the distances of all queries to one chunk of the gallery after the other.

    Args:
        xq: queries, (nq, d).
        xb: the gallery, (nb, d).
        chunks: how many chunks to search; None for all.

    Returns:
        The smallest distances (nq,) to what was searched, and the seconds, extrapolated to the whole gallery.
    """
    import torch

    query, gallery = torch.from_numpy(xq).T.contiguous()[None], torch.from_numpy(xb)[..., None]
    nearest = torch.full((len(xq),), torch.inf)
    stop = len(xb) if chunks is None else min(len(xb), chunks * _CHUNK)
    start = time.perf_counter()
    for first in range(0, stop, _CHUNK):
        dist = torch.linalg.vector_norm(gallery[first : min(stop, first + _CHUNK)] - query, dim=1)
        nearest = torch.minimum(nearest, dist.amin(dim=0))
    return nearest.numpy(), (time.perf_counter() - start) * len(xb) / stop


def rebuilt(xq: FloatArray, xb: FloatArray) -> tuple[FloatArray, IntArray]:
    """Make an `IndexFlatL2` for the gallery of one image, and search it once."""
    index = import_faiss().IndexFlatL2(xb.shape[1])
    index.add(xb)
    D, I = index.search(xq, 1)
    return D, I


def knn_low_threshold(xq: FloatArray, xb: FloatArray) -> None:
    """Search by `faiss.knn` with a lower threshold, above which it uses matrix products."""
    faiss = import_faiss()
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = _LOW_THRESHOLD
    try:
        faiss.knn(xq, xb, 1)
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
