"""Libraries that meet a limit of the address space are tried out in a fork, however they end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

from spade_faiss.diagnostics import limits

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")


def fail() -> None:
    raise ImportError("failed to map segment from shared object")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: os.write(1, b"loaded"), True),
        (fail, False),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), False),
        (sys.exit, False),
        (lambda: time.sleep(60), False),
    ],
    ids=["well", "error", "signal", "exit", "waits"],
)
def test_how_a_fork_ends_is_told_and_its_words_are_not(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, function: Callable[[], object], expected: bool
) -> None:
    monkeypatch.setattr(limits, "_WAIT_S", 0.5)
    assert limits._succeeds(function) is expected
    assert capfd.readouterr() == ("", "")


def test_without_a_limit_nothing_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_succeeds", pytest.fail)
    limits.check_libraries_fit(torch=True)
