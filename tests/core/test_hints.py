"""Hints: the command line takes every command that a message tells people to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from spade_faiss import cli
from spade_faiss.core import hints

BANK = "my parts/good; 'v2'.bank"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (hints.fit_command, "fit"),
        (hints.index_command, "index"),
        (lambda bank: hints.index_command(bank, "ivf", rebuild=True), "index"),
        (lambda bank: hints.index_command(bank, update=True), "index"),
        (hints.info_command, "info"),
        (hints.remove_command, "remove"),
        (hints.restore_command, "restore"),
        (hints.compact_command, "compact"),
        (hints.verify_command, "verify"),
        (hints.calibrate_command, "calibrate"),
        (lambda bank: hints.calibrate_command(bank, "--recipe ivf --k-image 3"), "calibrate"),
        (hints.score_command, "score"),
    ],
)
def test_a_shell_hands_the_command_line_what_it_takes(command: Callable[[str], str], expected: str) -> None:
    program, *words = shlex.split(command(BANK))
    assert program == "spade-faiss"
    assert words[0] == expected
    assert cli._parser().parse_args(words).bank == BANK


def test_options_are_written_where_they_are_asked_for() -> None:
    assert hints.index_command("b") == "spade-faiss index b"
    assert hints.index_command("b", "ivf") == "spade-faiss index b --recipe ivf"
    assert hints.index_command("b", "ivf", rebuild=True) == "spade-faiss index b --recipe ivf --rebuild"
    assert hints.index_command("b", update=True) == "spade-faiss index b --update"
    assert hints.calibrate_command("b", "--k-image 3") == "spade-faiss calibrate b --k-image 3"
