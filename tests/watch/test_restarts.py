"""Many files in bursts, while the process is killed and ended: nothing comes twice, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.support.pictures import weave
from tests.support.receivers import Receiver, receiving
from tests.support.watching import read_lines

FILES, BURST = 1000, 100


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "spade_faiss", "watch", *words]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def write(folder: Path, number: int, data: bytes, draw: random.Random) -> None:
    """Half of the files are written where they belong, in pieces; the others are renamed into place."""
    path = folder / f"{number % 7}" / f"{number:04}.png"
    path.parent.mkdir(exist_ok=True)
    if draw.random() < 0.5:
        with path.open("wb") as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(part)
                file.flush()
    else:
        (folder / f".{number}").write_bytes(data)
        (folder / f".{number}").rename(path)


def wait_until(folder: Path, count: int, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while len(read_complete(folder)) < count:
        assert time.monotonic() < end, len(read_complete(folder))
        time.sleep(0.1)


def read_complete(folder: Path) -> list[bytes]:
    path = folder / "verdicts.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


@pytest.mark.slow
def test_a_thousand_files_with_a_kill_and_an_end_in_between(tmp_path: Path, fitted_bank: Path) -> None:
    incoming, out, draw, rng = tmp_path / "in", tmp_path / "out", random.Random(1), np.random.default_rng(1)
    incoming.mkdir()
    pictures: list[npt.NDArray[np.uint8]] = []
    for number in range(FILES):
        picture = weave(rng) if number < 8 else np.roll(pictures[number % 8], number, axis=1)
        pictures.append(picture)
    written = iter(range(FILES))

    def burst(count: int) -> None:
        for _, number in zip(range(count), written, strict=False):  # in this order, none is passed over
            Image.fromarray(pictures[number]).save(tmp_path / "one.png")
            write(incoming, number, (tmp_path / "one.png").read_bytes(), draw)

    # Every tenth answer gets lost on its way: what was taken is sent again, under the same key.
    with receiving(Receiver(answer=lambda number, _: (503 if number % 10 == 0 else 200, {}))) as receiver:
        words = [str(incoming), "--bank", str(fitted_bank), "--to", f"folder:{out}", "--to", f"webhook:{receiver.url}"]
        words += ["--settle-s", "0.2", "--rescan-s", "2", "--quiet", "--drain-s", "60"]
        burst(2 * BURST)  # there before it starts
        for code, stop_at in ((-signal.SIGKILL, 300), (0, 600)):
            process = start(words, tmp_path / "log")
            while len(read_complete(out)) < stop_at:
                burst(min(BURST, max(0, stop_at + 200 - len(list(incoming.rglob("*.png"))))))
                time.sleep(0.2)
                assert process.poll() is None, (tmp_path / "log").read_text()
            process.send_signal(signal.SIGKILL if code else signal.SIGTERM)
            assert process.wait(60) == code, (tmp_path / "log").read_text()
            burst(BURST)  # while nobody watches
        process = start(words, tmp_path / "log")
        while (rest := FILES - len(list(incoming.rglob("*.png")))) > 0:
            burst(min(rest, BURST))
            time.sleep(0.1)
        wait_until(out, FILES, 120)
        end = time.monotonic() + 60
        while len({request.headers["idempotency-key"] for request in receiver.taken}) < FILES and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    lines = read_lines(out)
    names = [f"{number % 7}/{number:04}.png" for number in range(FILES)]
    assert sorted(line["name"] for line in lines) == sorted(names), "each file has one line"
    assert {line["kind"] for line in lines} == {"verdict"}
    keys = Counter(request.headers["idempotency-key"] for request in receiver.taken)
    assert keys.keys() == {line["id"] for line in lines}, "each verdict was delivered"
    # Only what was on its way when the process was killed may have come twice; its key says so.
    assert sum(count - 1 for count in keys.values()) <= 32
    bodies: dict[str, bytes] = {}
    for request in receiver.taken:
        assert bodies.setdefault(request.headers["idempotency-key"], request.body) == request.body
