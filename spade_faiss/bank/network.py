"""The network that a bank carries, so that it can be used where neither torch nor the weights are."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spade_faiss.core.copies import copy_of, fetched
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.extraction import Source
from spade_faiss.core.files import FileEntry, check_file, hash_file, write_bytes
from spade_faiss.core.inside import check_inside, read_regular
from spade_faiss.core.schema import is_finite
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.forward.choice import open_forward
from spade_faiss.features.forward.graph import check_graph
from spade_faiss.features.forward.probe import Probe
from spade_faiss.features.layout import Layout

if TYPE_CHECKING:
    from spade_faiss.features.proof import ExportedNetwork

NETWORK = "network"

_REMEDY = "restore it from a backup, or pass --engine torch"
# Protobuf's own limit.
_MOST_GRAPH_BYTES = (1 << 31) - 1
_MOST_LIMIT = 1.0
# Names of files may have 128 characters.
_MOST_STEM = 100


@dataclass(frozen=True, kw_only=True)
class NetworkEntry:
    """A manifest's record of the network that a bank carries.

    Args:
        graph: the exported network, an ONNX file.
        probe: one input and its features, float32: the input (3, H, W), the embedding, the map of each level (H, W, C).
        differences: engine -> how far its features were from torch's float32 when the bank was made, see
            `features.forward.probe.difference`.
        limit: how far from the probe an engine may be.
    """

    graph: FileEntry
    probe: FileEntry
    differences: dict[str, float]
    limit: float

    def __post_init__(self) -> None:
        numbers = [self.limit, *self.differences.values()]
        if not all(is_finite(number) and number >= 0 for number in numbers) or not 0 < self.limit <= _MOST_LIMIT:
            raise InputError(f"limit={self.limit} with the differences {self.differences} cannot be those of a network")

    @property
    def bytes(self) -> int:
        """The bytes of both files."""
        return self.graph.bytes + self.probe.bytes


@dataclass(frozen=True, kw_only=True)
class CarriedNetwork:
    """The network that another bank carries: that bank's folder, and its record there."""

    folder: Path
    entry: NetworkEntry


def write_network(folder: Path, network: ExportedNetwork | CarriedNetwork) -> NetworkEntry:
    """Write a network into the bank in `folder`, named by the checksum of its weights.

    Raises:
        InputError: if the disk has no room for it.
        BankError: for the network of another bank that is missing or damaged there.
    """
    if isinstance(network, CarriedNetwork):
        return _copied(folder, network)
    return _written(folder, network)


def _own_suffix(folder: Path) -> str:
    """What is added to the name of a new file of the bank in `folder`: at a URL, others may write at the same time."""
    return "" if copy_of(folder) is None else f"-{secrets.token_hex(4)}"


def _copied(folder: Path, network: CarriedNetwork) -> NetworkEntry:
    (place := check_inside(folder, NETWORK)).mkdir(exist_ok=True)

    def copy(entry: FileEntry) -> FileEntry:
        stem, dot, kind = entry.file.rpartition(".")
        path = place / f"{stem[:_MOST_STEM]}{_own_suffix(folder)}{dot}{kind}"
        write_bytes(path, read_regular(_checked(network.folder, entry), _MOST_GRAPH_BYTES, _REMEDY))
        copied = FileEntry.of(path, hash_file(path))
        if copied.sha256 != entry.sha256:
            raise BankError(f"the network {network.folder / NETWORK / entry.file} is not the one that was written; {_REMEDY}")
        return copied

    return replace(network.entry, graph=copy(network.entry.graph), probe=copy(network.entry.probe))


def _written(folder: Path, exported: ExportedNetwork) -> NetworkEntry:
    place = check_inside(folder, NETWORK)
    place.mkdir(exist_ok=True)
    embedding, maps = exported.probe.features
    ours = _own_suffix(folder)
    contents = {
        "onnx": exported.graph,
        "probe": b"".join(part.astype("<f4").tobytes() for part in (exported.probe.inputs, embedding, *maps.values())),
    }
    entries = {}
    for kind, content in contents.items():
        path = place / f"{exported.source.weights_sha256}{ours}.{kind}"
        write_bytes(path, content)
        entries[kind] = FileEntry.of(path, hash_file(path))
    return NetworkEntry(
        graph=entries["onnx"], probe=entries["probe"], differences=dict(exported.differences), limit=exported.limit
    )


def _checked(folder: Path, entry: FileEntry) -> Path:
    """Return a file of the network; raise BankError if it is not the one that the manifest records, see `check_file`."""
    path = fetched(check_inside(folder, NETWORK, entry.file), entry.sha256)
    check_file(path, entry, f"the network {path}", "the manifest", _REMEDY)
    return path


def open_network(folder: Path, entry: NetworkEntry, source: Source, layout: Layout, engine: str) -> Backbone:
    """Open the network that the bank in `folder` carries, by an engine other than torch.

    Nothing of the file runs but operators of the ONNX standard on the inputs that it is given.

    Raises:
        BankError: if the files are missing, damaged, or hold anything but a network that makes features of the bank's layout.
        InputError: if the engine does not take it, or computes other features than the bank's.
    """
    names = tuple(level.name for level in layout.levels)
    forward = open_forward(engine, partial(_read_graph, folder, entry, names), names, source.precision, layout.input_size)
    backbone = Backbone.by_engine(forward, replace(source, engine=engine), layout.whole_levels, layout.embedding_dim)
    check_features(folder, entry, layout, backbone)
    return backbone


def check_features(folder: Path, entry: NetworkEntry, layout: Layout, backbone: Backbone) -> None:
    """Raise InputError if a backbone computes other features than the bank's: distances between them would mean nothing.

    Raises:
        BankError: if the probe is missing or damaged.
    """
    apart = read_probe(folder, entry, layout).difference(backbone)
    # Written so that NaN is refused, too.
    if not apart <= entry.limit:
        raise InputError(
            f"engine={backbone.engine!r} computes features here that differ by {apart:.1e} from those of the bank {folder}, "
            f"allowed are {entry.limit:.1e}: use another --engine, or make a new bank"
        )


def read_probe(folder: Path, entry: NetworkEntry, layout: Layout) -> Probe:
    """Read the probe of the bank in `folder`.

    Raises:
        BankError: if it is missing or damaged.
    """
    path = _checked(folder, entry.probe)
    shapes = [(1, 3, *layout.input_size), (1, layout.embedding_dim), *((1, *level.shape) for level in layout.levels)]
    sizes = [math.prod(shape) for shape in shapes]
    data = read_regular(path, 4 * sum(sizes), _REMEDY)
    if len(data) != 4 * sum(sizes):
        raise BankError(f"{path} is damaged: it holds {len(data)} bytes, expected {4 * sum(sizes)}; {_REMEDY}")
    parts = np.split(np.frombuffer(data, "<f4").astype(np.float32), np.cumsum(sizes)[:-1])
    inputs, embedding, *maps = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
    found: dict[str, FloatArray] = dict(zip((level.name for level in layout.levels), maps, strict=True))
    return Probe(inputs, (embedding, found))


def _read_graph(folder: Path, entry: NetworkEntry, levels: tuple[str, ...]) -> bytes:
    path = _checked(folder, entry.graph)
    data = read_regular(path, _MOST_GRAPH_BYTES, _REMEDY)
    try:
        check_graph(data, levels)
    except InputError as error:
        raise BankError(f"{path} is damaged: {error}; {_REMEDY}") from error
    return data
