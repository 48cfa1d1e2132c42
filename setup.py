"""Builds the compiled kernel where there is a compiler; without one, the package installs all the same and FAISS searches."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = Path("spade_faiss") / "search" / "native"


def kernel() -> list[Pybind11Extension]:
    """The extension module for any x86-64 processor, by GCC or Clang: its functions name the instructions that they use."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return []
    return [
        Pybind11Extension(
            "spade_faiss.search.native._native",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / NATIVE).glob("src/*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / NATIVE).glob("src/*.hpp")),
            cxx_std=17,
            # Only what is written as a fused multiply-add is one: results must not depend on the compiler.
            extra_compile_args=["-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wextra"],
            optional=True,
        )
    ]


class BuildWithSettings(build_py):
    """Copies recipes and presets, which are at the top level of the repository to be found, into the package of a wheel."""

    def run(self) -> None:
        """Copy the files of the package, the recipes and the presets."""
        super().run()
        for name in ("indexes", "presets") if not self.editable_mode else ():
            folder = Path(self.build_lib) / "spade_faiss" / name
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted((ROOT / name).glob("*.yaml")):
                self.copy_file(str(path), str(folder / path.name))


setup(
    packages=find_packages(include=["spade_faiss", "spade_faiss.*"]),
    package_data={
        "spade_faiss": ["py.typed"],
        "spade_faiss.diagnostics": ["measured.json"],
        "spade_faiss.report": ["*.j2"],
        "spade_faiss.search.native": ["*.pyi"],
        "spade_faiss.serve.history": ["migrations/*.mako"],
        "spade_faiss.serve.web.page": ["templates/*", "static/*"],
    },
    ext_modules=kernel(),
    cmdclass={"build_py": BuildWithSettings},
)
