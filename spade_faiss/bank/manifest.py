"""The bank's manifest: one committed state, as a file that is replaced whole."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from spade_faiss.bank.shards import ShardEntry
from spade_faiss.core.errors import BankError, InputError, NotFoundError
from spade_faiss.core.schema import from_mapping
from spade_faiss.core.settings import Source
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.features.layout import Layout

FORMAT = "spade_faiss bank"
SCHEMA = 3

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Event:
    """What was done to a bank: `action` on so many `images`, by the commits up to `generation`."""

    generation: int
    time: str
    action: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed state of a bank."""

    generation: int
    layout: Layout
    source: Source | None
    weights_file: str | None
    shards: tuple[ShardEntry, ...]
    versions: dict[str, str]
    history: tuple[Event, ...] = ()

    def next(self, action: str, images: int, shards: tuple[ShardEntry, ...], *, continued: bool = False) -> Manifest:
        """The state that follows; `continued` joins what was done to the last event, if that is of the same kind."""
        generation, history = self.generation + 1, self.history
        if continued and history and history[-1].action == action:
            images, history = images + history[-1].images, history[:-1]
        event = Event(generation=generation, time=datetime.now(UTC).isoformat(timespec="seconds"), action=action, images=images)
        return replace(self, generation=generation, shards=shards, versions=versions(), history=(*history, event))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a state of the bank in `folder`."""
    write_signed(folder / MANIFEST, FORMAT, SCHEMA, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The committed state of the bank in `folder`.

    Raises:
        NotFoundError: if there is no bank.
        BankError: if the manifest is damaged or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"there is no bank at {folder} (no {MANIFEST}); make one with: spade-faiss fit IMAGES --bank {folder}"
        )
    _, content = read_signed(path, FORMAT, (SCHEMA,), "restore it from a backup")
    try:
        manifest = from_mapping(Manifest, content, str(path))
    except InputError as error:
        raise BankError(str(error)) from error
    least = manifest.layout.image_bytes
    for shard in manifest.shards:
        if not 0 < shard.count * least <= shard.bytes:
            raise BankError(f"{path} is damaged: {shard.file} cannot hold {shard.count} images in {shard.bytes} bytes")
        if list(shard.removed) != sorted(set(shard.removed)) or not all(0 <= at < shard.count for at in shard.removed):
            raise BankError(f"{path} is damaged: {shard.file} has {shard.count} images, removed are {shard.removed}")
    return manifest


def versions() -> dict[str, str]:
    """Of what writes a bank."""
    packages = {name: version(name) for name in ("spade-faiss", "h5py", "numpy")}
    return {**packages, "python": platform.python_version()}
