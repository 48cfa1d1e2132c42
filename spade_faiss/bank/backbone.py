"""The backbone that a bank was made with: the network that the bank carries, or one that is loaded by its name."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from spade_faiss.bank.network import check_features, open_network
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.device import Device, find_device
from spade_faiss.core.errors import BankError, InputError, NotFoundError
from spade_faiss.core.extraction import Source
from spade_faiss.core.roi import Roi
from spade_faiss.core.schema import shorten
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.forward.choice import check_torch, choose_engine, usable_engines
from spade_faiss.features.names import is_known
from spade_faiss.features.roi_files import place_roi

_log = logging.getLogger(__name__)


def backbone_of(bank: Snapshot, backbone: str | Backbone | None, run: Run, device: str | None = None) -> Backbone:
    """Open or load the backbone that a bank was made with.

    Args:
        bank: the bank.
        backbone: the same network, or a name for it; needed if the bank was made with a module of your own, and carries no
            network.
        run: `device` is where the backbone runs and `engine` what runs it, `weights` is the file of its weights if they are not
            where the bank recorded.
        device: where the backbone runs, in place of `run.device`.

    Raises:
        InputError: if the bank was made by another extractor, or with another backbone than the one that was loaded, or if an
            engine computes other features.
        NotFoundError: if the weights are not where the bank recorded.
        DependencyError: if the engine is not installed.
        BankError: if the bank's settings contradict each other, or the network that it carries is damaged.
    """
    source = bank.manifest.source
    if isinstance(backbone, Backbone):
        if run.weights is not None or run.engine != Run.engine:
            raise InputError("weights and engine belong to a backbone that is given by name; this one has its own")
        depth = None if source is None else source.preprocess.bit_depth
        if depth is not None and backbone.source.preprocess.bit_depth is None:
            backbone = backbone.with_bit_depth(depth)
        if source is not None and _rois(backbone.source) == (None, False) != _rois(source):
            backbone = backbone.with_roi(source.preprocess.roi, own_rois=source.preprocess.own_rois)
    elif source is None:
        raise InputError(f"the bank {bank.path} was made by another extractor; hand it features, or pass a Backbone")
    else:
        is_own = backbone in (None, source.backbone) and run.weights is None
        height, width = source.preprocess.input_size
        if is_own and bank.layout.input_size != (height, width):
            # Inputs of another size would take memory that no file of the bank accounts for.
            raise BankError(
                f"the bank {bank.path} is damaged: its maps are of inputs of {bank.layout.input_size} pixels, its settings say "
                f"{height} x {width}; restore it from a backup"
            )
        rois = place_roi(source.preprocess), source.preprocess.own_rois
        if is_own and rois != (bank.layout.roi, bank.layout.own_rois):
            raise BankError(
                f"the bank {bank.path} is damaged: its maps and its pictures have different regions of interest; restore it "
                "from a backup"
            )
        found = find_device(device or run.device)
        if is_own and bank.manifest.network is not None and (carried := _carried(bank, source, run.engine, found)):
            backbone = carried
        else:
            backbone = _loaded(bank, source, backbone, run, device or run.device)
    bank.check_source(backbone.source)
    return backbone


def _rois(source: Source) -> tuple[Roi | None, bool]:
    return source.preprocess.roi, source.preprocess.own_rois


def _carried(bank: Snapshot, source: Source, asked: str, device: Device) -> Backbone | None:
    """Open the network that the bank carries by the engine that was asked for; None if that is torch.

    Where any engine will do, one that does not compute the bank's features on this machine is passed over.
    """
    if source.precision != "float32" and asked not in ("auto", source.engine):
        raise InputError(
            f"the bank {bank.path} was made in {source.precision} by {source.engine}; those of {asked} are too far from that: "
            f"use --engine {source.engine}, or make a new bank"
        )
    asked = asked if source.precision == "float32" else source.engine
    network, engine = bank.manifest.network, choose_engine(asked, source.precision, device)
    assert network is not None
    if engine == "torch":
        return None
    for candidate in usable_engines(source.precision) if asked == "auto" else (engine,):
        try:
            return open_network(bank.path, network, source, bank.layout, candidate)
        except InputError as error:
            if asked != "auto":
                raise
            _log.warning("%s", error)
    return None


def _loaded(bank: Snapshot, source: Source, name: str | None, run: Run, device: str) -> Backbone:
    """Load the backbone by its name into torch; if another engine was asked for, it is exported first."""
    if name is None and not is_known(source.backbone):
        raise InputError(
            f"the bank {bank.path} was made with your own backbone {shorten(source.backbone)}; pass it as backbone="
        )
    check_torch()
    from spade_faiss.features.loading import load_backbone

    recorded, weights = bank.manifest.weights_file, run.weights
    if weights is None and recorded is not None:
        weights = _recorded_weights(bank, recorded)
    backbone = load_backbone(
        name or source.backbone,
        weights=weights,
        precision=source.precision,
        preprocess=source.preprocess,
        blocks=source.blocks,
        device=device,
    )
    bank.check_source(replace(backbone.source, engine=source.engine))
    network, layout = bank.manifest.network, bank.layout
    if (engine := choose_engine(run.engine, source.precision, find_device(device), exported=False)) != "torch":
        from spade_faiss.features.proof import prove

        noise = np.random.default_rng(0).standard_normal((2, 3, *layout.input_size)).astype(np.float32)
        backbone = prove(backbone, noise, engine).open(engine)
    if network is not None and backbone.levels == layout.whole_levels:
        check_features(bank.path, network, layout, backbone)
    return backbone


def _recorded_weights(bank: Snapshot, recorded: str) -> str:
    """Return the file that the weights were loaded from.

    A bank may come from anybody, and this path is one of the two kinds that lead out of its folder. The file is read as tensors
    and nothing else, and used only if the checksum of its tensors is the one that the bank records.
    """
    try:
        # Of a file that the system makes up, such as /proc/kmsg, nobody knows how long reading it takes: it has no size.
        is_there = Path(recorded).is_file() and Path(recorded).stat().st_size > 0
    except (OSError, ValueError):  # no file can have that name
        is_there = False
    if not is_there:
        raise NotFoundError(
            f"the weights of the bank {bank.path} were in {shorten(recorded)}, which is gone or no file; pass --weights FILE"
        )
    return recorded
