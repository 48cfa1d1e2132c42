"""The bank's manifest: a file that describes one committed state, and is replaced as a whole."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from spade_faiss.bank.shards import ShardEntry
from spade_faiss.core.errors import BankError, NotFoundError
from spade_faiss.core.hints import fit_command
from spade_faiss.core.settings import Source
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.features.layout import Layout

FORMAT = "spade_faiss bank"
SCHEMA = 3

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Event:
    """An entry of a bank's history: an `action` on a number of `images`, which ended with the commit of `generation`."""

    generation: int
    time: str
    action: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed state of a bank.

    Args:
        generation: the number of commits that led to it.
        layout: the shapes and settings that all features of the bank share.
        source: the backbone and preprocessing that made the features; None for those of another extractor.
        weights_file: where the backbone's weights were loaded from; None for published weights.
        shards: the files that hold the features, in the order of their rows.
        versions: the versions of the libraries that wrote this state.
        history: what was done to the bank.
    """

    generation: int
    layout: Layout
    source: Source | None
    weights_file: str | None
    shards: tuple[ShardEntry, ...]
    versions: dict[str, str]
    history: tuple[Event, ...] = ()

    def next(self, action: str, images: int, shards: tuple[ShardEntry, ...], *, continued: bool = False) -> Manifest:
        """Return the manifest of the next commit.

        Args:
            action: what the commit does, for the history.
            images: the number of images that it concerns.
            shards: the shards after it.
            continued: whether it belongs to the same command as the commit before; two of the same action become one event.
        """
        generation, history = self.generation + 1, self.history
        if continued and history and history[-1].action == action:
            images, history = images + history[-1].images, history[:-1]
        event = Event(generation=generation, time=datetime.now(UTC).isoformat(timespec="seconds"), action=action, images=images)
        return replace(self, generation=generation, shards=shards, versions=versions(), history=(*history, event))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a state of the bank in `folder`: from now on, whoever opens the bank sees it."""
    write_signed(folder / MANIFEST, FORMAT, SCHEMA, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read the committed state of the bank in `folder`.

    Raises:
        NotFoundError: if there is no bank.
        BankError: if the manifest is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"there is no bank at {folder} (no {MANIFEST}); make one with: {fit_command(folder)}")
    manifest = read_signed(path, Manifest, FORMAT, SCHEMA, "restore it from a backup")
    least = manifest.layout.image_bytes
    for shard in manifest.shards:
        if not 0 < shard.count * least <= shard.bytes:
            raise BankError(f"{path} is damaged: {shard.file} cannot hold {shard.count} images in {shard.bytes} bytes")
        if list(shard.removed) != sorted(set(shard.removed)) or not all(0 <= at < shard.count for at in shard.removed):
            raise BankError(f"{path} is damaged: {shard.file} has {shard.count} images, removed are {shard.removed}")
    return manifest


def versions() -> dict[str, str]:
    """Return the versions of the libraries that write a bank."""
    packages = {name: version(name) for name in ("spade-faiss", "h5py", "numpy")}
    return {**packages, "python": platform.python_version()}
