"""Processes in which packages cannot be imported, as on a machine where they are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

NO_TORCH = frozenset({"torch", "torchvision", "timm", "onnx", "safetensors"})

_HIDE = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in {missing!r} else found(name, *rest)
"""


def run_without(missing: Collection[str], code: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has all packages but some, in a folder, with arguments."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", _HIDE.format(missing=set(missing)) + code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
