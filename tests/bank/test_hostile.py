"""Banks that somebody tampered with on purpose: no command changes a file outside, raises, hangs, or takes much memory.

Faults of the list "Banks from somebody else": every command is run on hundreds of banks, see `tests.support.attacks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each attack runs in a process of its own")

SEED = 20
# The attacks are divided between so many processes, each on a bank of another store.
STORES = ("float16", "int4")
AT_LEAST = 200
# Every third attack is run here; `python -m tests.support.attacks FOLDER STORE SEED 0 1` runs all of them, in some 20 minutes.
SHARE = 3
QUICK = 3

REPOSITORY = Path(__file__).parents[2]


def run(folder: Path, store: str, first: int, step: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.attacks", str(folder), store, str(SEED), str(first), str(step)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )


def results_of(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, _ = process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def check(results: list[dict[str, Any]]) -> None:
    honest = [result for result in results if result["attack"] == "none"]
    assert honest
    for result in honest:
        assert not result["wrong"], result["wrong"]
        assert not result["refused"], result["said"]
    wrong = [f"{result['attack']}: {problem}" for result in results for problem in result["wrong"]]
    assert not wrong, "\n".join(wrong)
    for result in results:
        what = result["attack"]
        # What lies in the place of a leftover meets those alone who clear leftovers away.
        if what.startswith(("a link", "a pipe", "a socket")) and not what.endswith(".tmp"):
            # By name, and by every command.
            assert len(result["refused"]) == len(honest[0]["said"]), result
            assert all(" is a" in said for said in result["said"]), result


@pytest.mark.slow
def test_no_attack_leads_out_of_the_bank_or_ends_in_a_traceback(tmp_path: Path) -> None:
    parts = len(STORES)
    processes = [run(tmp_path, store, part * SHARE, parts * SHARE) for part, store in enumerate(STORES)]
    results = [result for process in processes for result in results_of(process)]
    assert len(results) >= AT_LEAST + parts
    check(results)
    refused = sum(bool(result["refused"]) for result in results)
    assert refused > AT_LEAST * 2 // 3, f"only {refused} of {len(results)} attacks were refused"


def test_a_sample_of_the_attacks(tmp_path: Path) -> None:
    total = 670  # about; the sample need not be of this size exactly
    check(results_of(run(tmp_path, "int4", 5, total // QUICK)))
