"""Builds the compiled kernel where there is a compiler; without one the package installs and works, and FAISS searches."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
NATIVE = Path("spade_faiss") / "native"


def kernel() -> list[Pybind11Extension]:
    """The extension module. Its instructions are chosen function by function: it is built for any x86-64, by GCC or Clang."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return []
    return [
        Pybind11Extension(
            "spade_faiss._native",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / NATIVE).glob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / NATIVE).glob("*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-g0"],
            optional=True,
        )
    ]


setup(
    packages=[*find_packages(include=["spade_faiss", "spade_faiss.*"]), "spade_faiss.indexes"],
    # The recipes stand at the top level, for people; a wheel carries them inside the package.
    package_dir={"spade_faiss.indexes": "indexes"},
    package_data={
        "spade_faiss": ["py.typed", "*.pyi", "measured.json"],
        "spade_faiss.report": ["*.j2"],
        "spade_faiss.indexes": ["*.yaml"],
    },
    ext_modules=kernel(),
)
