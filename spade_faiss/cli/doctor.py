"""The command that looks at the machine: doctor."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from spade_faiss.cli.options import Commands, add_settings
from spade_faiss.cli.text import Finding
from spade_faiss.core.settings import Run


def register(commands: Commands) -> None:
    """Add the command of this module."""
    command = commands.add(
        "doctor",
        _doctor,
        "say what this machine has, prove that results are right on it, and measure; exit code 1 if something is red",
        "spade-faiss doctor --device auto --bank parts.bank",
    )
    add_settings(command, Run, only=("device",))
    command.set_defaults(device="auto")
    command.add_argument("--bank", help="a bank whose place on disk is measured")


def _doctor(arguments: argparse.Namespace) -> Finding:
    from spade_faiss.diagnostics.doctor import RED, doctor

    found = doctor(arguments.device, bank=arguments.bank)
    lines = []
    for check in found.checks:
        lines.append(f"{check.state:6} {check.name:22} {check.found}")
        if check.advice:
            lines.append(f"{'':29} -> {check.advice}")
    lines.append(f"{found.state:6} all in all")
    numbers = {"state": found.state, "checks": [asdict(check) for check in found.checks]}
    return Finding(numbers, "\n".join(lines), failed=found.state == RED)
