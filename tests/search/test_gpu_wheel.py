"""What we call of FAISS's GPU build is in the wheel that `spade-faiss[gpu]` installs. `make test-gpu-wheel` downloads it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Where the wheel was unpacked; the makefile says.
WHEEL = os.environ.get("SPADE_FAISS_GPU_WHEEL")
CALLERS = ("spade_faiss/index/gpu.py", "spade_faiss/diagnostics/software.py")

pytestmark = [pytest.mark.gpu_wheel, pytest.mark.skipif(WHEEL is None, reason="make test-gpu-wheel")]


def run(*command: str) -> str:
    path = os.pathsep.join([str(WHEEL), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(run("-m", "tests.support.gpu_wheel"))
    return numbers


def test_it_is_the_gpu_build(found: dict[str, Any]) -> None:
    facts = found["facts"]
    assert Path(facts["file"]).is_relative_to(str(WHEEL))
    assert (facts["version"], facts["flavor"]) == ("1.15.1", "GPU")


def test_every_name_that_we_use_is_there() -> None:
    """Read off our code: whatever stands behind `faiss.`, and what is asked of the module by name."""
    names = set()
    for caller in CALLERS:
        for node in ast.walk(ast.parse((ROOT / caller).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "faiss":
                names.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                if "faiss" not in ast.unparse(node.args[0]):
                    continue
                assert isinstance(node.args[1], ast.Constant)
                names.add(str(node.args[1].value))
    assert {"StandardGpuResources", "index_cpu_to_gpu", "isGpuIndexImplemented"} <= names
    code = f"import faiss; print([name for name in {sorted(names)!r} if not hasattr(faiss, name)])"
    assert run("-c", code).strip() == "[]"


def test_no_option_is_made_up(found: dict[str, Any]) -> None:
    """Python would take any attribute that it is given."""
    options = {
        node.attr
        for node in ast.walk(ast.parse((ROOT / CALLERS[0]).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options"
    }
    assert options == {"use_cuvs"}
    assert options <= set(found["facts"]["options"])


def test_signatures(found: dict[str, Any]) -> None:
    facts = found["facts"]
    assert facts["index_cpu_to_gpu"] == ["provider", "device", "index", "options"]
    assert facts["implemented"] == [True, False]


def test_copying_an_index_ends_at_the_missing_card(found: dict[str, Any]) -> None:
    if found["facts"]["cards"]:
        pytest.skip("there is one")
    assert "Invalid GPU device 0" in found["clone"]
