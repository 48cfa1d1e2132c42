"""The reader of HDF5 files: it finds what HDF5 finds in files of ours, refuses everything else, and is never busy for long.

Fault "variable-length text of 2^29 entries, or a virtual dataset that points to another HDF5 file".
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from spade_faiss.core.arrays import map_arrays, text_array, write_arrays
from spade_faiss.core.errors import BankError, SpadeError
from spade_faiss.core.files import hash_file
from spade_faiss.core.hdf5_layout import read_layout
from tests.support.attacks import ARRAYS, mutated

NAMES = st.lists(
    st.text("abcx.1ü", min_size=1, max_size=9).filter(lambda name: name.strip(".")), min_size=1, max_size=40, unique=True
)
DTYPES = ["f2", "f4", "f8", "u1", "u4", "i8", "S1", "S7"]


def by_hdf5(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the HDF5 library finds."""
    found: dict[str, Any] = {}

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item.id.get_offset(), item.shape, item.dtype

    with h5py.File(path) as file:
        file.visititems(note)
        return found, {name: value.decode() if isinstance(value, bytes) else int(value) for name, value in file.attrs.items()}


def by_us(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        arrays, attributes = read_layout(descriptor)
    finally:
        os.close(descriptor)
    return {name: (array.offset, array.shape, array.dtype) for name, array in arrays.items()}, attributes


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES, data=st.data())
def test_it_finds_what_hdf5_finds(tmp_path: Path, names: list[str], data: st.DataObject) -> None:
    """Any number of arrays, in groups and not: tables of names become trees."""
    shapes = arrays_of.array_shapes(max_dims=4, max_side=5)
    groups = st.sampled_from(["", "group/", "a group/inner/"])
    arrays = {
        f"{data.draw(groups)}{name}": np.zeros(data.draw(shapes), data.draw(st.sampled_from(DTYPES)))
        for name in names
        if name not in ("group", "a group")
    }
    path = tmp_path / "a.h5"
    write_arrays(path, arrays, attributes={"root": data.draw(st.text("abü/", max_size=50)), "schema": 7, "negative": -3})
    assert by_us(path) == by_hdf5(path)


def test_it_reads_the_golden_bank() -> None:
    for path in (Path(__file__).parents[1] / "golden" / "bank_v3" / "features").iterdir():
        assert by_us(path) == by_hdf5(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file as a shard is."""
    found = tmp_path / "a.h5"
    arrays = {
        "image/id": text_array(["a", "ü"]),
        "image/embedding": np.arange(6, dtype=np.float32).reshape(2, 3),
        "level/fine": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    }
    write_arrays(found, arrays, attributes={"root": "/r", "schema": 2})
    return found


def refused(path: Path) -> str:
    map_arrays.cache_clear()
    with pytest.raises(BankError, match=r"a\.h5 is damaged .*restore it from a backup") as caught:
        map_arrays(path, hash_file(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("big-endian", "byte order"),
        ("compressed", "a filter"),
        ("chunked", "not stored in one piece"),
        ("virtual", "layout|not stored in one piece|header of version"),
        ("external", "an array in another file"),
        ("a soft link", "a link"),
        ("an external link", "a link|links of a newer format|header of version|no table of names"),
        ("huge", "not stored in one piece"),
        ("gone", "its list of arrays is"),
        ("a group", "its list of arrays is"),
    ],
)
def test_what_we_do_not_write_is_refused(path: Path, what: str, said: str) -> None:
    with h5py.File(path, "r+") as file:
        ARRAYS[what](file, "level/fine")
    text = refused(path)
    assert any(part in text for part in said.split("|")), text


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.create_dataset("text", data=["x"] * 100, dtype=h5py.string_dtype()),
        lambda file: file.attrs.__setitem__("root", "of variable length"),
        lambda file: file.attrs.__setitem__("root", np.zeros(100)),
        lambda file: file.attrs.create("root", np.zeros(7000, "S8")),
        lambda file: file.create_dataset("numbers", data=np.zeros(3, np.complex64)),
        lambda file: file.create_dataset("numbers", data=np.zeros(3, np.bool_)),
        lambda file: file.create_dataset("numbers", data=h5py.Empty("f4")),
        lambda file: file.__setitem__("again", file["level/fine"]),
        lambda file: file.__setitem__("around", file["/level"]),
    ],
)
def test_types_that_we_do_not_write_are_refused(path: Path, change: Callable[[h5py.File], object]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)
    refused(path)


def test_files_of_a_newer_layout_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["x"] = np.zeros(3)
    assert "of another kind than a bank has" in refused(path)


def test_no_mutant_takes_long_or_raises_anything_else(path: Path) -> None:
    rng, data, took = random.Random(3), path.read_bytes(), []
    for _ in range(2000):
        path.write_bytes(mutated(data, rng))
        start = time.perf_counter()
        try:
            by_us(path)
        except ValueError as error:
            assert not isinstance(error, SpadeError)  # noqa: PT017  # it may raise nothing as well
        took.append(time.perf_counter() - start)
    assert max(took) < 10  # none hangs


def test_structures_that_lead_round_in_circles_end(path: Path) -> None:
    """Each place that holds an address is made to lead to each structure."""
    data = path.read_bytes()
    structures = [at for at in range(0, len(data) - 8, 8) if data[at : at + 4] in (b"TREE", b"SNOD", b"HEAP")]
    places = [at for at in range(56, len(data) - 8, 8) if 0 < int.from_bytes(data[at : at + 8], "little") < len(data)]
    start = time.perf_counter()
    for place in places:
        for target in (*structures, place, 96):
            path.write_bytes(data[:place] + target.to_bytes(8, "little") + data[place + 8 :])
            try:
                by_us(path)
            except ValueError:
                continue
    assert time.perf_counter() - start < 60


def test_an_array_lies_where_its_values_are_read(tmp_path: Path) -> None:
    """FAISS and NumPy read numbers at multiples of their size."""
    write_arrays(tmp_path / "a.h5", {"x": np.arange(100, dtype=np.float32), "y": np.zeros(100, np.float32)}, attributes={})
    place, _, _ = by_us(tmp_path / "a.h5")[0]["x"]
    data = (tmp_path / "a.h5").read_bytes()
    layout = struct.pack("<QQ", place, 400)
    assert data.count(layout) == 1
    (tmp_path / "b.h5").write_bytes(data.replace(layout, struct.pack("<QQ", place + 1, 400)))
    with pytest.raises(BankError, match=r"x lies at .*, not where values of 4 bytes are read"):
        map_arrays(tmp_path / "b.h5", "")
