"""The command that examines the machine: doctor."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from spade_faiss.cli.options import Commands, add_settings, read_settings
from spade_faiss.cli.text import Finding
from spade_faiss.core.settings import Run


def register(commands: Commands) -> None:
    """Add the command of this module."""
    command = commands.add(
        "doctor",
        _doctor,
        "say what this machine has, test that results are right on it, and measure; exit code 1 if something is red",
        "spade-faiss doctor --device auto --bank parts.bank",
    )
    add_settings(command, Run, only=("device",))
    command.set_defaults(device="auto")
    command.add_argument("--bank", help="a bank whose disk is measured")


def _doctor(arguments: argparse.Namespace) -> Finding:
    from spade_faiss.diagnostics.checks import RED
    from spade_faiss.diagnostics.doctor import doctor

    diagnosis = doctor(read_settings(arguments, Run).device, bank=arguments.bank)
    lines = []
    for check in diagnosis.checks:
        lines.append(f"{check.state:6} {check.name:22} {check.result}")
        if check.advice:
            lines.append(f"{'':29} -> {check.advice}")
    lines.append(f"{diagnosis.state:6} all in all")
    numbers = {"state": diagnosis.state, "checks": [asdict(check) for check in diagnosis.checks]}
    return Finding(numbers, lines, failed=diagnosis.state == RED)
