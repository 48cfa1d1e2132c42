"""Loading the backbone that a bank was made with."""

from __future__ import annotations

from pathlib import Path

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import BankError, InputError, NotFoundError
from spade_faiss.core.schema import shorten
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.loading import is_known, load_backbone


def backbone_of(bank: Snapshot, backbone: str | Backbone | None, run: Run, device: str | None = None) -> Backbone:
    """Load the backbone that a bank was made with.

    Args:
        bank: the bank.
        backbone: the same network, or a name for it; needed if the bank was made with a module of your own.
        run: `device` is where the backbone runs, `weights` is the file of its weights if they are not where the bank recorded.
        device: where the backbone runs, in place of `run.device`.

    Raises:
        InputError: if the bank was made by another extractor, or with another backbone than the one that was loaded.
        NotFoundError: if the weights are not where the bank recorded.
        BankError: if the bank's settings contradict each other.
    """
    if isinstance(backbone, Backbone):
        if run.weights is not None:
            raise InputError("weights belong to a backbone that is given by name; this one has its own")
        depth = None if bank.manifest.source is None else bank.manifest.source.preprocess.bit_depth
        if depth is not None and backbone.source.preprocess.bit_depth is None:
            backbone = backbone.with_bit_depth(depth)
    else:
        source, recorded, weights = bank.manifest.source, bank.manifest.weights_file, run.weights
        if source is None:
            raise InputError(f"the bank {bank.path} was made by another extractor; hand it features, or pass a Backbone")
        if backbone is None and not is_known(source.backbone):
            raise InputError(
                f"the bank {bank.path} was made with your own backbone {shorten(source.backbone)}; pass it as backbone="
            )
        side = source.preprocess.crop
        if backbone is None and bank.layout.input_size != (side, side):
            # Inputs of another size would take memory that no file of the bank accounts for.
            raise BankError(
                f"the bank {bank.path} is damaged: its maps are of inputs of {bank.layout.input_size} pixels, its settings say "
                f"{side} x {side}; restore it from a backup"
            )
        if weights is None and recorded is not None:
            weights = _recorded_weights(bank, recorded)
        backbone = load_backbone(
            backbone or source.backbone,
            weights=weights,
            precision=source.precision,
            preprocess=source.preprocess,
            device=device or run.device,
        )
    bank.check_source(backbone.source)
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
