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

SEED = 20
# How many requests a run makes, and one that finds all done.
REQUESTS, LEAST = 22, 15


def content(bank: str | Path) -> dict[str, Any]:
    """What is in a bank, apart from names and times."""
    opened = Bank.open(bank)
    return {
        "shards": [shard.sha256 for shard in opened.manifest.shards],
        "ids": opened.ids,
        "statistics": [calibration.statistics.tolist() for calibration in stored_calibrations(opened)],
        "usual": opened.usual,
    }


def chains(kills: int) -> list[list[str]]:
    """Runs, by the bank that they make: each is killed a few times, the first time early or late, and made then."""
    draw, found = random.Random(SEED), list[list[str]]()
    while kills > 0:
        at = [draw.randint(1, REQUESTS), *(draw.randint(1, LEAST) for _ in range(2))][: min(kills, 2 + len(found) % 2)]
        found.append([f"{number}:{draw.choice(('before', 'after'))}" for number in at] + ["0:never"])
        kills -= len(at)
    return found


def kill_and_repeat(server: Server, bucket: str, tmp_path: Path, kills: int) -> None:
    """Kill a `fit` so many times, at seeded requests to the storage, and see that what comes of it is what it always is."""
    pictures = tmp_path / "weave"
    write_dataset(pictures)
    good = pictures / "train" / "good"
    fit_tiny(good, tmp_path / "here.bank")
    expected = content(tmp_path / "here.bank")
    assert len(expected["shards"]) > 3
    assert expected["statistics"]
    runs = [f"kill-{bank}:{run}" for bank, chain in enumerate(chains(kills)) for run in chain]
    words = [sys.executable, "-m", "tests.support.killed_uploads", str(tmp_path), str(good), bucket, *runs]
    done = subprocess.run(
        words, env=clean_environment() | server.environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    codes = [code for code, _ in json.loads(done.stdout.splitlines()[-1])]
    assert set(codes) == {-9, 0}, done.stderr
    assert codes.count(-9) == kills, codes
    use_cache(Caching(cache=str(tmp_path / "elsewhere")))
    for bank in range(len(chains(kills))):
        assert content(f"{bucket}/kill-{bank}") == expected, bank


@pytest.mark.slow
def test_a_killed_fit_is_repeated(bucket: str, server: Server, tmp_path: Path) -> None:
    kill_and_repeat(server, bucket, tmp_path, kills=5)
