"""Defines what the doctor reports: checks with a state, a result and advice, and the diagnosis that they make together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GREEN, AMBER, RED = "green", "amber", "red"


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Args:
        name: what was checked.
        state: `green`, `amber` (something could be better) or `red` (something is wrong).
        result: what the check found, in words.
        advice: what to do about it; empty if nothing is to be done.
        numbers: the result for programs.
    """

    name: str
    state: str
    result: str
    advice: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All checks of a machine."""

    checks: tuple[Check, ...]

    @property
    def state(self) -> str:
        """The worst state of any check."""
        states = {check.state for check in self.checks}
        return next(state for state in (RED, AMBER, GREEN) if state in states)
