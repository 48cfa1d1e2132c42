"""A FAISS-backed anomaly search engine: SPADE over banks of normal images."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spade_faiss.backbone import Backbone, load_backbone
    from spade_faiss.bank import Bank
    from spade_faiss.calibrating import calibrate
    from spade_faiss.config import Preprocess, Source
    from spade_faiss.detector import Detector
    from spade_faiss.diagnosis import doctor
    from spade_faiss.drifting import drift
    from spade_faiss.errors import SpadeError
    from spade_faiss.evaluation import evaluate, score_to
    from spade_faiss.extract import add
    from spade_faiss.features import FeatureBatch, Level
    from spade_faiss.fitting import fit
    from spade_faiss.index_build import update_indexes
    from spade_faiss.leave_one_out import suspects
    from spade_faiss.scoring import Scores
    from spade_faiss.verification import verify

__version__ = "0.1.0"

# torch and FAISS each bring a pool of OpenMP threads. Idle threads of the one that spin take the cores from the other; this
# makes them sleep. It counts only before the first of the two is imported, and never overrides what the user has set.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _best_blas_kernels() -> str | None:
    """OpenBLAS's name for the kernels that this processor can run, where Linux tells what it can do."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            can = set(file.read(1 << 13).split())
    except OSError:
        return None
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= can:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= can else None


# The OpenBLAS in FAISS's wheels takes a processor that is newer than itself for a very old one: AMD's Zen 5 gets the kernels of
# 2007, a fraction of its speed. What the user has set is left alone.
if _kernels := _best_blas_kernels():
    os.environ.setdefault("OPENBLAS_CORETYPE", _kernels)

# Where each public name lives; imported at first use, so that `spade-faiss --help` loads neither torch nor FAISS.
_HOMES = {
    "Backbone": "backbone",
    "Bank": "bank",
    "Detector": "detector",
    "FeatureBatch": "features",
    "Level": "features",
    "Preprocess": "config",
    "Scores": "scoring",
    "Source": "config",
    "SpadeError": "errors",
    "add": "extract",
    "calibrate": "calibrating",
    "drift": "drifting",
    "doctor": "diagnosis",
    "evaluate": "evaluation",
    "fit": "fitting",
    "load_backbone": "backbone",
    "score_to": "evaluation",
    "suspects": "leave_one_out",
    "update_indexes": "index_build",
    "verify": "verification",
}

__all__ = [
    "Backbone",
    "Bank",
    "Detector",
    "FeatureBatch",
    "Level",
    "Preprocess",
    "Scores",
    "Source",
    "SpadeError",
    "add",
    "calibrate",
    "doctor",
    "drift",
    "evaluate",
    "fit",
    "load_backbone",
    "score_to",
    "suspects",
    "update_indexes",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
