"""What a message tells people to type next: every command line that the library names is made here."""

from __future__ import annotations

import shlex
from pathlib import Path


def index_command(bank: str | Path, recipe: str = "", *, update: bool = False, rebuild: bool = False) -> str:
    """Build a recipe's index over a bank, or bring all that was built up to date."""
    return _line("index", bank, *(["--recipe", recipe] if recipe else []), update and "--update", rebuild and "--rebuild")


def calibrate_command(bank: str | Path, options: str = "") -> str:
    """Calibrate a bank; `options` are those of a scoring config, as text."""
    return " ".join(filter(None, (_line("calibrate", bank), options)))


def fit_command(bank: str | Path) -> str:
    """Make a bank."""
    return _line("fit", "IMAGES", "--bank", bank)


def _line(*words: str | Path | bool) -> str:
    return " ".join(["spade-faiss", *(shlex.quote(str(word)) for word in words if word)])


def score_command() -> str:
    """Score images."""
    return _line("score", "IMAGES", "--bank", "BANK", "--out", "RESULTS")
