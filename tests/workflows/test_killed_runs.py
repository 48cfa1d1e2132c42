"""Runs that are killed at random instants: the folder of the results always shows one run, and all of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killed_runs import KILLS


@pytest.mark.slow
def test_a_folder_shows_one_run_whenever_its_writer_is_killed(dataset_folder: Path, fitted_bank: Path, tmp_path: Path) -> None:
    """Fault: SIGTERM between scores.h5 and the rest left files of two runs."""
    dataset, folder = tmp_path / "dataset", tmp_path / "folder"
    folder.mkdir()
    for part in ("test/good", "test/spot", "ground_truth/spot"):
        (dataset / part).mkdir(parents=True)
        for path in sorted((dataset_folder / part).iterdir())[:2]:
            shutil.copy(path, dataset / part)
    command = [sys.executable, "-m", "tests.support.killed_runs", folder, fitted_bank, dataset, "0"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert sum(counts[key] for key in ("old run", "new run")) == KILLS >= 100
    for name in ("score", "evaluate"):
        for sent in ("SIGKILL", "SIGTERM"):
            assert counts[f"{name} {sent}"] >= 10
    assert counts["old run"] >= 20
    assert counts["new run"] - counts.get("finished", 0) >= 1, "some were killed after their results were shown"
