"""The command line where its streams, memory or disk fail: a result, or one line and the right exit code; no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss import Backbone
from spade_faiss.cli import main
from spade_faiss.cli.text import to_json
from spade_faiss.search.engines.faiss import FaissSearch
from spade_faiss.workflows import info as info_module
from tests.support.pictures import save_png, weave

# They start processes, a second or more each.
pytestmark = pytest.mark.slow

needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which S is the command line; the exit code is that of S, not of what reads its output."""
    return subprocess.run(
        ["bash", "-c", f'S() {{ "{sys.executable}" -m spade_faiss "$@"; }}; set -o pipefail; {command}'],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=100,
        env={**os.environ, **environment},
    )


def assert_one_line(done: subprocess.CompletedProcess[str], exit_code: int, said: str) -> None:
    assert done.returncode == exit_code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


@needs_shell
@pytest.mark.parametrize("words", ["info {bank}", "info {bank} --json", "--help", "--version"])
def test_a_pipe_that_nobody_reads_ends_the_command_without_a_word(fitted_bank: Path, words: str) -> None:
    """Row "S info b.bank | true": as a program that SIGPIPE ended."""
    # The reader has gone before anything is written.
    done = shell(f"S {words.format(bank=fitted_bank)} | exec true")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@needs_linux
@pytest.mark.parametrize("words", ["info {bank}", "info {bank} --json", "--help", "--version"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_finds_no_room_is_an_error(fitted_bank: Path, words: str, unbuffered: str) -> None:
    """Row "> /dev/full"."""
    done = shell(f"S {words.format(bank=fitted_bank)} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert_one_line(done, 1, "spade-faiss: error: its output cannot be written: No space left on device")


@needs_shell
@pytest.mark.parametrize(
    ("streams", "exit_code", "error"),
    [(">&-", 1, "its output cannot be written: Bad file descriptor"), ("2>&-", 0, ""), (">&- 2>&- <&-", 1, "")],
)
def test_closed_streams(fitted_bank: Path, streams: str, exit_code: int, error: str) -> None:
    done = shell(f"S info {fitted_bank} {streams}")
    assert done.returncode == exit_code
    assert error in done.stderr
    assert "Traceback" not in done.stderr


@needs_linux
@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
def test_an_error_that_cannot_be_said_keeps_its_exit_code(tmp_path: Path, streams: str) -> None:
    done = shell(f"S info {tmp_path / 'none.bank'} {streams}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@needs_shell
def test_a_closed_stream_is_not_a_file_that_is_written(fitted_bank: Path, dataset_folder: Path, tmp_path: Path) -> None:
    """What is opened next would take the place of the stream, and what a library prints would be written into it."""
    done = shell(f"S score {dataset_folder / 'test' / 'good'} --bank {fitted_bank} --out {tmp_path} >&- 2>&-")
    assert done.returncode == 1
    assert json.loads((tmp_path / "report.json").read_bytes())
    assert shell(f"S verify {fitted_bank} --deep").returncode == 0


@needs_linux
@pytest.mark.parametrize(("streams", "exit_code"), [("> /dev/full", 1), ("| exec true", 141)])
def test_results_that_were_written_are_named(
    fitted_bank: Path, dataset_folder: Path, tmp_path: Path, streams: str, exit_code: int
) -> None:
    images, out = dataset_folder / "test" / "good", tmp_path / "out"
    done = shell(f"S score {images} --bank {fitted_bank} --out {out} --json {streams}")
    assert_one_line(done, exit_code, f"the command has done its work, see {out}; its output cannot be written")
    assert (out / "report.html").is_file()


@needs_shell
def test_an_ascii_terminal_gets_escapes(fitted_bank: Path, tmp_path: Path) -> None:
    """Row "PYTHONIOENCODING=ascii": ids, paths and reasons of any language."""
    images, out = tmp_path / "日本", tmp_path / "größe"
    save_png(weave(np.random.default_rng(0)), images / "ä.png")
    (images / "ö.png").write_bytes(b"no picture")
    done = shell(f"S score {images} --bank {fitted_bank} --out {out}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"skipped \xf6.png" in done.stdout
    assert r"gr\xf6\xdfe/report.html" in done.stdout
    assert (done.stdout + done.stderr).isascii()
    done = shell(f"S score {images} --bank {fitted_bank} --out {out} --json", PYTHONIOENCODING="ascii")
    found = json.loads(done.stdout)
    assert (found["skipped"][0]["id"], found["out"]) == ("ö.png", str(out))
    failed = shell(f"S info {tmp_path / 'keine-Bänke'}", PYTHONIOENCODING="ascii")
    assert_one_line(failed, 1, r"keine-B\xe4nke")


def test_json_is_valid_whatever_the_numbers() -> None:
    numbers = {
        "metrics": {"auroc": float("nan"), "best": np.float32(0.5)},
        "array": np.array([1.0, np.inf]),
        "count": np.int64(3),
        "listed": [(1, -float("inf"))],
        "path": Path("ä"),
        "id": "raw\udcff",
    }
    found = json.loads(to_json(numbers), parse_constant=pytest.fail)
    assert found == {
        "metrics": {"auroc": None, "best": 0.5},
        "array": [1.0, None],
        "count": 3,
        "listed": [[1, None]],
        "path": "ä",
        "id": "raw\udcff",
    }
    assert to_json(numbers).isascii()


def fail_with(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), KeyError("x\ny"), AssertionError()])
def test_a_bug_is_one_line_that_says_so(
    fitted_bank: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(info_module, "info", fail_with(error))
    assert main(["info", str(fitted_bank)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"this is a bug of spade-faiss, please report it ({type(error).__name__}" in captured.err
    assert "--debug" in captured.err
    with pytest.raises(type(error)):
        main(["info", str(fitted_bank), "--debug"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 59.6 GiB for an array with shape (8000000001,)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 96\nstack"),
        RuntimeError("can't start new thread"),
    ],
    ids=["numpy", "torch", "thread"],
)
@pytest.mark.parametrize("place", ["forward", "search"])
def test_memory_that_is_lacking_is_one_line(
    fitted_bank: Path,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
) -> None:
    """In the forward pass or the search of a batch."""
    with monkeypatch.context() as patch:
        owner, method = (FaissSearch, "__call__") if place == "search" else (Backbone, "__call__")
        patch.setattr(owner, method, fail_with(error))
        images = str(dataset_folder / "test")
        words = ["score", images, "--bank", str(fitted_bank), "--out", str(tmp_path / "out"), "--set", "engine=faiss"]
        assert main([*words, "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"there is not enough memory ({type(error).__name__}: {str(error).splitlines()[0]})" in captured.err


def wheels_need(megabytes: int) -> bool:
    """Whether the libraries that are installed take more of the address space than that."""
    return megabytes < 1000 or torch.version.cuda is not None


@needs_linux
@pytest.mark.parametrize(
    ("megabytes", "engine"), [(100, "auto"), (250, "auto"), (320, "auto"), (600, "auto"), (900, "auto"), (3400, "torch")]
)
def test_a_limit_on_the_address_space_is_one_line(
    fitted_bank: Path, dataset_folder: Path, tmp_path: Path, megabytes: int, engine: str
) -> None:
    """Row "ulimit -v": libraries that meet it print, wait, or end the process."""
    if not wheels_need(megabytes):
        pytest.skip("PyTorch without CUDA takes less than that")
    done = shell(
        f"ulimit -v {1000 * megabytes}; S score {dataset_folder / 'test'} --bank {fitted_bank} --out {tmp_path / 'out'} "
        f"--engine {engine}"
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "memory" in done.stderr.lower()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--sigma", "1e9"), "sigma=1e+09 is wider than the input, 64 pixels"),
        (("--sigma", "1e300"), "sigma=1e+300 is wider than the input, 64 pixels"),
        (("--kappa", str(10**30)), f"kappa={10**30} is larger than the gallery"),
        (("--k-image", str(10**30)), f"k_image={10**30} is larger than the number of normal images, 24"),
        (("--k-gallery", str(10**30)), f"k_gallery={10**30} is larger than the number of normal images, 24"),
        (("--memory", "1"), "memory=1 B is too small"),
        (("--memory", "9" * 400), "is more than any machine has"),
    ],
)
def test_query_settings_beyond_sense_are_refused(
    fitted_bank: Path,
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, str],
    said: str,
) -> None:
    """Row "--sigma 1e9"."""
    words = ["score", str(dataset_folder / "test"), "--bank", str(fitted_bank), "--out", str(tmp_path / "out"), *option]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert said in captured.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pool", str(10**9 + 1)), "pool=1000000001 is too large: 33 covers the largest map"),
        (("--pool", str(10**30 + 1)), "is too large: 33 covers the largest map"),
        (("--size", "100000", "--resize", "100000"), "size=100000 is too large: at most 10000 pixels"),
        (("--resize", str(10**30)), f"resize={10**30} is too large: at most 10000 pixels"),
    ],
)
def test_bank_settings_beyond_sense_are_refused(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    words = ["extract", str(dataset_folder / "train"), "--bank", str(tmp_path / "b"), "--backbone", "efficientnet_lite0"]
    sizes = ["--resize", "72", "--size", "64"] if "--pool" in options else []
    assert main([*words, *sizes, *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "option", [("--sigma", "1e-200"), ("--sigma", "64"), ("--localize", "flagged", "--flag-above", "1e300")]
)
def test_query_settings_at_the_edge_of_sense_work(
    fitted_bank: Path, dataset_folder: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    words = ["score", str(dataset_folder / "test"), "--bank", str(fitted_bank), "--out", str(tmp_path / "out"), *option]
    assert main(words) == 0


@pytest.mark.parametrize(
    ("size", "machine", "said"),
    [
        (4000, 1 << 30, "size=4000 is too large: one image takes about 4.54 GiB, this machine has 1 GiB"),
        (10000, 24 << 30, "size=10000 is too large: one image takes about 28.01 GiB, this machine has 24 GiB"),
    ],
)
def test_a_size_beyond_the_memory_of_the_machine_is_refused(
    dataset_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    machine: int,
    said: str,
) -> None:
    monkeypatch.setattr("spade_faiss.features.backbone.physical_bytes", lambda: machine)
    words = ["extract", str(dataset_folder / "train"), "--bank", str(tmp_path / "b"), "--backbone", "efficientnet_lite0"]
    assert main([*words, "--resize-mode", "stretch", "--size", str(size)]) == 1
    assert said in capsys.readouterr().err
