"""What commands return, and how numbers are written in a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from spade_faiss.bank.snapshot import Snapshot
    from spade_faiss.decisions.calibration import Calibration

# What a command returns: the numbers for --json, and the lines for people; each is printed as one line, whatever it holds.
Output = tuple[Mapping[str, Any], Sequence[str]]


class Finding(NamedTuple):
    """What a command that looks for faults returns: if it `failed`, the exit code is 1."""

    numbers: Mapping[str, Any]
    lines: Sequence[str]
    failed: bool


# How many names are listed before the rest is counted.
_NAMES = 5


def to_json(numbers: Mapping[str, Any]) -> str:
    """Write numbers as JSON in one line of ASCII; those that JSON does not know (NaN, infinities) become null."""
    # JSON escapes all that gives orders to a terminal, except DEL.
    return json.dumps(_plain(numbers), default=str, allow_nan=False).replace("\x7f", "\\u007f")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars; importing NumPy takes long
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def format_times(timing_s: Mapping[str, float], total_s: float, images: int) -> str:
    """Write seconds by stage in one line."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in timing_s.items())
    each = f", {1000 * total_s / images:.1f} ms an image" if images else ""
    return f"time {total_s:.2f} s{each} (seconds by stage, decoding runs beside the rest: {parts})"


def format_settings(settings: Mapping[str, object]) -> str:
    """Write settings in one line."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def names(ids: Sequence[str]) -> str:
    """List the first few of many names."""
    return ", ".join(ids[:_NAMES]) + (f" and {len(ids) - _NAMES} more" if len(ids) > _NAMES else "")


def describe_products(bank: Snapshot, made: Mapping[str, Calibration | str]) -> tuple[dict[str, dict[str, object]], list[str]]:
    """Describe the products of a bank and their calibrations, in numbers and in a line each, and which have too few images."""
    from spade_faiss.decisions.rules import few_images_notice

    numbers: dict[str, dict[str, object]] = {}
    lines = []
    for name, item in made.items():
        part = bank.part(name)
        facts: dict[str, object] = {"images": len(part.pictures)}
        if isinstance(item, str):
            numbers[name] = {**facts, "calibration": None, "notice": item}
            lines.append(f"  product {name}: {part.size_text}; {item}")
            continue
        calibration, text = describe_calibration(part, item)
        few = few_images_notice(item, part.usual.method.image_scores)
        numbers[name] = {**facts, "calibration": calibration, "notice": few or None}
        lines.append(f"  product {name}: {part.size_text}; {text}" + (f"; {few}" if few else ""))
    return numbers, lines


def describe_calibration(bank: Snapshot, calibration: Calibration) -> tuple[dict[str, object], str]:
    """Describe a calibration, in numbers and in one line, and whether it still holds for its bank."""
    from spade_faiss.decisions.calibration import calibration_facts

    outdated = calibration.outdated(bank)
    n = len(calibration)
    how = f"{n} held-out images" if calibration.mode == "split" else f"{n} of {calibration.available} images, leave one out"
    numbers = {**calibration_facts(calibration), "current": not outdated, "notice": outdated or None}
    options = calibration.options(bank) or "usual settings"
    text = f"calibration {options}: {how}, alpha={calibration.alpha:g}"
    return numbers, text + (f"; OUT OF DATE: {outdated}" if outdated else "")
