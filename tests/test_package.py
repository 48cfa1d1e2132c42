"""The package as users get it: public names, and a wheel that works outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import spade_faiss

ROOT = Path(__file__).parent.parent


def test_public_names_import() -> None:
    for name in spade_faiss.__all__:
        assert getattr(spade_faiss, name).__name__ == name
        assert getattr(spade_faiss, name).__doc__
    assert dir(spade_faiss) == spade_faiss.__all__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = spade_faiss.nonsense


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == spade_faiss.__version__
    assert set(project["optional-dependencies"]) == {"cpu", "gpu", "demo", "dev"}


def test_idle_openmp_threads_sleep_unless_the_user_says_otherwise() -> None:
    code = "import os, spade_faiss; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_a_wheel_works_outside_of_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")  # what pip does with a wheel of pure Python
    code = (
        "import spade_faiss.recipe as recipe; from importlib.resources import files; "
        "print(recipe.__file__, recipe.load_recipe('exact').build, recipe.recipe_names(), "
        "(files('spade_faiss.report') / 'report.html.j2').is_file())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "image='Flat'" in done.stdout
    assert "['compact', 'exact', 'history', 'hnsw', 'ivf', 'location'] True" in done.stdout
