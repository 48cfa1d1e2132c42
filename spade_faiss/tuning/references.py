"""The normal pictures that others are compared with: their features, which every look at the same network shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch, concatenate
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.tuning.feature_files import are_saved, load_features, save_features
from spade_faiss.tuning.picture_stream import PicturesOf

_SIZES = "sizes.json"

Sizes = list[tuple[int, int]]


def read_references(
    folder: Path, backbone: Backbone, records: Sequence[ImageRecord], run: Run, longest: int
) -> tuple[FeatureBatch, list[ImageRecord], Sizes]:
    """Compute the features of the normal pictures that others are compared with; what is in `folder` already is read.

    Args:
        folder: where they are kept.
        backbone: computes them.
        records: the pictures.
        run: how images are read, and how many may be skipped.
        longest: see `longest_side`.

    Returns:
        The features, the records of the pictures that could be read, and their widths and heights as they are spoilt.

    Raises:
        InputError: if none of the pictures can be read, or more cannot than may be skipped.
    """
    if not are_saved(folder):
        with PicturesOf(backbone, run, longest).stream(len(records), "normal pictures") as stream:
            parts = list(stream(records))
        if not parts:
            raise InputError(f"none of the {len(records)} normal pictures could be read")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / _SIZES) as temporary:
            sizes = [where.original for part in parts for where in part.placements]
            temporary.write_text(json.dumps(sizes), encoding="utf-8")
        save_features(folder, concatenate([part.batch for part in parts]))
    batch = load_features(folder)
    ids = set(batch.ids)
    sizes = [(width, height) for width, height in json.loads((folder / _SIZES).read_bytes())]
    return batch, [record for record in records if record.id in ids], sizes


def chosen(batch: FeatureBatch, places: Sequence[int]) -> FeatureBatch:
    """Some images of a batch."""
    return concatenate([batch[place : place + 1] for place in places])
