"""The package as users get it: public names, and a wheel that works outside of the checkout."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import spade_faiss

ROOT = Path(__file__).parents[2]


def test_public_names_import() -> None:
    for name in spade_faiss.__all__:
        assert getattr(spade_faiss, name).__name__ == name
        assert getattr(spade_faiss, name).__doc__
    assert dir(spade_faiss) == spade_faiss.__all__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = spade_faiss.nonsense


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert version("spade-faiss") == spade_faiss.__version__
    assert set(project["optional-dependencies"]) == {"cpu", "gpu", "demo", "dev"}


def test_idle_openmp_threads_sleep_unless_the_user_says_otherwise() -> None:
    code = "import os, spade_faiss; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_a_wheel_works_outside_of_the_checkout(compiler: bool, tmp_path: Path) -> None:
    """Without a compiler it has no kernel, and works."""
    source, environment = tmp_path / "source", dict(os.environ)
    for name in ("spade_faiss", "indexes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if not compiler:
        environment |= {"CC": "no-compiler", "CXX": "no-compiler"}
    elif shutil.which("g++") is None:
        pytest.skip("there is no g++")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".hpp"))]
        archive.extractall(tmp_path / "site")  # what pip does with a wheel
    # What an editable installation finds in the checkout is not what the wheel holds.
    code = (
        "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]; "
        "import spade_faiss.search.recipe as recipe; import spade_faiss.search.native.extension as kernel; "
        "from importlib.resources import files; "
        "print(recipe.__file__, recipe.load_recipe('exact').build, recipe.recipe_names(), "
        "(files('spade_faiss.report') / 'report.html.j2').is_file(), kernel.is_built())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "image='Flat'" in done.stdout
    built = compiler and platform.machine() in ("x86_64", "AMD64")
    assert f"['compact', 'exact', 'history', 'hnsw', 'ivf', 'location'] True {built}" in done.stdout
