"""What a new bank records beside its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spade_faiss.bank.network import CarriedNetwork
from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.extraction import Source
from spade_faiss.core.grouping import Grouping
from spade_faiss.core.presets import Usual

if TYPE_CHECKING:
    from spade_faiss.features.proof import ExportedNetwork


@dataclass(frozen=True, eq=False, kw_only=True)
class Origin:
    """Where the features of a bank come from, and how it is used.

    Args:
        source: what makes the features; queries must have the same source. None for another extractor.
        weights_file: where the backbone's weights were loaded from, so that they can be loaded again.
        network: the exported network, or that of another bank, which the bank will carry.
        augment: the views that it will hold of each picture.
        grouping: what says which of its pictures belong together; None says nothing, as `usual`.
        products: what says which product a picture shows, for a bank of several; None says nothing, likewise.
        usual: how the bank is searched unless something else is asked for. None says nothing: a new bank is then searched as
            the paper has it, and one that exists as it remembers.
    """

    source: Source | None = None
    weights_file: str | None = None
    network: ExportedNetwork | CarriedNetwork | None = None
    augment: Augmentation | None = None
    grouping: Grouping | None = None
    products: Grouping | None = None
    usual: Usual | None = None
