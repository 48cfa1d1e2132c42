"""Numbers and tables as Markdown, the same on every page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Figures = dict[str, Any]


def percent(rate: float) -> str:
    """A share in percent."""
    return f"{100 * rate:.1f}"


def interval(row: Figures) -> str:
    """The row's interval, a pair of shares, in percent."""
    return "–".join(percent(max(0.0, bound)) for bound in row["interval"])


def milliseconds(spread: Figures) -> str:
    """The median of some seconds, in milliseconds."""
    return f"{1000 * spread['median']:.1f}"


def milliseconds_of(spread: Mapping[str, float]) -> str:
    """A median of a few milliseconds, and what it lies between."""
    return f"{spread['median']:.1f} ms ({spread['min']:.1f} to {spread['max']:.1f})"


def measured_on(found: Mapping[str, Any]) -> str:
    """What a section was measured on, beside other work."""
    machine = found["machine"]
    return (
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} threads, faiss-cpu {machine['faiss-cpu']}. "
        "Others used the machine at the same time."
    )


def mebibytes(count: float) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:.0f} MiB"


def scores(row: Figures, *names: str) -> tuple[str, ...]:
    """Metrics to three digits; a dash for one that was not measured."""
    return tuple("–" if row[name] is None else f"{row[name]:.3f}" for name in names)


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A table with a line for each row."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
