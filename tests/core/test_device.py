"""Devices and sizes as people write them, and the batch and cache that follow from a budget."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spade_faiss.core.device import CPU, Device, find_device, parse_device
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import BATCH_SIZE, MemoryPlan, format_bytes, parse_bytes, plan_memory

MiB = 1 << 20


def affine(fixed: int, each: int) -> Callable[[int], int]:
    """What a batch needs if it is `fixed` and `each` for an image."""
    return lambda images: fixed + images * each


def named_size(message: str) -> str:
    """The size that an error says would do."""
    found = re.search(r"takes ([^;]*);", message)
    assert found is not None, message
    return found[1]


# Devices


@pytest.mark.parametrize(
    ("text", "cards", "expected"),
    [
        ("cpu", 0, CPU),
        ("cpu", 2, CPU),
        ("auto", 0, CPU),
        ("auto", 2, Device("cuda", 0)),
        ("cuda", 1, Device("cuda", 0)),
        ("cuda:1", 2, Device("cuda", 1)),
    ],
)
def test_devices(text: str, cards: int, expected: Device) -> None:
    assert parse_device(text, cards) == expected


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0", "cuda:0 ", "mps", "cuda:all", "cuda:1:1", "cuda:99999"]
)
def test_what_is_no_device_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(
        InputError, match=f"^device={re.escape(repr(text))} is not a device; use auto, cpu, cuda or cuda:NUMBER$"
    ):
        parse_device(text, 2)


def test_a_card_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"^device='cuda:2' does not exist; this machine has cuda:0, cuda:1$"):
        parse_device("cuda:2", 2)
    for text in ("cuda", "cuda:0"):
        message = f"^device='{text}': there is no CUDA card that torch can use, for a reason; use --device cpu$"
        with pytest.raises(InputError, match=message):
            parse_device(text, 0, ", for a reason")


def test_how_torch_calls_devices() -> None:
    assert (CPU.torch_name, str(CPU)) == ("cpu", "cpu")
    assert (Device("cuda", 2).torch_name, str(Device("cuda", 2))) == ("cuda:2", "cuda:2")


def test_the_cpu_is_found_without_torch() -> None:
    code = "import sys; from spade_faiss.core.device import find_device; print(find_device('cpu'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cpu False"


@pytest.mark.parametrize(
    ("built", "why"), [(None, "was built without CUDA"), ("13.0", "was built for CUDA 13.0; is there a driver")]
)
def test_why_there_is_no_card(built: str | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert find_device("auto") == CPU
    with pytest.raises(InputError, match=why):
        find_device("cuda")


# Sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1073741824", 1 << 30),
        (1073741824, 1 << 30),
        ("7B", 7),
        ("3kB", 3000),
        ("500MB", 500_000_000),
        ("2GB", 2_000_000_000),
        ("1TB", 10**12),
        ("3KiB", 3072),
        ("5MiB", 5 << 20),
        ("2GiB", 2 << 30),
        ("1TiB", 1 << 40),
        ("1.5GiB", 3 << 29),
        ("0.25 kB", 250),
        # As it comes from a shell or a form.
        (" 2 GiB ", 2 << 30),
        ("2gib", 2 << 30),
        ("3KB", 3000),
        ("500mb", 500_000_000),
    ],
)
def test_sizes_that_people_write(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "2GiBB", "2 G iB", "two", "-1", "-2GiB", "1e9", "1,5GB", ".5GB", "5.GB", "2Gi", "2PB", "2GiB/s", "nan"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=f"^memory={re.escape(repr(text))} is not a size; write for example 500MB or 2GiB$"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GiB"])
def test_a_size_beyond_all_measure_is_no_crash(text: str) -> None:
    """It is taken, or refused by an error of ours."""
    with suppress(InputError):
        assert parse_bytes(text) >= 10**300


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (7, "7 B"), (999, "999 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (97 * MiB, "97 MiB"), (3 << 29, "1.5 GiB")],
)
def test_sizes_that_people_read(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 1 << 45))
@example(1000)
@example(1023)
@example(1000 * 1024)
@example(MiB - 1)
@example((1 << 30) - 1)
def test_a_size_that_was_written_can_be_read_and_is_right_to_one_percent(count: int) -> None:
    text = format_bytes(count)
    assert re.fullmatch(r"\d+(\.\d+)? (B|KiB|MiB|GiB|TiB)", text), text
    assert parse_bytes(text) == pytest.approx(count, rel=1e-2)


# What fits


@pytest.mark.parametrize(
    ("budget", "cacheable", "expected"),
    [
        # 10 for the first image, 3 for each: one needs 13, two 16, and so on up to sixteen, which need 58.
        (13, 100, MemoryPlan(batch=1, working_bytes=13, cache_bytes=0)),
        (15, 100, MemoryPlan(batch=1, working_bytes=13, cache_bytes=2)),
        (16, 100, MemoryPlan(batch=2, working_bytes=16, cache_bytes=0)),
        (39, 100, MemoryPlan(batch=9, working_bytes=37, cache_bytes=2)),
        (57, 100, MemoryPlan(batch=15, working_bytes=55, cache_bytes=2)),
        (58, 100, MemoryPlan(batch=16, working_bytes=58, cache_bytes=0)),
        # Beyond that nothing gets faster: the rest is for the cache, up to all that could be kept.
        (100, 100, MemoryPlan(batch=16, working_bytes=58, cache_bytes=42)),
        (158, 100, MemoryPlan(batch=16, working_bytes=58, cache_bytes=100)),
        (10_000, 100, MemoryPlan(batch=16, working_bytes=58, cache_bytes=100)),
        (10_000, 0, MemoryPlan(batch=16, working_bytes=58, cache_bytes=0)),
    ],
)
def test_a_plan_worked_out_by_hand(budget: int, cacheable: int, expected: MemoryPlan) -> None:
    assert BATCH_SIZE == 16
    assert plan_memory(budget, affine(10, 3), cacheable) == expected


def test_too_little_is_refused_with_both_sizes_and_what_to_do() -> None:
    with pytest.raises(InputError) as caught:
        plan_memory(10 * MiB, affine(90 * MiB, 7 * MiB), 0)
    assert str(caught.value) == (
        "memory=10 MiB is too small: scoring image by image takes 97 MiB; allow at least that, or lower k_gallery or kappa"
    )
    assert plan_memory(97 * MiB, affine(90 * MiB, 7 * MiB), 0).batch == 1


def test_an_image_index_that_takes_most_is_named() -> None:
    with pytest.raises(InputError) as caught:
        plan_memory(500 * MiB, affine(578 * MiB, 7 * MiB), 0, index_bytes=488 * MiB)
    assert str(caught.value) == (
        "memory=500 MiB is too small: scoring image by image takes 585 MiB, of which 488 MiB are the embeddings of the image "
        "index; allow at least that, or take a recipe whose image index is smaller, such as SQ8"
    )
    with pytest.raises(InputError, match=r"takes 98 MiB; allow at least that, or lower k_gallery or kappa"):
        plan_memory(50 * MiB, affine(91 * MiB, 7 * MiB), 0, index_bytes=MiB)


sizes = st.integers(1, 1 << 42)


@given(st.integers(0, 1 << 30), st.integers(1, 1 << 27), st.lists(st.integers(0, 1 << 32), min_size=2), st.integers(0, 1 << 32))
def test_a_plan_stays_within_its_budget_and_more_memory_never_makes_a_batch_smaller(
    fixed: int, each: int, budgets: list[int], cacheable: int
) -> None:
    needs, before = affine(fixed, each), 0
    for budget in sorted(budgets):
        if budget < fixed + each:
            with pytest.raises(InputError, match="is too small"):
                plan_memory(budget, needs, cacheable)
            continue
        found = plan_memory(budget, needs, cacheable)
        assert before <= found.batch <= BATCH_SIZE
        assert found.working_bytes == needs(found.batch)
        assert found.working_bytes + found.cache_bytes <= budget
        assert found.cache_bytes <= cacheable
        # No larger batch would fit, and nothing is left unused that a block could be kept in.
        assert found.batch == BATCH_SIZE or needs(found.batch + 1) > budget
        assert found.cache_bytes == cacheable or found.working_bytes + found.cache_bytes == budget
        before = found.batch


@given(sizes)
@example(1000 * 1024)  # written with an exponent, it could not be typed
@example(83 * MiB + 640 * 1024)  # rounded down, it would be refused again
@example((5 << 30) // 3)
def test_the_size_that_an_error_names_is_enough(least: int) -> None:
    """Exactly the least works, one byte less does not, and what the message says works when it is typed."""
    assert plan_memory(least, lambda images: least * images, 0).batch == 1
    with pytest.raises(InputError, match="is too small") as caught:
        plan_memory(least - 1, lambda images: least * images, 0)
    named = parse_bytes(named_size(str(caught.value)))
    assert plan_memory(named, lambda images: least * images, 0).batch >= 1
    assert least <= named <= 1.01 * least + MiB
