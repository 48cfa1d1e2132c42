"""What a bank holds, and how its indexes and calibrations compare to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.decisions.calibration import Calibration, current_calibrations
from spade_faiss.index.built_index import read_built
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.image_index import ImageIndexManifest
from spade_faiss.index.staleness import Staleness, staleness


@dataclass(frozen=True, kw_only=True)
class BankInfo:
    """A bank, and what stands beside it.

    Args:
        bank: the opened bank.
        images: its image indexes, each with how it compares to the bank.
        galleries: its gallery indexes, likewise.
        calibrations: its calibrations.
        products: of a bank of several products, the same of each, in the order of the bank.
    """

    bank: Snapshot
    images: tuple[tuple[ImageIndexManifest, Staleness], ...]
    galleries: tuple[tuple[GalleryIndexManifest, Staleness], ...]
    calibrations: tuple[Calibration, ...]
    products: tuple[BankInfo, ...] = ()

    @property
    def unindexed(self) -> int:
        """The largest number of images that an index does not hold."""
        own = max((stale.unindexed for _, stale in (*self.images, *self.galleries)), default=0)
        return max([own, *(part.unindexed for part in self.products)])


def info(bank: str | Path) -> BankInfo:
    """Open a bank, and read the manifests of its indexes and its calibrations.

    Raises:
        NotFoundError: if there is no bank.
        BankError: if it, an index's manifest or a calibration is damaged.
    """
    return _info(Bank.open(bank))


def _info(opened: Snapshot) -> BankInfo:
    return BankInfo(
        bank=opened,
        images=tuple((item, staleness(opened, item.shards)) for item in read_built(ImageIndexManifest, opened)),
        galleries=tuple((item, staleness(opened, item.shards)) for item in read_built(GalleryIndexManifest, opened)),
        calibrations=tuple(current_calibrations(opened)),
        products=tuple(_info(opened.part(name)) for name in (opened.products if opened.is_of_products else ())),
    )
