"""What belongs to a process: values that each makes for itself, and the memory that it may take."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from pathlib import Path

import pytest

from spade_faiss.core import memory, process
from spade_faiss.core.memory import check_address_space, is_out_of_memory, physical_bytes
from spade_faiss.core.process import PerProcess, fork_safe, is_fork
from spade_faiss.core.progress import progress_bar


def test_each_process_makes_a_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    value = PerProcess(threading.Lock)
    ours = value()
    assert value() is ours
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        assert is_fork()
        assert value() is not ours
        assert value() is value()
    assert value() is ours
    assert not is_fork()


def test_only_the_main_thread_of_a_fork_hands_its_work_over(monkeypatch: pytest.MonkeyPatch) -> None:
    @fork_safe
    def where(number: int, *, failing: bool = False) -> threading.Thread:
        """Documented."""
        if failing:
            raise ValueError(number)
        return threading.current_thread()

    assert where.__doc__ == "Documented."
    assert where(1) is threading.main_thread()
    monkeypatch.setattr(process, "is_fork", lambda: True)
    handed_over = where(1)
    assert handed_over is not threading.main_thread()
    assert where(2) is handed_over  # so that OpenMP starts its threads once
    with pytest.raises(ValueError, match="3"):
        where(3, failing=True)
    found: list[threading.Thread] = []
    other = threading.Thread(target=lambda: found.append(where(4)))
    other.start()
    other.join()
    assert found == [other]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_exhausted(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_this_machine_has_memory() -> None:
    assert (found := physical_bytes()) is None or found > 1 << 28


@pytest.mark.parametrize(("text", "expected"), [("max\n", None), ("1000000\n", 1000000), (f"{1 << 63}\n", None)])
def test_a_container_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None) -> None:
    machine = physical_bytes()
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    assert physical_bytes() == (machine and (expected or machine))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is used")
def test_a_library_is_not_loaded_where_a_limit_leaves_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    check_address_space(1 << 60, "FAISS")  # there is no limit
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + (1 << 30), resource.RLIM_INFINITY))
    check_address_space(1 << 29, "FAISS")
    with pytest.raises(MemoryError, match=r"FAISS takes 2 GiB, the limit \(ulimit -v\) leaves .* MiB|1 GiB"):
        check_address_space(1 << 31, "FAISS")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown, is_seen in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(2, "label", shown) as bar:
            bar.update()
            bar.update(1)
        assert ("label" in stream.getvalue()) is is_seen
    monkeypatch.setattr(sys, "stderr", None)  # it was closed before Python started
    with progress_bar(2, "label", True) as bar:
        bar.update()
