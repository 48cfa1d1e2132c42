"""Vectors whose nearest are hard to tell from others, or whose numbers are hard to compute with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def hostile(kind: str, d: int) -> tuple[Floats, Floats]:
    """Queries and rows whose nearest are hard to tell from others, or whose numbers are hard to compute with."""
    rng = np.random.default_rng([len(kind), d])
    xb = rng.normal(size=(203, d)).astype(np.float32)
    xq = xb[rng.permutation(203)[:77]] + np.float32(0.1) * rng.normal(size=(77, d)).astype(np.float32)
    if kind == "near duplicates":
        xb[:] = xb[0] + np.float32(1e-5) * xb
        xq[:] = xb[:77] + np.float32(1e-6) * xq
    elif kind == "huge norms":
        xb, xq = xb * np.float32(1e15), xq * np.float32(1e15)
    elif kind == "an offset":
        xb, xq = xb + np.float32(1e4), xq + np.float32(1e4)
    elif kind == "zeros":
        xb[::2], xq[::3] = 0, 0
    elif kind == "denormals":
        xb, xq = xb * np.float32(1e-40), xq * np.float32(1e-40)
    elif kind == "tiny":
        xb, xq = xb * np.float32(1e-16), xq * np.float32(1e-16)
    elif kind == "constant":
        xb[:], xq[:] = 3, 3.001
    elif kind == "an outlier":
        xb[101, 0], xq[5, d - 1] = 1e6, 1e6
    elif kind == "outliers of every scale":
        xb *= np.float32(10) ** rng.integers(-6, 7, (203, 1)).astype(np.float32)
    elif kind == "sparse":
        xb[rng.random(xb.shape) < 0.95] = 0
        xq[rng.random(xq.shape) < 0.95] = 0
    else:
        assert kind == "white"
        xq = np.asarray(rng.normal(size=xq.shape), np.float32)
    return xq, xb


KINDS = ["near duplicates", "huge norms", "an offset", "zeros", "denormals", "tiny", "constant", "an outlier"]
KINDS += ["outliers of every scale", "sparse", "white"]
