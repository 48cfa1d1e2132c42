"""The networks and inputs that a new bank may be made by: which are tried, and those of a choice as an extraction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spade_faiss.core.declaring import changed
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import RESIZE_MODES, Extraction, Preprocess
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.settings import Run, Tuning
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.depth import find_bit_depth
from spade_faiss.workflows.bank_network import make_network
from spade_faiss.workflows.extract import check_backbone, load_named

# Beside the center of a picture, all of it; `stretch` is the same for squares, and bends what is none.
_MODES = ("crop", "letterbox")


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """How a bank may be made: an extraction, and its backbone by the engine that will run it."""

    extraction: Extraction
    backbone: Backbone


def check_inputs(tuning: Tuning, extraction: Extraction, *, is_new: bool, run: Run) -> None:
    """Raise InputError where networks or inputs are to be chosen that are given already, by the bank or otherwise."""
    asked = [name for name in ("backbones", "sizes", "resize_modes") if getattr(tuning, name)]
    if not asked:
        return
    value = f"{asked[0]}={getattr(tuning, asked[0])!r}"
    if not is_new:
        raise InputError(
            f"{value} is for a new bank: the features of one that is there stay; leave it out, or name a bank that is not there"
        )
    if isinstance(extraction.backbone, Backbone):
        raise InputError(f"{value} is for a backbone that is given by name: this one has its own input; leave it out")
    if extraction.preprocess.tile is not None:
        raise InputError(f"{value} is of whole images, and tile cuts them up; leave one of them out")
    if tuning.backbones and run.weights is not None:
        raise InputError(f"{value} and weights={str(run.weights)!r} exclude each other: a file of weights is of one network")


def candidates(bank: Path, extraction: Extraction, tuning: Tuning, records: Sequence[ImageRecord], run: Run) -> list[Candidate]:
    """What a new bank may be made by: every combination of networks, sizes and resize modes, that of the extraction first.

    A network is loaded once for a size.

    Args:
        bank: the bank's folder.
        extraction: what is asked for, and stays unless something else is surely better.
        tuning: what else is tried.
        records: the normal pictures, by which the bit depth is found and engines are compared.
        run: the device, the engine and the weights.

    Raises:
        InputError: for a network that is not known, or that takes no input of such a size.
        DependencyError: for one that is not installed.
    """
    check_backbone(extraction, run)
    depth = extraction.preprocess.bit_depth
    made: list[Candidate] = []
    for each in _extractions(extraction, tuning):
        same = next((one for one in made if _is_same_network(one.extraction, each)), None)
        if same is not None:
            made.append(Candidate(extraction=each, backbone=same.backbone.placed_as(each.preprocess)))
            continue
        backbone = load_named(each, run)
        if backbone.source.preprocess.bit_depth is None:
            if depth is None:
                depth = find_bit_depth([record.path for record in records], parse_bytes(run.memory))
            backbone = backbone.with_bit_depth(depth)
        made.append(Candidate(extraction=each, backbone=make_network(bank, backbone, records, each, run).backbone))
    return made


def _is_same_network(one: Extraction, other: Extraction) -> bool:
    return one.backbone == other.backbone and one.preprocess.input_size == other.preprocess.input_size


def _extractions(extraction: Extraction, tuning: Tuning) -> list[Extraction]:
    """What is tried; what is asked for comes first, and what differs from it least next."""
    if isinstance(extraction.backbone, Backbone) or extraction.preprocess.tile is not None:
        return [extraction]
    own = extraction.preprocess
    found = [extraction]
    for backbone in (extraction.backbone, *tuning.backbones):
        for size in (own.size, *tuning.sizes):
            sized = own if size == own.size else changed(own, {"size": size, "resize": None})
            for placed in _placed(sized, tuning):
                other = replace(extraction, backbone=backbone, preprocess=placed)
                found += [other] if other not in found else []
    return found


def _placed(own: Preprocess, tuning: Tuning) -> Iterator[Preprocess]:
    is_given = own.resize_mode != Preprocess.resize_mode or "resize" not in own.derived
    modes = tuning.resize_modes or ((own.resize_mode,) if is_given else _MODES)
    for mode in sorted(modes, key=lambda each: (each != own.resize_mode, RESIZE_MODES.index(each))):
        yield own if mode == own.resize_mode else changed(own, {"resize_mode": mode})
