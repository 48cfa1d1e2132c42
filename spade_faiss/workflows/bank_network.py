"""The network of a bank: exported and proven when the bank is made, opened when images are extracted into it later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spade_faiss.bank.backbone import backbone_of
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.places import MANIFEST
from spade_faiss.core.device import find_device
from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.core.extraction import Extraction, Preprocess
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.settings import Run
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.forward.choice import choose_engine
from spade_faiss.features.pictures import load_bytes, load_image, to_input
from spade_faiss.features.proof import ExportedNetwork, prove
from spade_faiss.features.tiles import TileGrid, cut_out

# On how many images the engines for the forward pass are compared.
_PROBES = 4


class MadeNetwork(NamedTuple):
    """The backbone by the engine that will make a bank, the network that the bank will carry, and why it will carry none."""

    backbone: Backbone
    carried: ExportedNetwork | None = None
    why_none: str = ""


def make_network(
    bank: Path, backbone: Backbone, records: Sequence[ImageRecord], extraction: Extraction, run: Run
) -> MadeNetwork:
    """Export the backbone, which is torch's, for a new bank and for the engine that will run it; open that of an existing one.

    Args:
        bank: the bank's folder.
        backbone: the backbone as torch loaded it, or as the caller gave it.
        records: the images; the engines are compared on the first few that can be read.
        extraction: says whether the bank shall carry the network.
        run: `engine` is what shall run it.

    Raises:
        InputError: if the engine that was asked for cannot run it; where any engine will do, torch takes its place.
        DependencyError: if the engine that was asked for, or what it takes to export, is not installed.
    """
    is_given, precision = isinstance(extraction.backbone, Backbone), backbone.source.precision
    device = find_device(run.device)
    if (bank / MANIFEST).is_file() and (opened := Bank.open(bank)).generation > 0:
        source = opened.manifest.source
        is_same = source is not None and backbone.source.comparable() == source.comparable()
        if is_given or not is_same or opened.manifest.network is None:
            return MadeNetwork(backbone)
        return MadeNetwork(backbone_of(opened, None, replace(run, weights=None)))
    if backbone.engine != "torch":
        return MadeNetwork(backbone)  # opened from a bank: there is no torch network to export
    engine = "torch" if is_given else choose_engine(run.engine, precision, device)
    # In another precision than float32, a bank is of use to the engine that made it, and torch loads its networks by name.
    if (engine == "torch" and (precision != "float32" or not extraction.network)) or not (
        inputs := _first_inputs(records, backbone.source.preprocess, run)
    ):
        return MadeNetwork(backbone)
    try:
        exported = prove(backbone, np.stack(inputs), engine)
        used = backbone if engine == "torch" else exported.open(engine)
    except (InputError, DependencyError) as error:
        if engine != "torch" and run.engine != "auto":
            raise
        return MadeNetwork(backbone, why_none=f"the bank carries no network: {error}")
    return MadeNetwork(used, exported if extraction.network else None)


def _first_inputs(records: Sequence[ImageRecord], preprocess: Preprocess, run: Run) -> list[FloatArray]:
    """The inputs of a few images that can be read."""
    found: list[FloatArray] = []
    limit = parse_bytes(run.memory)
    for record in records[: run.max_skipped + _PROBES]:
        try:
            if load_bytes(record, preprocess) <= limit:
                picture = load_image(record, preprocess).picture
                if preprocess.tile is not None:
                    tile = next(iter(TileGrid.of((picture.shape[1], picture.shape[0]), preprocess)))
                    picture = cut_out(picture, tile.left, tile.top, preprocess.tile)
                found.append(to_input(picture, preprocess))
        except InputError:  # the stream will say so
            continue
        if len(found) == _PROBES:
            break
    return found
