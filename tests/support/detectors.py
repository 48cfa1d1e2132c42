"""Detectors from settings that stand in one flat mapping, as parametrized tests hold them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from spade_faiss.core.settings import Method, Run
from spade_faiss.scoring.detector import Detector


def open_detector(bank: str | Path, **settings: Any) -> Detector:
    """`Detector.open` with the fields of `Method` and of `Run` sorted out of `settings`."""
    method = {field.name: settings.pop(field.name) for field in fields(Method) if field.name in settings}
    run = {field.name: settings.pop(field.name) for field in fields(Run) if field.name in settings}
    return Detector.open(bank, method=Method(**method), run=Run(**run), **settings)
