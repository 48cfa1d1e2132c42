"""The bank's manifest: a file that describes one committed state, and is replaced as a whole."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spade_faiss.bank.codes import CodesEntry
from spade_faiss.bank.network import NETWORK, NetworkEntry
from spade_faiss.bank.places import MANIFEST, SHARDS
from spade_faiss.bank.shards import ShardEntry
from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.copies import copy_of
from spade_faiss.core.errors import BankError, InputError, NotFoundError
from spade_faiss.core.extraction import Source
from spade_faiss.core.files import FileEntry, check_sha256
from spade_faiss.core.grouping import Grouping
from spade_faiss.core.hints import fit_command
from spade_faiss.core.inside import is_regular
from spade_faiss.core.presets import Usual
from spade_faiss.core.schema import check_at_least, shorten
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.features.layout import Layout
from spade_faiss.storage.copy import bank_folder

FORMAT = "spade_faiss bank"
SCHEMA = 3

# What the settings of a bank may be. They say how much memory and time scoring takes, and may have been written by anybody. The
# number of commits and what is counted must stay within 64 bits.
_MOST_COMMITS = 1 << 53
_MOST_EVENTS = 10_000
_MOST_BYTES = 1 << 60
_MOST_INPUT_PIXELS = 1 << 20
_MOST_PIXELS_A_LOCATION = 1 << 12
_MOST_DIM = 1 << 20


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
        network: the network that the bank carries; None if it carries none.
        usual: how the bank is searched unless something else is asked for.
        history: what was done to the bank, the newest ten thousand commands of it.
        augment: the views that it holds of each picture beside the picture; None if it holds none.
        grouping: what says which pictures belong together; None if each is by itself.
        products: what says which product a picture shows; None for a bank of one product. Each shard is then of one.
        codes: how maps become codes; None in a bank that stores none, and before the first pictures are there.
    """

    generation: int
    layout: Layout
    source: Source | None
    weights_file: str | None
    shards: tuple[ShardEntry, ...]
    versions: dict[str, str]
    network: NetworkEntry | None = None
    usual: Usual = field(default_factory=Usual)
    history: tuple[Event, ...] = ()
    augment: Augmentation | None = None
    grouping: Grouping | None = None
    products: Grouping | None = None
    codes: CodesEntry | None = None

    def __post_init__(self) -> None:
        check_at_least("generation", self.generation, 0)
        if self.generation > _MOST_COMMITS:
            raise InputError(f"generation={self.generation} is more commits than a bank can have, {_MOST_COMMITS}")

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
        history = (*history, event)[-_MOST_EVENTS:]
        return replace(self, generation=generation, shards=shards, versions=versions(), history=history)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a state of the bank in `folder`: from now on, whoever opens the bank sees it."""
    content = {**asdict(manifest), "layout": manifest.layout.written()}
    # What older versions read.
    if manifest.products is None:
        del content["products"]
        for shard in content["shards"]:
            del shard["product"]
    if manifest.codes is None:
        del content["codes"]
    if not manifest.usual.method.level_weights:
        del content["usual"]["method"]["level_weights"]
    write_signed(folder / MANIFEST, FORMAT, SCHEMA, content, _files_of(folder, manifest))


def _files_of(folder: Path, manifest: Manifest) -> list[tuple[Path, FileEntry]]:
    """Return the files that a state of the bank in `folder` names."""
    network = () if manifest.network is None else (manifest.network.graph, manifest.network.probe)
    codes = () if manifest.codes is None else (manifest.codes,)
    return [
        *((folder / SHARDS / entry.file, entry) for entry in manifest.shards),
        *((folder / NETWORK / entry.file, entry) for entry in network),
        *((folder / entry.file, entry) for entry in codes),
    ]


def is_begun(folder: str | Path) -> bool:
    """Whether there is a bank in which anything was ever stored; one that was only begun may still be made otherwise."""
    folder = bank_folder(folder)
    return (folder / MANIFEST).is_file() and read_manifest(folder).generation > 0


def read_manifest(folder: Path) -> Manifest:
    """Read the committed state of the bank in `folder`.

    Raises:
        NotFoundError: if there is no bank.
        BankError: if the manifest is damaged, of another version, a link or no file, or says what no bank can be like.
        AccessError: if the operating system does not open it.
    """
    path = folder / MANIFEST
    if (copy := copy_of(folder)) is not None:
        copy.refresh(whole=False)
    if not is_regular(path):
        raise NotFoundError(f"there is no bank at {folder} (no {MANIFEST}); make one with: {fit_command(folder)}")
    manifest = read_signed(path, Manifest, FORMAT, SCHEMA, "restore it from a backup", _wrong_levels)
    if wrong := _wrong_settings(manifest.layout) or _wrong_shards(manifest) or _wrong_codes(manifest):
        raise BankError(f"{path} is damaged: {wrong}; restore it from a backup")
    least = manifest.layout.image_bytes
    for shard in manifest.shards:
        if not 0 < shard.count * least <= shard.bytes:
            raise BankError(f"{path} is damaged: {shard.file} cannot hold {shard.count} images in {shard.bytes} bytes")
        if list(shard.removed) != sorted(set(shard.removed)) or not all(0 <= at < shard.count for at in shard.removed):
            raise BankError(f"{path} is damaged: {shard.file} has {shard.count} images, removed are {shorten(shard.removed)}")
    return manifest


def _wrong_levels(manifest: Manifest, content: dict[str, Any]) -> str:
    """Say where levels contradict the settings that a layout computes them from; empty if nowhere."""
    layout = manifest.layout
    written = json.loads(json.dumps(layout.written()["levels"]))  # as a file has it: tuples are lists
    for level, found in zip(written, content["layout"]["levels"], strict=True):
        for name in dict.fromkeys([*level, *found]):
            if level.get(name) != found.get(name):
                return (
                    f"level {shorten(level['name'])} is said to have {name}={shorten(found.get(name))}; by the settings of the "
                    f"bank, {layout.store}, it has {shorten(level.get(name))}"
                )
    return ""


def _wrong_settings(layout: Layout) -> str:
    """Say which setting of a layout no bank can have; empty if none."""
    height, width = layout.input_size
    locations = max(level.height * level.width for level in layout.levels)
    if height * width > (most := max(_MOST_INPUT_PIXELS, _MOST_PIXELS_A_LOCATION * locations)):
        return f"input_size={layout.input_size} is more than {most} pixels for maps of up to {locations} locations"
    if layout.embedding_dim > _MOST_DIM:
        return f"embedding_dim={layout.embedding_dim} is more than {_MOST_DIM}"
    return ""


def _wrong_shards(manifest: Manifest) -> str:
    """Say what is wrong with the list of shards; empty if nothing is."""
    if sum(shard.bytes for shard in manifest.shards) > _MOST_BYTES:
        return f"its shards take more than {_MOST_BYTES} bytes"
    if manifest.shards and not manifest.generation:
        return "it lists shards, but no commit"
    seen: set[str] = set()
    for shard in manifest.shards:
        if shard.file in seen or shard.sha256 in seen:
            return f"it lists shard {shard.file} twice"
        try:
            check_sha256(shard.sha256)
        except InputError as error:
            return str(error)
        if bool(shard.product) != (manifest.products is not None):
            has = f"is of product {shorten(shard.product)}" if shard.product else "is of no product"
            return f"shard {shard.file} {has}, the bank is of {'several' if manifest.products is not None else 'one'}"
        seen |= {shard.file, shard.sha256}
    return ""


def _wrong_codes(manifest: Manifest) -> str:
    """Say what is wrong with the record of the codes; empty if nothing is."""
    codes, store = manifest.codes, manifest.layout.store
    if codes is None:
        return f"its shards are said to hold {store}, and no codes are named" if manifest.shards and store.is_coded else ""
    if not store.is_coded:
        return f"it names codes, and its shards are said to hold {store}"
    try:
        check_sha256(codes.sha256)
    except InputError as error:
        return str(error)
    return ""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that write a bank."""
    from importlib.metadata import version  # takes as long to import as a picture takes to score, which asks for no versions

    packages = {name: version(name) for name in ("spade-faiss", "h5py", "numpy")}
    return {**packages, "python": platform.python_version()}
