"""Chunks that are packed here, as HDF5 reads and checks them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from spade_faiss.report.packed_chunks import append_packed, fletcher32


@pytest.mark.parametrize("size", [(224, 224), (1, 1), (3, 5)])
def test_hdf5_reads_what_was_packed(tmp_path: Path, size: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).gamma(2, 1, (7, *size)).astype(np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file, ThreadPoolExecutor(2) as pool:
        packing = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
        dataset = file.create_dataset("maps", (0, *size), np.float32, maxshape=(None, *size), chunks=(1, *size), **packing)
        append_packed(dataset, maps[:4], pool)
        append_packed(dataset, maps[4:].swapaxes(1, 2).copy().swapaxes(1, 2), pool)
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(file["maps"], maps)


def test_the_checksum_is_that_of_hdf5(tmp_path: Path) -> None:
    """Of chunks of even and odd length, and of zeros and ones, where sums that are multiples of 65535 show."""
    contents = [np.random.default_rng(n).integers(0, 256, n).astype(np.uint8) for n in (1, 2, 3, 100, 1001)]
    for content in [*contents, np.zeros(50, np.uint8), np.full(70_000, 255, np.uint8)]:
        with h5py.File(tmp_path / "x.h5", "w") as file:
            dataset = file.create_dataset("x", data=content, chunks=content.shape, fletcher32=True)
            _, stored = dataset.id.read_direct_chunk((0,))
        assert fletcher32(stored[:-4]) == int.from_bytes(stored[-4:], "little")
