"""A FAISS-backed anomaly search engine: SPADE over banks of normal images."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from spade_faiss._version import __version__ as __version__
from spade_faiss.core import process as _process  # now, so that it can tell a fork of this process later

if TYPE_CHECKING:
    from spade_faiss.bank.bank import Bank
    from spade_faiss.core.errors import (
        BankError,
        ClusterError,
        DependencyError,
        InputError,
        NotFoundError,
        SpadeError,
        StorageError,
    )
    from spade_faiss.core.extraction import Extraction, Preprocess, Source
    from spade_faiss.core.presets import Preset, load_preset
    from spade_faiss.core.roi import Roi
    from spade_faiss.core.settings import Caching, Decision, Method, ReportOptions, Run, Tuning
    from spade_faiss.decisions.calibration import Calibration
    from spade_faiss.diagnostics.doctor import doctor
    from spade_faiss.diagnostics.recommend import recommend
    from spade_faiss.diagnostics.workload import Workload
    from spade_faiss.features.backbone import Backbone
    from spade_faiss.features.batch import FeatureBatch, Level
    from spade_faiss.features.layout import Layout
    from spade_faiss.features.loading import load_backbone
    from spade_faiss.features.network import Network
    from spade_faiss.index.build import build_index, update_indexes
    from spade_faiss.report.results import Results
    from spade_faiss.scoring.detector import Detector
    from spade_faiss.scoring.scores import Scores
    from spade_faiss.search.recipe import Recipe, load_recipe
    from spade_faiss.storage.cache import use_cache
    from spade_faiss.workflows.calibrate import calibrate, calibrate_products
    from spade_faiss.workflows.convert import convert
    from spade_faiss.workflows.drift import drift, drift_of_products
    from spade_faiss.workflows.evaluate import evaluate
    from spade_faiss.workflows.extract import add, extract
    from spade_faiss.workflows.fit import fit
    from spade_faiss.workflows.score import score_folder
    from spade_faiss.workflows.suspects import suspects
    from spade_faiss.workflows.tune import tune
    from spade_faiss.workflows.verify import verify


# torch and FAISS each bring a pool of OpenMP threads. Idle threads of the one that spin take the cores from the other; this
# makes them sleep. It counts only before the first of the two is imported, and never overrides what the user has set.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The same for the threads of OpenBLAS, in NumPy and in FAISS: they sleep after 2 ** 20 cycles without work, half a millisecond,
# where 2 ** 26 are the default: the two that start when NumPy is imported would take most of what a single picture costs.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")


def _best_blas_kernels() -> str | None:
    """OpenBLAS's name for the kernels that this processor can run, where Linux tells what it can do."""
    can = _process.processor_flags()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= can:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= can else None


# The OpenBLAS in FAISS's wheels takes a processor that is newer than itself for a very old one: AMD's Zen 5 gets the kernels of
# 2007, a fraction of its speed. What the user has set is left alone.
if _kernels := _best_blas_kernels():
    os.environ.setdefault("OPENBLAS_CORETYPE", _kernels)

# Where each public name lives; imported at first use, so that `spade-faiss --help` loads neither torch nor FAISS.
_HOMES = {
    "Backbone": "features.backbone",
    "Bank": "bank.bank",
    "BankError": "core.errors",
    "Caching": "core.settings",
    "Calibration": "decisions.calibration",
    "ClusterError": "core.errors",
    "Decision": "core.settings",
    "DependencyError": "core.errors",
    "Detector": "scoring.detector",
    "Extraction": "core.extraction",
    "FeatureBatch": "features.batch",
    "InputError": "core.errors",
    "Layout": "features.layout",
    "Level": "features.batch",
    "Method": "core.settings",
    "Network": "features.network",
    "NotFoundError": "core.errors",
    "Preprocess": "core.extraction",
    "Preset": "core.presets",
    "Recipe": "search.recipe",
    "ReportOptions": "core.settings",
    "Results": "report.results",
    "Roi": "core.roi",
    "Run": "core.settings",
    "Scores": "scoring.scores",
    "Source": "core.extraction",
    "SpadeError": "core.errors",
    "StorageError": "core.errors",
    "Tuning": "core.settings",
    "Workload": "diagnostics.workload",
    "add": "workflows.extract",
    "build_index": "index.build",
    "calibrate": "workflows.calibrate",
    "calibrate_products": "workflows.calibrate",
    "convert": "workflows.convert",
    "doctor": "diagnostics.doctor",
    "drift": "workflows.drift",
    "drift_of_products": "workflows.drift",
    "evaluate": "workflows.evaluate",
    "extract": "workflows.extract",
    "fit": "workflows.fit",
    "load_backbone": "features.loading",
    "load_preset": "core.presets",
    "load_recipe": "search.recipe",
    "recommend": "diagnostics.recommend",
    "score_folder": "workflows.score",
    "suspects": "workflows.suspects",
    "tune": "workflows.tune",
    "update_indexes": "index.build",
    "use_cache": "storage.cache",
    "verify": "workflows.verify",
}

__all__ = [
    "Backbone",
    "Bank",
    "BankError",
    "Caching",
    "Calibration",
    "ClusterError",
    "Decision",
    "DependencyError",
    "Detector",
    "Extraction",
    "FeatureBatch",
    "InputError",
    "Layout",
    "Level",
    "Method",
    "Network",
    "NotFoundError",
    "Preprocess",
    "Preset",
    "Recipe",
    "ReportOptions",
    "Results",
    "Roi",
    "Run",
    "Scores",
    "Source",
    "SpadeError",
    "StorageError",
    "Tuning",
    "Workload",
    "add",
    "build_index",
    "calibrate",
    "calibrate_products",
    "convert",
    "doctor",
    "drift",
    "drift_of_products",
    "evaluate",
    "extract",
    "fit",
    "load_backbone",
    "load_preset",
    "load_recipe",
    "recommend",
    "score_folder",
    "suspects",
    "tune",
    "update_indexes",
    "use_cache",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
