"""A machine without torch: a bank that carries its network is used there in every way but to make another one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.support.missing import NO_TORCH, run_without

RUN = """
from spade_faiss.cli import main

code = main(sys.argv[1:])
loaded = sorted({unwanted!r} & set(sys.modules))
assert not loaded, loaded
raise SystemExit(code)
"""


def run(
    folder: Path, *words: str, missing: Collection[str] = NO_TORCH, unwanted: Collection[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command without some packages, and check that it loads neither these nor others that are not wanted."""
    return run_without(missing, RUN.format(unwanted={*missing, *unwanted}), folder, *words)


@pytest.fixture
def place(fitted_bank: Path, dataset_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(fitted_bank, tmp_path / "bank")
    shutil.copytree(dataset_folder, tmp_path / "set")
    (tmp_path / "more").mkdir()
    shutil.copy(sorted((dataset_folder / "test/good").iterdir())[0], tmp_path / "more" / "one-more.png")
    return tmp_path


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_pictures_are_scored(place: Path, engine: str) -> None:
    other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[engine]
    done = run(place, "score", "set/test/good", "--bank", "bank", "--out", "results", "--quiet", missing=NO_TORCH | {other})
    assert done.returncode == 0, done.stderr
    assert (place / "results" / "report.html").is_file()


def test_one_picture_takes_no_more_than_it_needs(place: Path) -> None:
    picture = sorted((place / "set/test/good").iterdir())[0]
    unwanted = {
        "matplotlib",
        "scipy",
        "sklearn",
        "importlib.metadata",
        "ray",
        "spade_faiss.cluster.pieces",
        "imagecodecs",
        "tifffile",
        "openvino",
    }
    done = run(place, "score", str(picture), "--bank", "bank", "--out", "results", "--quiet", unwanted=unwanted)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "set", "--bank", "bank", "--out", "results"),
        ("add", "more", "--bank", "bank"),
        ("calibrate", "bank"),
        ("index", "bank", "--recipe", "ivf"),
        ("suspects", "bank", "--out", "suspects"),
        ("info", "bank"),
        ("verify", "bank", "--deep"),
        ("doctor", "--device", "cpu", "--bank", "bank"),
    ],
    ids=lambda words: words[0],
)
def test_everything_else_goes_on(place: Path, words: tuple[str, ...]) -> None:
    done = run(place, *words, "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_needs_torch_says_how_to_get_it(place: Path) -> None:
    done = run(
        place, "fit", "set/train/good", "--bank", "new", "--backbone", "efficientnet_lite0", "--preset", "spade", "--quiet"
    )
    assert done.returncode == 1
    assert "torch, which is not installed: pip install 'spade-faiss[torch]'" in done.stderr
    assert "pip install 'spade-faiss[edge]'" in done.stderr
    done = run(place, "score", "set/test/good", "--bank", "bank", "--out", "results", "--engine", "torch", "--quiet")
    assert done.returncode == 1
    assert "engine='torch' is not installed; install it with: pip install 'spade-faiss[torch]'" in done.stderr


def test_without_any_engine_the_error_names_them(place: Path) -> None:
    everything = NO_TORCH | {"onnxruntime", "openvino"}
    done = run(place, "score", "set/test/good", "--bank", "bank", "--out", "results", "--quiet", missing=everything)
    assert done.returncode == 1
    assert "onnxruntime or openvino: pip install 'spade-faiss[edge]'" in done.stderr
