"""Decoding stays within the memory that is allowed: images wait for each other, and one that is too large is left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from spade_faiss import Backbone, Detector
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.settings import Run
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.memory import MemoryGate
from spade_faiss.features.pictures import load_bytes
from spade_faiss.scoring.memory import DECODE_BYTES
from tests.support.image_files import noise, save


def test_threads_together_stay_within_the_limit() -> None:
    gate, lock, held, most = MemoryGate(10), threading.Lock(), [0], [0]

    def work(count: int) -> None:
        with gate.hold(count):
            with lock:
                held[0] += count
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= count

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 5, 10, 1, 2, 7] * 5))
    assert 7 < most[0] <= 10


def test_what_fails_gives_its_memory_back() -> None:
    gate = MemoryGate(10)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gate.hold(10):
            _ = 1 / 0
    with gate.hold(10):
        pass
    with pytest.raises(InputError, match="decoding it takes 11 B of memory, and 10 B are left for that"), gate.hold(11):
        pass


def test_the_cost_of_an_image_counts_its_file_its_pixels_and_its_turning(tmp_path: Path) -> None:
    def cost(path: Path) -> int:
        return load_bytes(ImageRecord(path.name, path), Preprocess()) - path.stat().st_size

    plain = cost(save(Image.new("RGB", (2000, 1000)), tmp_path / "a.png"))
    assert 4 * 2_000_000 < plain < 6 * 2_000_000
    exif = Image.Exif()
    exif[0x0112] = 6
    assert cost(save(Image.new("RGB", (2000, 1000)), tmp_path / "b.png", exif=exif)) > 1.7 * plain
    assert cost(save(Image.new("L", (2000, 1000)), tmp_path / "c.png")) > plain
    with pytest.raises(InputError, match=r"gone\.png.*No such file"):
        cost(tmp_path / "gone.png")


def test_an_image_that_takes_too_much_is_skipped_and_the_others_are_scored(
    tmp_path: Path, fitted_bank: Path, backbone: Backbone
) -> None:
    """The list of faults: 81 megapixels with a small --memory went 530 MiB over it."""
    usual = Detector.open(fitted_bank, backbone=backbone)
    least = usual._working_bytes(1)
    small = Detector.open(fitted_bank, backbone=backbone, run=Run(memory=least))
    assert small.decode_bytes == DECODE_BYTES
    for i in range(3):
        save(noise(90, 80, i), tmp_path / f"{i}.png")
    save(Image.new("RGB", (4000, 3000)), tmp_path / "large.png")
    scores = small.score(tmp_path)
    assert scores.ids == ["0.png", "1.png", "2.png"]
    assert usual.score(tmp_path).ids == ["0.png", "1.png", "2.png", "large.png"]
    with pytest.raises(InputError, match=r"large\.png': decoding it takes 4[\d.]+ MiB of memory, and 32 MiB are left"):
        small.score(tmp_path / "large.png")
    large = Image.new("RGB", (4000, 3000))
    with pytest.raises(InputError, match="decoding it takes"):
        small.score(large)


def test_the_budget_is_the_sum_of_its_parts(fitted_bank: Path, backbone: Backbone) -> None:
    for memory in ("500MB", "1GiB", "2GiB"):
        detector = Detector.open(fitted_bank, backbone=backbone, run=Run(memory=memory))
        parts = detector.plan.working_bytes + detector.plan.cache_bytes + detector.decode_bytes
        assert parts == parse_bytes(memory)
        assert detector.decode_bytes >= detector.plan.cache_bytes


MEASURE = """
import json, logging, sys
from pathlib import Path
from spade_faiss import Detector, Run, load_backbone, Preprocess
from tests.support.memory import watched

logging.disable(logging.CRITICAL)

bank, folder, memory = sys.argv[1:]
detector = Detector.open(bank, run=Run(memory=memory))
detector.score(sorted(Path(folder).glob("small*"))[0])
with watched() as growth:
    ids = detector.score(folder).ids
print(json.dumps({"growth": growth.most, "ids": list(ids)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize(("memory", "scored"), [("256MB", 8), ("800MB", 10)])
def test_the_process_stays_within_the_budget(tmp_path: Path, fitted_bank: Path, memory: str, scored: int) -> None:
    shutil.copytree(fitted_bank, tmp_path / "bank")
    for i in range(2):
        save(Image.new("RGB", (9000, 9000), (i, 2, 3)), tmp_path / "new" / f"large{i}.png", compress_level=1)
    for i in range(8):
        save(Image.new("RGB", (3000, 3000), (i, 9, 9)), tmp_path / "new" / f"small{i}.png", compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "bank"), str(tmp_path / "new"), memory],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["ids"]) == scored
    assert found["growth"] < parse_bytes(memory)
    assert re.match("small" if scored == 8 else "large", found["ids"][0])
