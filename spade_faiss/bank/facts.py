"""What identifies a bank, and its size, for reports and `info`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spade_faiss.bank.as_plain import named_layout, named_source
from spade_faiss.bank.snapshot import Snapshot


def facts_of(bank: Snapshot) -> dict[str, Any]:
    """Return what identifies the bank, and its size, for reports and `info`."""
    source = bank.manifest.source
    return {
        "path": bank.name,
        "generation": bank.generation,
        "images": len(bank.pictures),
        "entries": len(bank),
        "shards": len(bank.manifest.shards),
        "bytes": bank.bytes_on_disk,
        "bytes_per_image": round(bank.bytes_on_disk / max(1, len(bank.pictures))),
        **named_layout(bank.layout),
        "store": str(bank.layout.store),
        "codes": None if bank.manifest.codes is None else asdict(bank.manifest.codes),
        "source": None if source is None else named_source(source),
        "augment": None if bank.manifest.augment is None else asdict(bank.manifest.augment),
        "group_by": None if bank.manifest.grouping is None else str(bank.manifest.grouping),
        "groups": None if bank.siblings is bank.pictures else len(bank.siblings),
        "products_by": None if bank.manifest.products is None else str(bank.manifest.products),
        "product": bank.product or None,
        "network": None if bank.manifest.network is None else asdict(bank.manifest.network),
        "usual": asdict(bank.usual),
        "versions": bank.manifest.versions,
    }
