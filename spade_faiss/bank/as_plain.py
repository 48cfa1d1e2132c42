"""Layouts and sources as plain values, and where two of them differ."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from spade_faiss.core.extraction import Source
from spade_faiss.features.layout import Layout


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name of the first setting that differs, and both values; None if all are equal."""
    for name, value in ours.items():
        if isinstance(value, dict) and isinstance(theirs[name], dict):
            if difference := first_difference(value, theirs[name]):
                return f"{name}.{difference[0]}", *difference[1:]
        elif value != theirs[name]:
            return name, value, theirs[name]
    return None


def named_layout(layout: Layout) -> dict[str, Any]:
    """Return a layout as plain values, its region of interest by what names it: how it is written down may be long."""
    found = replace(layout, roi=None).named()
    return found if layout.roi is None else {"roi": layout.roi.facts(), **found}


def named_source(source: Source) -> dict[str, Any]:
    """Return a source as plain values, its region of interest by what names it."""
    found = asdict(source)
    if (roi := source.preprocess.roi) is not None:
        found["preprocess"]["roi"] = roi.facts()
    return found
