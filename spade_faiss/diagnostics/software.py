"""Checks what is installed: versions, the build of FAISS, and the compiled kernel."""

from __future__ import annotations

import importlib.metadata
import platform

from spade_faiss._version import __version__
from spade_faiss.core.device import Device
from spade_faiss.diagnostics.checks import AMBER, GREEN, RED, Check
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.native.extension import INSTALL, SIMD_LEVELS, is_built, usable_simd_level, why_not

_RESULTS_DEPEND_ON = ("torch", "torchvision", "onnxruntime", "openvino", "numpy", "h5py")


def check_versions() -> Check:
    """List the versions of this package and of the libraries whose results it depends on."""
    names = [name for name in _RESULTS_DEPEND_ON if _is_installed(name)]
    numbers = {"spade-faiss": __version__, "python": platform.python_version(), "faiss": import_faiss().__version__}
    numbers |= {name: importlib.metadata.version(name) for name in names}
    return Check(name="versions", state=GREEN, result=", ".join(f"{k} {v}" for k, v in numbers.items()), numbers=numbers)


def check_faiss(device: Device) -> Check:
    """Check that one build of FAISS is installed, and that it suits the device."""
    faiss = import_faiss()
    flavor = wheel_flavor(faiss.get_compile_options(), hasattr(faiss, "StandardGpuResources"))
    installed = [name for name in ("faiss-cpu", "faiss-gpu") if _is_installed(name)]
    numbers = {"flavor": flavor, "simd": faiss.SIMDConfig.get_level_name(), "installed": installed}
    result = f"{flavor} build, {numbers['simd']} ({faiss.get_compile_options().strip()})"
    if len(installed) > 1:
        state, advice = RED, "they overwrite each other: pip uninstall -y faiss-cpu faiss-gpu, then install one of the two"
    elif device.kind == "cuda" and flavor == "CPU":
        state = AMBER
        advice = (
            "the image index stays on the CPU, the gallery search runs on the card; to have both on the card: "
            "pip uninstall -y faiss-cpu && pip install 'spade-faiss[gpu]'"
        )
    elif numbers["simd"] == "NONE":
        state, advice = AMBER, "FAISS found no vector instructions of this processor; searching will be slow"
    else:
        state, advice = GREEN, ""
    return Check(name="faiss", state=state, result=result, advice=advice, numbers=numbers)


def wheel_flavor(compile_options: str, has_gpu: bool) -> str:
    """Name the build of FAISS: `CPU`, `GPU` or `cuVS`.

    Args:
        compile_options: what FAISS says of its build.
        has_gpu: whether it has functions for CUDA cards.
    """
    if "CUVS" in compile_options.upper():
        return "cuVS"
    return "GPU" if "GPU" in compile_options.split() or has_gpu else "CPU"


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_kernel() -> Check:
    """Say which SIMD level the compiled kernel uses, and why it does not use a faster one."""
    reasons = why_not()
    simd_level = usable_simd_level()
    faster = SIMD_LEVELS if simd_level is None else SIMD_LEVELS[: SIMD_LEVELS.index(simd_level)]
    not_here = "; ".join(f"{name}: {reasons[name]}" for name in faster)
    if not is_built():
        state, result = AMBER, "it is not installed: FAISS searches the maps"
        advice = f"exact search is faster with it: {INSTALL}"
    else:
        result = f"the kernel uses {simd_level}" if simd_level else "FAISS searches the maps"
        result += f" (not here: {not_here})" if not_here else ""
        refused = [name for name in faster if reasons[name].startswith("the system")]
        state = AMBER if refused else GREEN
        advice = f"the processor has {', '.join(refused)}, the system or its hypervisor must allow it" if refused else ""
    return Check(
        name="kernel", state=state, result=result, advice=advice, numbers={"simd_level": simd_level, "why_not": reasons}
    )
