"""A writer that is killed leaves what was committed, and the same command again makes the same bank."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.bank.bank import Bank
from spade_faiss.core.settings import Caching
from spade_faiss.decisions.calibration import stored_calibrations
from spade_faiss.storage.cache import use_cache
from tests.support.killed_uploads import fit_tiny
from tests.support.object_storage import Server, clean_environment
from tests.support.pictures import write_dataset

# About how many requests a run makes.
REQUESTS = 40
SEED = 20


def content(bank: str | Path) -> dict[str, Any]:
    """What is in a bank, apart from names and times."""
    opened = Bank.open(bank)
    return {
        "shards": [shard.sha256 for shard in opened.manifest.shards],
        "ids": opened.ids,
        "statistics": [calibration.statistics.tolist() for calibration in stored_calibrations(opened)],
        "usual": opened.usual,
    }


def kill_and_repeat(server: Server, bucket: str, tmp_path: Path, kills: int) -> None:
    pictures = tmp_path / "weave"
    write_dataset(pictures)
    good = pictures / "train" / "good"
    fit_tiny(good, tmp_path / "here.bank")
    expected = content(tmp_path / "here.bank")
    assert len(expected["shards"]) > 3
    assert expected["statistics"]
    draw = random.Random(SEED)
    runs = []
    for number in range(kills):
        # One in three is killed again while it goes on.
        for again in range(1 + (number % 3 == 2)):
            at = 1 + (number * REQUESTS // kills if not again else draw.randrange(3, 12))
            runs.append(f"kill-{number}:{at}:{draw.choice(('before', 'after'))}")
        runs.append(f"kill-{number}:0:never")
    words = [sys.executable, "-m", "tests.support.killed_uploads", str(tmp_path), str(good), bucket, *runs]
    done = subprocess.run(
        words, env=clean_environment() | server.environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    codes = [code for code, _ in found]
    assert set(codes) == {-9, 0}, done.stderr
    assert codes.count(-9) >= kills - 1  # a run that goes on may make fewer requests
    for number in range(kills):
        use_cache(Caching(cache=str(tmp_path / "elsewhere")))
        assert content(f"{bucket}/kill-{number}") == expected, number


@pytest.mark.slow
def test_a_killed_fit_is_repeated(bucket: str, server: Server, tmp_path: Path) -> None:
    kill_and_repeat(server, bucket, tmp_path, kills=5)
