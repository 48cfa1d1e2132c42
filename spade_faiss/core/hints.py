"""Hints: every command line that a message of the library tells people to type is made here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from spade_faiss.core.copies import named


def fit_command(bank: str | Path) -> str:
    """Return the command that makes a bank."""
    return _line("fit", "IMAGES", "--bank", bank)


def add_command(bank: str | Path, product: str = "") -> str:
    """Return the command that adds normal images to a bank, or to a product of it."""
    return _line("add", "IMAGES", "--bank", bank, *(["--product", product] if product else []))


def index_command(
    bank: str | Path, recipe: str = "", *, levels: Sequence[str] = (), update: bool = False, rebuild: bool = False
) -> str:
    """Return the command that builds a recipe's index over a bank, or brings all indexes that were built up to date.

    Args:
        bank: the bank's folder.
        recipe: the name of the recipe.
        levels: the levels to index; empty for those that the index has.
        update: bring all indexes up to date.
        rebuild: build anew in any case.
    """
    chosen = [*(["--recipe", recipe] if recipe else []), *(["--levels", ",".join(levels)] if levels else [])]
    return _line("index", bank, *chosen, update and "--update", rebuild and "--rebuild")


def info_command(bank: str | Path) -> str:
    """Return the command that shows what a bank holds."""
    return _line("info", bank)


def remove_command(bank: str | Path) -> str:
    """Return the command that removes images from a bank."""
    return _line("remove", "ID", "--bank", bank)


def restore_command(bank: str | Path) -> str:
    """Return the command that restores removed images."""
    return _line("restore", "ID", "--bank", bank)


def compact_command(bank: str | Path) -> str:
    """Return the command that drops removed images for good."""
    return _line("compact", bank)


def verify_command(bank: str | Path) -> str:
    """Return the command that compares the checksums of a bank's files."""
    return _line("verify", bank)


def calibrate_command(bank: str | Path, options: str = "", product: str = "") -> str:
    """Return the command that calibrates a bank, or a product of it; `options` are those of a scoring config, as text."""
    return " ".join(filter(None, (_line("calibrate", bank, *(["--product", product] if product else [])), options)))


def score_command(bank: str | Path = "BANK") -> str:
    """Return the command that scores images against a bank."""
    return _line("score", "IMAGES", "--bank", bank, "--out", "RESULTS")


def _line(*words: str | Path | bool) -> str:
    """Join words to a command line that a shell takes apart again; False stands for an option that is not given."""
    return " ".join(["spade-faiss", *(shlex.quote(named(str(word))) for word in words if word)])
