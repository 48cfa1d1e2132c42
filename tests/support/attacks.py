"""Banks that somebody tampered with on purpose, and what every command does with them.

`python -m tests.support.attacks FOLDER STORE SEED FIRST STEP` tries every STEP-th attack from FIRST on, on a bank that
stores maps as STORE, each in a process of its own, and prints a line of JSON for each: what was attacked, and what went wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import h5py
import numpy as np
import onnx

import spade_faiss.features.loading
from spade_faiss.bank.bank import Bank
from spade_faiss.cli import main
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.files import FileEntry, hash_file
from spade_faiss.core.settings import Method, Run
from spade_faiss.index.build import build_index
from spade_faiss.scoring.detector import Detector
from spade_faiss.search.recipe import load_recipe
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.extract import extract
from tests.support.backbones import tiny_backbone
from tests.support.image_files import noise, save
from tests.support.manifests import edit_manifest

# The most that a command may take, in seconds, and in memory beside what it takes with a bank that nobody tampered with.
LIMIT_S = 10
LIMIT_BYTES = 512 << 20
# What stops an attack that works before the machine is out of memory.
_MOST_ADDRESSES = 16 << 30

NAME = "resnet18"
RECIPES = ("hnsw", "ivf", "history")
IMAGES = 20

Attack = Callable[[Path, Path], object]  # takes the bank, and a folder outside of it that must not change


def make(folder: Path, store: str) -> Path:
    """Make a bank of twenty images with three indexes and a calibration, and two images to score and add; return it."""
    for number in range(IMAGES):
        save(noise(24, 24, number), folder / "good" / f"{number:02d}.png")
    save(noise(24, 24, 100), folder / "new" / "new.png")
    save(noise(24, 24, 101), folder / "more" / "more.png")
    network, path = tiny_backbone(name=NAME), folder / "bank"
    extraction = Extraction(backbone=network, store=store)
    extract(folder / "good", bank=path, preset="spade", extraction=extraction, run=Run(progress=False))
    bank = Bank.open(path)
    bank.remove(["03.png"])
    for name in RECIPES:
        build_index(bank, load_recipe(name))
    calibrate(Detector.open(path, method=Method(), backbone=network))
    return path


def outside_of(folder: Path) -> Path:
    """Make a folder of files that no command may touch."""
    outside = folder / "outside"
    for name in ("text.txt", "folder/a.h5", "folder/1-0123456789abcdef", "folder/.spade-0123.tmp", "folder/inner/x.faiss"):
        path = outside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the user's own: {name}")
        os.utime(path, ns=(10**18, 10**18))
    save(noise(16, 16, 7), outside / "secret.png")
    return outside


def watched(folder: Path) -> dict[str, Any]:
    """Return all names below a folder, with kinds, modes, times and contents."""
    found: dict[str, Any] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        # Where an attack puts a hard link or a pipe, the number of names changes, and nothing else.
        found[str(path)] = (status.st_mode, status.st_size if content is not None else 0, status.st_mtime_ns, content)
    return found


# ---- attacks


def in_place_of(name: str, put: Callable[[Path, Path], object]) -> Attack:
    """Put something else where a file or a folder of the bank may be."""

    def attack(bank: Path, outside: Path) -> None:
        path = bank / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        put(path, outside)

    return attack


def moved_outside(name: str) -> Attack:
    """Move a file or a folder of the bank outside, and link to it: everything would work."""

    def attack(bank: Path, outside: Path) -> None:
        path, target = bank / name, outside / "moved"
        if path.exists():
            shutil.move(path, target)
        else:
            target.mkdir()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    return attack


def put_socket(path: Path, _: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


PUT: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file": lambda path, outside: path.symlink_to(outside / "text.txt"),
    "a link to a folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "a link to nothing": lambda path, outside: path.symlink_to(outside / "nothing"),
    "a link to itself": lambda path, _: path.symlink_to(path),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a socket": put_socket,
    "another name of a file": lambda path, outside: os.link(outside / "text.txt", path),
    "a folder": lambda path, _: path.mkdir(),
}


def places(bank: Path) -> list[str]:
    """Return where files and folders of a bank are, or may be."""
    there = [str(path.relative_to(bank)) for path in sorted(bank.rglob("*")) if path.parent.name != ".readers"]
    maybe = [
        ".lock",
        ".writer.json",
        ".readers",
        ".readers/1-0123456789abcdef",
        "indexes/hnsw/.lock",
        "indexes/hnsw/.writer.json",
    ]
    return sorted({*there, *maybe})


# Where a command would look for leftovers, and where the next one would write.
MORE_PLACES = (
    ".spade-0123.tmp",
    "features/.spade-0123.tmp",
    "features/000004.h5",
    "features/more.h5",
    "indexes/hnsw/.spade-0123.tmp",
    "indexes/hnsw/image-000001.faiss",
    "indexes/ivf/gallery/trained-001.h5",
    "calibration/more.json",
)


def raw(name: str, data: bytes) -> Attack:
    """Put other bytes in the place of a file, and sign nothing."""

    def attack(bank: Path, _: Path) -> None:
        (bank / name).unlink()
        (bank / name).write_bytes(data)

    return attack


# As long as a file of JSON may be.
JSON = {
    "nested deep": b"[" * 200_000,
    "nested as deep as is read": b'{"format": ' + b"[" * 960 + b"]" * 960 + b"}",
    "lists in lists": b"[" + (b"[" * 900 + b"]" * 900 + b",") * 4_500 + b"0]",
    "many lists": b"[" + b"[]," * 2_700_000 + b"[]]",
    "a number of many digits": b'{"format": ' + b"9" * 100_000 + b"}",
    "a number beyond all": b'{"format": 1e400}',
    "no text": b"\xff\xfe\x00",
    "nothing": b"",
    "null": b"null",
}


def signed_as(name: str, change: Callable[[Any], object]) -> Attack:
    """Change a manifest, and sign it."""
    return lambda bank, _: edit_manifest(bank / name, change)


def emptied(**layout: Any) -> Attack:
    """Leave no shard, so that no file says how long anything may be."""

    def change(content: Any) -> None:
        content["shards"] = []
        content["layout"].update(layout)

    return signed_as("manifest.json", change)


MANIFESTS: dict[str, Attack] = {
    "a long history": signed_as("manifest.json", lambda m: m.update(history=m["history"][:1] * 30_000)),
    "many versions": signed_as("manifest.json", lambda m: m.update(versions={str(n): "\x1b[31m" for n in range(250_000)})),
    "many images removed": signed_as("manifest.json", lambda m: m["shards"][0].update(removed=list(range(800_000)))),
    "all images removed": signed_as("manifest.json", lambda m: m["shards"][0].update(removed=list(range(IMAGES)))),
    "many levels": signed_as(
        "manifest.json",
        lambda m: m["layout"].update(levels=[{**m["layout"]["levels"][0], "name": str(n)} for n in range(30_000)]),
    ),
    "no shards, and long embeddings": emptied(embedding_dim=1 << 40),
}

SETTINGS: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    *(("manifest.json", ("source", "backbone"), name) for name in ("timm:" + "x" * 1_000_000, "timm:hf-hub:a/b", "\x1b[31m")),
    *(
        ("manifest.json", ("weights_file",), path)
        for path in ("/dev/zero", "/proc/self/mem", "/etc/passwd", "\ud800", "x" * 1_000_000)
    ),
    *(
        ("indexes/hnsw/index.json", ("factory",), factory)
        for factory in ("HNSW0", "HNSW1", "NSG0", "IMI3x10,Flat", "IVF131072_HNSW512,PQ8x12", "PQ131072x1", "(" * 90, "LSH24rt")
    ),
    *(("indexes/ivf/gallery.json", ("settings", "train_vectors"), count) for count in (1 << 40, 10**300)),
    ("indexes/history/gallery.json", ("settings", "train_images"), 10**18),
    ("indexes/ivf/gallery.json", ("gallery",), "../../x"),
)

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 1 << 31, (1 << 63) - 1, 1 << 64, 10**300, 1.5, -1e308, 1e-300, 10**9 + 1),
    *(
        "",
        ".",
        "..",
        "../../outside/text.txt",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "x" * 100_000,
        "IVF9999999,Flat",
        "HNSW9999999",
    ),
    *("PQ8x24", "LSQ64x8", "\x1b[31m", "timm:hf-hub:somebody/model", "0" * 64),
    *([], [[]], {}, {"x": 1}, [0] * 1000),
)


def leaves(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values of a JSON document, inner ones included."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at, *(leaf for key, item in items for leaf in leaves(item, (*at, key)))]


def signed(name: str, place: tuple[Any, ...], value: Any) -> Attack:
    """Put another value into a manifest, and sign it."""

    def change(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return lambda bank, _: edit_manifest(bank / name, change)


def record(bank: Path, file: Path) -> None:
    """Put the size, the time and the checksum of a file into the manifest that names it, and sign that."""
    new = vars(FileEntry.of(file, hash_file(file)))

    def change(content: Any) -> None:
        for value in content.values() if isinstance(content, dict) else content:
            if isinstance(value, dict | list):
                change(value)
        if isinstance(content, dict) and content.get("file") == file.name:
            content.update(new)

    for manifest in (bank / "manifest.json", *(bank / "indexes").glob("*/*.json")):
        if manifest.parent in file.parents:
            with contextlib.suppress(FileNotFoundError):
                edit_manifest(manifest, change)


def arrays_changed(name: str, change: Callable[[h5py.File], object]) -> Attack:
    """Change an HDF5 file of a bank, and sign what names it."""

    def attack(bank: Path, _: Path) -> None:
        file = bank / name
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
        with h5py.File(file, "r+") as opened:
            change(opened)
        record(bank, file)

    return attack


def bytes_changed(name: str, change: Callable[[bytes, random.Random], bytes], seed: int) -> Attack:
    """Change the bytes of a file, and sign what names it."""

    def attack(bank: Path, _: Path) -> None:
        file = bank / name
        data = change(file.read_bytes(), random.Random(seed))
        file.unlink()
        file.write_bytes(data)
        record(bank, file)

    return attack


def put_array(file: h5py.File, name: str, values: Any, **options: Any) -> None:
    """Put another array in the place of one."""
    if name in file:
        del file[name]
    file.create_dataset(name, data=values, **options)


def virtual(file: h5py.File, name: str) -> None:
    """Make an array that takes its values from another file."""
    shape, dtype = file[name].shape, file[name].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource("../../outside/folder/a.h5", name, shape, dtype)
    del file[name]
    file.create_virtual_dataset(name, layout)


def external(file: h5py.File, name: str) -> None:
    """Make an array whose values are the bytes of another file."""
    shape, dtype = file[name].shape, file[name].dtype
    size = int(np.prod(shape)) * dtype.itemsize
    del file[name]
    file.create_dataset(name, shape, dtype, external=[("../../outside/text.txt", 0, size)])


def link(file: h5py.File, name: str, target: Any) -> None:
    del file[name]
    file[name] = target


def values_changed(name: str, value: float) -> Callable[[h5py.File], object]:
    """Change the last value of an array; of whole numbers, to the largest one."""

    def change(file: h5py.File) -> None:
        values = file[name][...]
        values.reshape(-1)[-1] = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else value
        with np.errstate(over="ignore"):
            file[name][...] = values

    return change


ARRAYS: dict[str, Callable[[h5py.File, str], object]] = {
    "NaN": lambda file, name: values_changed(name, np.nan)(file),
    "infinite": lambda file, name: values_changed(name, np.inf)(file),
    "3e38": lambda file, name: values_changed(name, 3e38)(file),
    "big-endian": lambda file, name: put_array(file, name, file[name][...].astype(file[name].dtype.newbyteorder(">"))),
    "compressed": lambda file, name: put_array(file, name, file[name][...], compression="gzip"),
    "chunked": lambda file, name: put_array(file, name, file[name][...], chunks=True),
    "of doubles": lambda file, name: put_array(file, name, file[name][...].astype(np.float64)),
    "one row less": lambda file, name: put_array(file, name, file[name][:-1]),
    "one axis less": lambda file, name: put_array(file, name, file[name][...].reshape(-1)),
    "virtual": virtual,
    "external": external,
    "a soft link": lambda file, name: link(file, name, h5py.SoftLink("/image/id")),
    "an external link": lambda file, name: link(file, name, h5py.ExternalLink("../../outside/folder/a.h5", "/x")),
    "gone": lambda file, name: file.__delitem__(name),
    "huge": lambda file, name: (
        file.__delitem__(name),
        file.create_dataset(name, (1 << 40, 1 << 10), np.float32, chunks=(1 << 10, 1 << 10)),
    ),
    "a group": lambda file, name: (file.__delitem__(name), file.create_group(name)),
}


def numbered(prefix: bytes) -> Any:
    """Return distinct texts, one for each image."""
    return np.array([prefix + b"%d" % number for number in range(IMAGES)])


TEXTS: dict[str, Callable[[h5py.File], object]] = {
    "an id twice": lambda file: put_array(file, "image/id", np.full(IMAGES, b"a")),
    "empty ids": lambda file: put_array(file, "image/id", np.full(IMAGES, b"")),
    "ids of variable length": lambda file: put_array(
        file, "image/id", [f"{n}" for n in range(IMAGES)], dtype=h5py.string_dtype()
    ),
    "ids that are no UTF-8": lambda file: put_array(file, "image/id", np.array([b"\xff%d" % n for n in range(IMAGES)])),
    "ids with a NUL": lambda file: put_array(file, "image/id", np.array([b"a\0%d" % n for n in range(IMAGES)])),
    "an attribute of variable length": lambda file: file.attrs.__setitem__("root", "x" * 100),
    "a long attribute": lambda file: file.attrs.create("root", np.zeros(60_000, np.uint8)),
    "escapes in ids": lambda file: put_array(file, "image/id", numbered(b"\x1b]0;x\x07\x1b[31m\n")),
    "markup in ids": lambda file: put_array(file, "image/id", numbered(b"<script>x()</script>")),
    "paths in ids": lambda file: put_array(file, "image/id", numbered(b"../../outside/folder/")),
    "long ids": lambda file: put_array(file, "image/id", numbered(b"x" * (1 << 20))),
    "references": lambda file: put_array(file, "image/id", np.array([file.ref] * IMAGES, h5py.ref_dtype)),
    "records": lambda file: put_array(file, "image/id", np.zeros(IMAGES, [("a", "f4"), ("b", "S4")])),
    "many arrays of long names": lambda file: [file.create_dataset("x" * 900 + f"{n}", data=[0]) for n in range(3000)],
    "many attributes": lambda file: [file.attrs.create(f"{n}", np.bytes_(b"x" * 60_000)) for n in range(60)],
    "groups in groups": lambda file: file.create_dataset("/".join("abcdefghijkl"), data=[0]),
    "a group in itself": lambda file: file.__setitem__("image/again", file["/"]),
    "a named type": lambda file: file.__setitem__("type", np.dtype("f8")),
    "another array": lambda file: file.create_dataset("image/more", data=np.zeros(3)),
    "the first array is a list of names": lambda file: file.attrs.__setitem__("arrays", np.bytes_(b"image/id")),
}


def pictures_at(path: str, *, digest: bytes | None) -> Callable[[h5py.File], object]:
    """Let every image of a shard be another file, with a checksum or without one."""

    def change(file: h5py.File) -> None:
        put_array(file, "image/path", np.full(IMAGES, os.fsencode(path)))
        del file["image/sha256"]
        names = [name for name in str(file.attrs["arrays"], "utf-8").split("\n") if name != "image/sha256"]
        if digest is not None:
            file.create_dataset("image/sha256", data=np.full(IMAGES, digest))
            names.append("image/sha256")
        file.attrs["arrays"] = np.bytes_("\n".join(sorted(names)).encode())

    return change


def index_replaced(make_index: Callable[[Path, Path, Any], Any], name: str = "hnsw") -> Attack:
    """Put another FAISS index in the place of one, and sign what names it."""

    def attack(bank: Path, outside: Path) -> None:
        (file,) = (bank / "indexes" / name).glob("*.faiss")
        before = faiss.read_index(str(file))
        file.unlink()
        faiss.write_index(make_index(bank, outside, before), str(file))
        record(bank, file)

    return attack


def on_disk(bank: Path, outside: Path, before: Any) -> Any:
    """Make an index whose lists are another file, which FAISS would open for writing."""
    vectors = np.random.default_rng(0).random((before.ntotal, before.d), np.float32)
    index: Any = faiss.index_factory(before.d, "IVF1,Flat")
    index.train(vectors)
    index.add(vectors)
    lists: Any = faiss.OnDiskInvertedLists(1, index.code_size, str(outside / "lists"))
    lists.merge_from_1(index.invlists)
    index.replace_invlists(lists, False)
    lists.this.disown()  # the index keeps it
    index.own_invlists = True
    return index


def other_index(factory: str, *, extra_d: int = 0, extra: int = 0, metric: int = faiss.METRIC_L2) -> Callable[..., Any]:
    """Make an index of another kind, length, size or metric."""

    def make_index(_: Path, __: Path, before: Any) -> Any:
        vectors = np.random.default_rng(0).random((before.ntotal + extra, before.d + extra_d), np.float32)
        index = faiss.index_factory(before.d + extra_d, factory, metric)
        index.train(vectors)
        index.add(vectors)
        return index

    return make_index


def graph_changed(change: Callable[[Any], object]) -> Callable[..., Any]:
    """Change the graph of an HNSW index."""

    def make_index(_: Path, __: Path, before: Any) -> Any:
        change(before.hnsw)
        return before

    return make_index


def filled(vector: Any, value: int) -> None:
    faiss.copy_array_to_vector(np.full(vector.size(), value, faiss.vector_to_array(vector).dtype), vector)


INDEXES: dict[str, Callable[..., Any]] = {
    "lists on disk": on_disk,
    "a flat index": other_index("Flat"),
    "an IVF index": other_index("IVF1,Flat"),
    "a graph of other codes": other_index("HNSW32,SQ8"),
    "a graph of another width": other_index("HNSW8"),
    "vectors of another length": other_index("HNSW32", extra_d=1),
    "more entries": other_index("HNSW32", extra=1),
    "inner products": other_index("HNSW32", metric=faiss.METRIC_INNER_PRODUCT),
    "other vectors": other_index("HNSW32"),
    "a transform before it": other_index("PCA2,HNSW32"),
    "another entry": graph_changed(lambda graph: setattr(graph, "entry_point", -1)),
    "an entry out of range": graph_changed(lambda graph: setattr(graph, "entry_point", 1 << 30)),
    "a level that is not there": graph_changed(lambda graph: setattr(graph, "max_level", 1000)),
    "a large beam": graph_changed(lambda graph: setattr(graph, "efSearch", (1 << 31) - 1)),
    "a large beam for adding": graph_changed(lambda graph: setattr(graph, "efConstruction", (1 << 31) - 1)),
    "neighbors out of range": graph_changed(lambda graph: filled(graph.neighbors, 1 << 30)),
    "no neighbors": graph_changed(lambda graph: filled(graph.neighbors, -1)),
    "one neighbor": graph_changed(lambda graph: filled(graph.neighbors, 0)),
    "offsets out of range": graph_changed(lambda graph: filled(graph.offsets, 1 << 40)),
    "levels out of range": graph_changed(lambda graph: filled(graph.levels, 1 << 20)),
}


def network_replaced(kind: str, change: Callable[[bytes, Path], bytes]) -> Attack:
    """Put another file in the place of one of the network, and sign it."""

    def attack(bank: Path, outside: Path) -> None:
        (file,) = (bank / "network").glob(f"*.{kind}")
        data = change(file.read_bytes(), outside)
        file.unlink()
        file.write_bytes(data)
        record(bank, file)

    return attack


def model_changed(change: Callable[[Any, Path], object]) -> Attack:
    """Change the graph of the network."""

    def changed(data: bytes, outside: Path) -> bytes:
        model = onnx.load_from_string(data)
        change(model, outside)
        found: bytes = model.SerializeToString()
        return found

    return network_replaced("onnx", changed)


def weights_outside(model: Any, outside: Path) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(outside / "text.txt"))


def outer_product(model: Any, _: Path) -> None:
    """Ask for 40 GB."""
    count, name = 100_000, model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_before" if output == name else output for output in node.output]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.ones(shape, np.float32), letter)
        for letter, shape in (("column", (count, 1)), ("row", (1, count)))
    )
    model.graph.node.extend(
        [
            onnx.helper.make_node("ReduceSum", ["input"], ["all"], keepdims=0),
            onnx.helper.make_node("Add", ["column", "all"], ["moved"]),
            onnx.helper.make_node("MatMul", ["moved", "row"], ["large"]),
            onnx.helper.make_node("ReduceMax", ["large"], ["small"], keepdims=0),
            onnx.helper.make_node("Add", [f"{name}_before", "small"], [name]),
        ]
    )


NETWORKS: dict[str, Attack] = {
    "of a stranger's operators": model_changed(lambda model, _: setattr(model.graph.node[0], "domain", "evil")),
    "with weights in another file": model_changed(weights_outside),
    "that asks for 40 GB": model_changed(outer_product),
    "with a loop": model_changed(lambda model, _: setattr(model.graph.node[0], "op_type", "Loop")),
    "of another shape": model_changed(lambda model, _: model.graph.node.pop(0)),
    "that is empty": network_replaced("onnx", lambda *_: b""),
    "that is not one": network_replaced("onnx", lambda *_: b"no network"),
    "of many fields": network_replaced("onnx", lambda *_: b"\x08\x01" * (1 << 22)),
    "with a probe that is no number": network_replaced("probe", lambda data, _: b"\xff" * len(data)),
    "with a short probe": network_replaced("probe", lambda data, _: data[:-4]),
    "with a long probe": network_replaced("probe", lambda data, _: data + bytes(1 << 24)),
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Turn bits over, put in large numbers, repeat or leave out a part."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found))
        kind = rng.choice(("flip", "flip", "number", "cut", "repeat"))
        if kind == "flip":
            found[place] ^= 1 << rng.randrange(8)
        elif kind == "number":
            found[place : place + 8] = rng.choice((1 << 62, 1 << 40, 1 << 31, (1 << 64) - 1, 0)).to_bytes(8, "little")
        elif kind == "cut":
            del found[place : place + rng.randint(1, 64)]
        else:
            found[place:place] = found[place : place + rng.randint(1, 64)]
    return bytes(found)


def attacks(bank: Path, seed: int) -> list[tuple[str, Attack]]:
    """Return all attacks on a bank, each with what it does; the same for the same seed."""
    rng, found = random.Random(seed), []
    for name in (*places(bank), *MORE_PLACES):
        found += [(f"{what} in place of {name}", in_place_of(name, put)) for what, put in PUT.items()]
        found.append((f"a link to its content in place of {name}", moved_outside(name)))
    manifests = sorted(str(path.relative_to(bank)) for path in bank.rglob("*.json"))
    for name in manifests:
        content = json.loads((bank / name).read_text())
        spots = [place for place in leaves(content) if place and place[0] not in ("sha256", "format", "schema")]
        for place in rng.sample(spots, min(25, len(spots))):
            value = rng.choice(VALUES)
            found.append((f"{name}: {place} = {str(value)[:40]!r}", signed(name, place, value)))
    for name in ("manifest.json", "indexes/ivf/gallery.json"):
        found += [(f"{name} is {what}", raw(name, data)) for what, data in JSON.items()]
    found += [(f"the manifest has {what}", attack) for what, attack in MANIFESTS.items()]
    found += [(f"{name}: {place} = {str(value)[:40]!r}", signed(name, place, value)) for name, place, value in SETTINGS]
    found.append(
        (
            "a shard listed twice",
            lambda bank, _: edit_manifest(bank / "manifest.json", lambda m: m["shards"].append(m["shards"][0])),
        )
    )
    files = sorted(str(path.relative_to(bank)) for path in bank.rglob("*.h5"))
    for name in files:
        with h5py.File(bank / name) as opened:
            inside = [array for array in opened.attrs["arrays"].decode().split("\n") if opened[array].dtype.kind != "S"]
        for what, change in ARRAYS.items():
            array = rng.choice(inside)

            def changed(file: h5py.File, array: str = array, change: Callable[..., object] = change) -> None:
                change(file, array)

            found.append((f"{name}: {array} is {what}", arrays_changed(name, changed)))
        found += [(f"{name}: mutant {n}", bytes_changed(name, mutated, rng.randrange(1 << 30))) for n in range(8)]
    (shard,) = (name for name in files if name.startswith("features"))
    found += [(f"{shard}: {what}", arrays_changed(shard, text)) for what, text in TEXTS.items()]
    outside = bank.parent / "outside"
    for path in (outside / "secret.png", "/dev/zero", "/proc/self/mem", "/etc/passwd", bank.parent / "pipe"):
        for digest in (None, b"0" * 64):
            change_paths = arrays_changed(shard, pictures_at(str(path), digest=digest))
            found.append((f"pictures are {path}, checksum {digest!r}", change_paths))
    found += [(f"the index is {what}", index_replaced(make_index)) for what, make_index in INDEXES.items()]
    found += [(f"a network {what}", attack) for what, attack in NETWORKS.items()]
    for n in range(20):
        seed_of = rng.randrange(1 << 30)
        found.append(
            (
                f"the network: mutant {n}",
                network_replaced("onnx", lambda data, _, seed_of=seed_of: mutated(data, random.Random(seed_of))),  # type: ignore[misc]
            )
        )
    (index,) = (str(path.relative_to(bank)) for path in bank.rglob("*.faiss"))
    found += [(f"{index}: mutant {n}", bytes_changed(index, mutated, rng.randrange(1 << 30))) for n in range(30)]
    return found


# ---- what every command does


def commands(bank: Path) -> Iterator[list[str]]:
    """Yield the commands, with all that they need."""
    folder = bank.parent
    yield ["info", str(bank)]
    yield ["verify", str(bank), "--deep"]
    for recipe in ("exact", *RECIPES):
        out = str(folder / "out" / recipe)
        yield ["score", str(folder / "new"), "--bank", str(bank), "--out", out, "--recipe", recipe, "--quiet"]
    yield ["suspects", str(bank), "--out", str(folder / "out" / "suspects"), "--quiet"]
    yield ["calibrate", str(bank), "--quiet"]
    yield ["remove", "01.png", "--bank", str(bank)]
    yield ["restore", "01.png", "--bank", str(bank)]
    yield ["add", str(folder / "more"), "--bank", str(bank), "--quiet"]
    yield ["index", str(bank), "--update", "--quiet"]
    yield ["compact", str(bank)]
    yield ["index", str(bank), "--update", "--quiet"]


def run_all(bank: Path) -> list[dict[str, Any]]:
    """Run all commands on a bank in this process."""
    network = tiny_backbone(name=NAME)
    spade_faiss.features.loading.load_backbone = lambda *_, **__: network
    found = []
    for words in commands(bank):
        signal.alarm(LIMIT_S)
        said, shown = io.StringIO(), io.StringIO()
        code: object = None
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
                code = main(words)
        except BaseException:
            said.write(traceback.format_exc())
        signal.alarm(0)
        found.append({"command": words[0], "words": words, "code": code, "said": said.getvalue(), "shown": shown.getvalue()})
    return found


def in_a_process(bank: Path, answer: Path) -> tuple[int, int]:
    """Run all commands in a process of its own; return how it ended, and the memory that it took at most, in bytes."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (_MOST_ADDRESSES, _MOST_ADDRESSES))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            answer.write_text(json.dumps(run_all(bank)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    _, status, usage = os.wait4(child, 0)
    return status, usage.ru_maxrss * 1024


def try_attack(honest: Path, folder: Path, attack: Attack, most_bytes: int) -> dict[str, Any]:
    """Attack a copy of a bank, run all commands on it, and say what went wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(honest.parent, folder, symlinks=True)
    outside, bank = outside_of(folder), folder / honest.name
    os.mkfifo(folder / "pipe")
    attack(bank, outside)
    before = watched(outside)
    status, used = in_a_process(bank, answer := folder / "answer.json")
    wrong = []
    if os.WIFSIGNALED(status):
        wrong.append(f"ended by signal {signal.Signals(os.WTERMSIG(status)).name}")
    elif os.WEXITSTATUS(status):
        wrong.append("no answer")
    done = json.loads(answer.read_text()) if answer.exists() else []
    for command in done:
        # What is no error of ours is shown in a line, too.
        unforeseen = ("Traceback", "this is a bug of spade-faiss", "there is not enough memory", "[Errno")
        if command["code"] not in (0, 1) or any(words in command["said"] for words in unforeseen):
            wrong.append(f"{command['command']}: {command['said'][-1500:]}")
        errors = [line for line in command["said"].splitlines() if line.startswith("spade-faiss: error")]
        if len(errors) > 1 or any(len(line) > 2000 for line in errors):
            wrong.append(f"{command['command']}: more than a line: {command['said'][:500]}")
    if watched(outside) != before:
        after = watched(outside)
        wrong.append(f"changed outside: {[name for name in {*before, *after} if before.get(name) != after.get(name)]}")
    if most_bytes and used > most_bytes + LIMIT_BYTES:
        wrong.append(f"took {used >> 20} MiB, {most_bytes >> 20} MiB are usual")
    for page in (folder / "out").rglob("*.html") if (folder / "out").exists() else ():
        if b"the user's own" in page.read_bytes():
            wrong.append(f"{page.name} shows what lies outside")
    refused = [command["command"] for command in done if command["code"] == 1]
    return {"wrong": wrong, "refused": refused, "used": used, "said": [command["said"][:600] for command in done]}


def run(folder: Path, store: str, seed: int, first: int, step: int) -> Iterator[dict[str, Any]]:
    """Try every so many of all attacks; the first result is that of the bank that nobody attacked."""
    honest = make(folder / f"honest-{first}" / "made", store)
    at = folder / f"attack-{first}"
    usual = try_attack(honest, at, lambda *_: None, 0)
    yield {"attack": "none", **usual}
    for what, attack in attacks(honest, seed)[first::step]:
        yield {"attack": what, **try_attack(honest, at, attack, usual["used"])}
    shutil.rmtree(at, ignore_errors=True)


if __name__ == "__main__":
    for result in run(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])):
        print(json.dumps(result), flush=True)
