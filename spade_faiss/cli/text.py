"""What commands hand back, and how numbers read in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The numbers for --json, the text for people, and whether the exit code is 1 although nothing failed.
Output = tuple[Mapping[str, Any], str] | tuple[Mapping[str, Any], str, bool]


def format_times(stage_s: Mapping[str, float], total_s: float, images: int) -> str:
    """Where the time went, in one line."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stage_s.items())
    each = f", {1000 * total_s / images:.1f} ms an image" if images else ""
    return f"time {total_s:.2f} s{each} (seconds by stage, decoding runs beside the rest: {parts})"


def format_settings(settings: Mapping[str, object]) -> str:
    """Settings in one line."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())
