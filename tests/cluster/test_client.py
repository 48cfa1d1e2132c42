"""Commands reach a cluster elsewhere by Ray's client, which is started with a token of its own."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.report.exchange import PARTS
from spade_faiss.report.scorefile import ScoreFile
from spade_faiss.report.scoreparts import ScoreParts
from spade_faiss.scoring.detector import Detector
from spade_faiss.workflows.score import score_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("grpc") is None, reason="ray[client] is not installed"),
]
_STARTS_S = 60


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(port: int) -> bool:
    with closing(socket.socket()) as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a node of two processors, and what a command's environment must say to be let in."""
    port, control = _free_port(), _free_port()
    # Its ports listen at every address of the machine: nobody else knows the token.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    # Sockets lie below it, and their names may not be long.
    folder = Path(f"/tmp/ray-{secrets.token_hex(4)}")
    log = tmp_path_factory.mktemp("head") / "log"
    words = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={control}", f"--temp-dir={folder}"]
    words += [f"--ray-client-server-port={port}", "--num-cpus=2", "--include-dashboard=false"]
    with log.open("wb") as file:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *words],
            env={**os.environ, **token},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + _STARTS_S
        while not _answers(port):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"ray://127.0.0.1:{port}", token
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _score(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spade_faiss", "score", *words, "--quiet"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_scores_by_the_client_are_those_of_one_process(
    client: tuple[str, dict[str, str]], weave: Path, whole_bank: Path, tmp_path: Path
) -> None:
    (address, token), out = client, tmp_path / "many"
    words = [str(weave / "test"), "--bank", str(whole_bank), "--cluster", address, "--out", str(out)]
    done = _score(words, token)
    assert done.returncode == 0, done.stderr
    score_folder(weave / "test", bank=Detector.open(whole_bank), out=tmp_path / "one")
    files = sorted((out / PARTS).glob("*/scores.h5"))
    with ScoreFile.open(tmp_path / "one" / "scores.h5") as one, ScoreParts.open(files) as parts:
        assert one.ids == parts.ids
        np.testing.assert_array_equal(one.image_score, parts.image_score)
        assert all(np.array_equal(*maps) for maps in zip(one.maps(), parts.maps(), strict=True))
    # Without the token, Ray's client waits for half a minute, unless it is told not to.
    patience = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1"}
    refused = _score(words, {"RAY_AUTH_MODE": "disabled", **patience})
    assert refused.returncode != 0
    assert "one that asks for a token takes RAY_AUTH_MODE=token" in refused.stderr
