"""The compiled kernel finds the nearest rows to the last bit, whatever the data; with less margin it would not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from spade_faiss.core.directions import principal_directions
from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.engines.faiss import FaissSearch
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.exact import open_on_cpu
from spade_faiss.search.native import extension as kernel
from spade_faiss.search.native.extension import (
    SIMD_LEVELS,
    find_simd_level,
    import_native,
    pack_bytes,
    usable_simd_level,
    why_not,
)
from spade_faiss.search.workers import Workers
from tests.support.hostile_vectors import KINDS, hostile
from tests.support.oracle import sq_distances
from tests.support.searches import exact_search, structured

Floats = npt.NDArray[np.float32]
Stored = npt.NDArray[np.floating[Any]]

ROOT = Path(__file__).parents[2]
HERE = [simd_level for simd_level, why in why_not().items() if not why]
# The reference, which all levels must equal, runs where any of them does.
EVERY = [*HERE, *(["reference"] if HERE else [])]

needs_kernel = pytest.mark.skipif(not HERE, reason="no SIMD level of the kernel runs here")
at_each_level = pytest.mark.parametrize("simd_level", EVERY)


def search(
    simd_level: str, xq: Floats, xb: Stored, k: int = 1, basis: Floats | None = None, longest: float = 0.0
) -> tuple[Floats, npt.NDArray[np.int64], int, int]:
    native = import_native()
    center = xb.mean(axis=0, dtype=np.float64).astype(np.float32)
    packing = native.Packing(simd_level, center, basis, longest)
    bound = np.full(len(xq), np.inf, np.float32)
    found: tuple[Floats, npt.NDArray[np.int64], int, int] = native.search(
        native.QueryPack(packing, xq), xq, native.RowPack(packing, xb), xb, bound, k
    )
    return found


def truth(xq: Floats, xb: Stored, k: int) -> npt.NDArray[np.float64]:
    """(nq, k) squared distances in float64."""
    return np.stack([np.sort(sq_distances(xb, q))[:k] for q in xq])


@needs_kernel
@at_each_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "components"), [(7, 0), (40, 15), (96, 0), (96, 31)])
def test_every_nearest_is_float64s(simd_level: str, kind: str, d: int, components: int) -> None:
    xq, xb = hostile(kind, d)
    basis = principal_directions(xb - xb.mean(axis=0), components) if components else None
    # Without digits; with digits of all queries, of some, and of hardly any.
    largest = float(np.abs(xq - xb.mean(axis=0)).max())
    for k, longest in ((1, 0.0), (5, 0.0), (1, 2 * largest), (5, 0.3 * largest), (1, 0.01 * largest)):
        D, I, _, _ = search(simd_level, xq, xb, k, basis, longest)
        np.testing.assert_allclose(D, truth(xq, xb, k), rtol=1e-5, atol=1e-37)
        named = np.square(xb[I].astype(np.float64) - xq[:, None]).sum(axis=2)
        np.testing.assert_allclose(D, named, rtol=1e-5, atol=1e-37)


@needs_kernel
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", ["white", "zeros", "sparse", "an outlier"])
def test_all_simd_levels_find_the_same_bits(kind: str, dtype: type[np.floating[Any]]) -> None:
    """The results are the same from unaligned memory, with any basis and without one."""
    xq, xb = hostile(kind, 50)
    with np.errstate(over="ignore"):
        xb = xb.astype(dtype)
    xb[~np.isfinite(xb)] = 0
    memory = np.zeros(xb.nbytes + 1, np.uint8)
    odd = memory[1:].view(dtype).reshape(xb.shape)
    odd[:] = xb
    directions = principal_directions(np.random.default_rng(0).normal(size=(99, 50)).astype(np.float32), 15)
    first = search("reference", xq, xb, 3)
    for simd_level in EVERY:
        for basis, longest in ((None, 0.0), (directions, 0.0), (None, 8.0)):
            for rows in (xb, odd):
                D, I, _, _ = search(simd_level, xq, rows, 3, basis, longest)
                np.testing.assert_array_equal(D, first[0], err_msg=simd_level)
                np.testing.assert_array_equal(I, first[1], err_msg=simd_level)


@needs_kernel
@at_each_level
@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("off", [0.1, 0.3, 0.45])
def test_half_the_margin_misses_the_nearest(simd_level: str, off: float, digits: bool) -> None:
    """The error bound is what makes the search exact, and it is not too wide: with half of it the nearest row is missed.

    The query's codes are off by the same amount in each channel, and the nearest row lies in that direction: the filter sees it
    as farther than the origin, by all of |q - q'| |x|, although it is a little nearer.
    """
    native = import_native()
    d, most, code = 64, 63 if simd_level == "avx2" else 127, 20
    q = np.full(d, code + off)
    q[0] = most  # the largest number: the step is 1
    along = np.ones(d)
    along[0] = 0
    xb = np.zeros((24, d))
    xb[8:] = -1000 * along
    xb[16] = along * (2 * (code + off) - 1e-3)  # a little nearer to q than the origin is
    xq, xb = np.tile(q, (16, 1)).astype(np.float32), xb[:17].astype(np.float32)
    assert sq_distances(xb, xq[0]).argmin() == 16
    center = np.zeros(d, np.float32)
    # With digits, the step is the longest query's: also 1.
    packing = native.Packing(simd_level, center, None, most if digits else 0)
    packs = native.QueryPack(packing, xq), native.RowPack(packing, xb)
    bound = np.full(16, np.inf, np.float32)
    found = {margin: native.search(packs[0], xq, packs[1], xb, bound, 1, margin)[1][:, 0] for margin in (1.0, 0.5)}
    assert (found[1.0] == 16).all()
    assert (found[0.5] == 0).all()


@needs_kernel
@at_each_level
def test_bounds(simd_level: str) -> None:
    """Rows beyond a bound are not found and rows at the bound are; of equal rows the first is found."""
    native = import_native()
    xb = np.array([[3, 0], [0, 4], [3, 0], [0, 0]], np.float32)
    xq = np.zeros((4, 2), np.float32)
    center = np.zeros(2, np.float32)
    packing = native.Packing(simd_level, center)
    bound = np.array([9, 8.9, np.inf, -np.inf], np.float32)
    D, I, _, _ = native.search(native.QueryPack(packing, xq), xq, native.RowPack(packing, xb[:3]), xb[:3], bound, 2)
    np.testing.assert_array_equal(D, [[9, 9], [np.inf, np.inf], [9, 9], [np.inf, np.inf]])
    np.testing.assert_array_equal(I, [[0, 2], [-1, -1], [0, 2], [-1, -1]])


@needs_kernel
def test_equal_rows_cost_nothing() -> None:
    """On constant maps, the first row at a distance of 0 ends the search."""
    xb = np.ones((800, 16), np.float32)
    D, I, evaluated, dense = search(HERE[0], xb[:100].copy(), xb)
    assert not D.any()
    assert not I.any()
    assert evaluated <= 200
    assert dense == 0


@needs_kernel
def test_effort_counts_rows_and_queries_that_gained_nothing() -> None:
    rng = np.random.default_rng(0)
    xb = rng.normal(size=(800, 64)).astype(np.float32)
    _, _, evaluated, dense = search(HERE[0], xb[:50] + np.float32(0.01), xb)
    assert 50 <= evaluated < 50 * 20
    assert dense == 0
    alike = 1 + np.float32(1e-4) * xb
    alike[0] = 100  # moves the center away: codes can tell nothing apart
    _, _, evaluated, dense = search(HERE[0], alike[1:51] + np.float32(1e-5), alike)
    assert evaluated > 50 * 700
    assert dense == 50


@needs_kernel
@at_each_level
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("k", [1, 3])
def test_a_damaged_row_harms_no_other(simd_level: str, value: float, k: int) -> None:
    """A bit may flip after a bank was checked: queries still find their nearest among the other rows."""
    rng = np.random.default_rng(5)
    xb, xq = rng.normal(size=(50, 24)).astype(np.float32), rng.normal(size=(19, 24)).astype(np.float32)
    expected = truth(xq, np.delete(xb, 13, axis=0), k)
    xb[13, 5] = value
    native = import_native()
    bound = np.full(19, np.inf, np.float32)
    bound[7] = -np.inf
    for longest in (0, 4):
        packing = native.Packing(simd_level, np.zeros(24, np.float32), None, longest)
        D, _, _, _ = native.search(native.QueryPack(packing, xq), xq, native.RowPack(packing, xb), xb, bound, k)
        np.testing.assert_allclose(np.delete(D, 7, axis=0), np.delete(expected, 7, axis=0), rtol=1e-5)
        assert np.isinf(D[7]).all()
    nowhere = np.full((3, 24), np.nan, np.float32)
    found, at, _, _ = native.search(native.QueryPack(packing, nowhere), nowhere, native.RowPack(packing, xb), xb, bound[:3], k)
    assert np.isinf(found).all()
    assert (at == -1).all()


@needs_kernel
@at_each_level
@pytest.mark.parametrize("scale", [1e-18, 1e-21, 1e-23])
def test_numbers_whose_squares_vanish(simd_level: str, scale: float) -> None:
    """The results are the same where other code in the process has set the processor to flush denormal numbers to 0."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(90, 2560)) + rng.normal(size=2560)
    xb, xq = np.asarray(scale * base, np.float32), np.asarray(scale * (base[:17] + 0.5 * base[17:34]), np.float32)
    usual = search(simd_level, xq, xb)
    np.testing.assert_allclose(usual[0], truth(xq, xb, 1), rtol=1e-5, atol=1e-37)
    assert torch.set_flush_denormal(True)
    try:
        flushed = search(simd_level, xq, xb)
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(usual[:2], flushed[:2], strict=True):
        np.testing.assert_array_equal(one, other)


@needs_kernel
def test_arguments_are_checked() -> None:
    native = import_native()
    simd_level = HERE[0]
    x, center = np.zeros((8, 4), np.float32), np.zeros(4, np.float32)
    packing = native.Packing(simd_level, center)
    rows, queries = native.RowPack(packing, x), native.QueryPack(packing, x)
    bound = np.zeros(8, np.float32)

    def run(**changes: Any) -> None:
        given = {"query_pack": queries, "queries": x, "row_pack": rows, "rows": x, "bound": bound, "k": 1} | changes
        native.search(**given)

    run()
    for changes, message in (
        ({"k": 0}, "k must be 1 to the number of rows"),
        ({"k": 9}, "k must be 1 to the number of rows"),
        ({"bound": bound[:7]}, r"bound must be \(8,\) float32"),
        ({"bound": np.zeros(8)}, r"bound must be \(8,\) float32"),
        ({"queries": x[:7]}, "packs must be of these queries and rows"),
        ({"rows": x[:7]}, "packs must be of these queries and rows"),
        ({"queries": x.astype(np.float16)}, "queries must be float32"),
        ({"rows": x.astype(np.float64)}, r"rows must be \(n, d\) float16 or float32"),
        ({"rows": x.astype(">f4")}, r"rows must be \(n, d\) float16 or float32"),
        ({"rows": np.asfortranarray(np.zeros((8, 4), np.float32))}, "C-contiguous"),
        ({"row_pack": native.RowPack(native.Packing(simd_level, center), x)}, "packs must be made by one packing"),
        ({"row_pack": native.RowPack(native.Packing("reference", center), x)}, "packs must be made by one packing"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changes)
    for arguments, message in (
        (("mmx", center), "there is no SIMD level 'mmx'"),
        ((simd_level, np.zeros((2, 2), np.float32)), "center must be"),
        ((simd_level, np.zeros(0, np.float32)), "center must be"),
        ((simd_level, np.zeros(4)), r"center must be \(d,\) float32"),
        ((simd_level, center, np.eye(4, dtype=np.float32)), r"basis must be \(fewer than d, d\)"),
        ((simd_level, center, np.eye(2, 3, dtype=np.float32)), r"basis must be \(fewer than d, d\) float32"),
        ((simd_level, center, 3 * np.eye(2, 4, dtype=np.float32)), "basis must be of orthonormal rows"),
        ((simd_level, center, np.full((2, 4), 0.5, np.float32)), "basis must be of orthonormal rows"),
        ((simd_level, center, None, -1.0), "longest must be 0 or more, and finite"),
        ((simd_level, center, None, np.inf), "longest must be 0 or more, and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            native.Packing(*arguments)
    with pytest.raises(ValueError, match="vectors must have the packing's channels"):
        native.RowPack(packing, x[:, :3].copy())


@needs_kernel
@pytest.mark.parametrize(("count", "d", "components"), [(1, 1, 0), (17, 24, 0), (3136, 256, 31), (784, 512, 63), (5, 70, 0)])
def test_packs_take_no_more_than_is_planned(count: int, d: int, components: int) -> None:
    native = import_native()
    x, center = np.zeros((count, d), np.float32), np.zeros(d, np.float32)
    basis = np.eye(components, d, dtype=np.float32) if components else None
    for simd_level in EVERY:
        packing = native.Packing(simd_level, center, basis, 1.0)
        for pack in (native.RowPack(packing, x), native.QueryPack(packing, x)):
            assert pack.nbytes <= pack_bytes(count, d)


# The SIMD level


def test_a_simd_level_that_does_not_run_says_why() -> None:
    assert list(why_not()) == list(SIMD_LEVELS)
    assert usable_simd_level() == (HERE[0] if HERE else None)
    for simd_level, why in why_not().items():
        if why and HERE:
            with pytest.raises(
                InputError, match=f"simd_level='{simd_level}' does not run on this machine: .*; use engine='faiss'"
            ):
                find_simd_level(simd_level, 8)


@needs_kernel
def test_more_channels_than_sums_hold_are_left_to_faiss() -> None:
    assert find_simd_level("auto", 65_536) == HERE[0]
    with pytest.raises(InputError, match="up to 65536 channels, got 65537; use engine='faiss'"):
        find_simd_level("auto", 65_537)
    assert usable_simd_level(65_537) is None


@needs_kernel
def test_lengths_are_padded() -> None:
    native = import_native()
    assert [name for name, _ in native.simd_levels()] == [*SIMD_LEVELS, "reference"]
    assert [native.padded_length("avx2", length) for length in (1, 16, 17)] == [16, 16, 32]
    assert [native.padded_length("amx", length) for length in (1, 64, 65)] == [64, 64, 128]
    assert [native.padded_length("avx2", length, digits=True) for length in (12, 13)] == [16, 32]


def test_without_the_extension_faiss_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAISS finds the same nearest up to rounding, and asking for `native` says how to get it."""
    case = structured(1, 5, 6, 4)
    before = exact_search(case.blocks, engine="auto")
    usual = before(case.xq, case.neighbors, 2)
    monkeypatch.setattr(kernel, "_native", None)
    search = exact_search(case.blocks, engine="auto")
    assert isinstance(before, NativeSearch) == bool(HERE)
    assert isinstance(search, FaissSearch)
    found = search(case.xq, case.neighbors, 2)
    np.testing.assert_allclose(found.sq_dist, usual.sq_dist, rtol=2e-4)
    assert np.mean(found.row == usual.row) > 0.99
    assert set(why_not().values()) == {"the compiled kernel is not there"}
    with pytest.raises(DependencyError, match=r"built without a C\+\+ compiler.* or use engine=faiss"):
        exact_search(case.blocks, engine="native")


def test_a_processor_without_simd_levels_searches_by_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = structured(1, 2, 3, 2)
    blocks = Blocks(_level(case.blocks), ArraySource(case.blocks))
    monkeypatch.setattr(kernel, "why_not", lambda: dict.fromkeys(SIMD_LEVELS, "the processor has no avx2"))
    assert isinstance(open_on_cpu(blocks, Workers(1)), FaissSearch)


def _level(blocks: Floats) -> Level:
    return Level("level", blocks.shape[2], stride=1, height=1, width=blocks.shape[1])


# The C++ itself


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.slow
def test_the_kernel_under_sanitizers(tmp_path: Path) -> None:
    """Compares each SIMD level that runs here with the reference bit by bit, and its searches with brute force."""
    sources = [
        path for path in sorted((ROOT / "spade_faiss/search/native/src").glob("*.cpp")) if not path.stem.endswith("module")
    ]
    program = tmp_path / "check"
    flags = "-std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=off"
    command = ["g++", *flags.split(), "-Wall", "-Wextra", "-Werror", "-I", str(sources[0].parent)]
    check = ROOT / "tests/native/check_kernel.cpp"
    subprocess.run([*command, str(check), *map(str, sources), "-o", str(program)], check=True, capture_output=True)
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for simd_level in EVERY:
        assert f"{simd_level}: " in done.stdout
        assert f"{simd_level}: not here" not in done.stdout
