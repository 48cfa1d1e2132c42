"""The kit of `make gpu-proof`: what it needs but torch and CUDA, downloaded here, installed elsewhere without a network.

It runs on a bare Python: it imports only the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
NATIVE = Path("spade_faiss", "search", "native")
# The tests that are marked `gpu` need these of the development tools.
_TOOLS = ("hypothesis", "pytest")
# And these install it: without a wheel for the Python there, ours is built from the checkout.
_INSTALLERS = ("pip", "pybind11", "setuptools")
# The image set of the demo is 90 MB, and no test on a card reads it.
_NOT_CARRIED = ("elpv-dataset",)
# Marks the torch that stands in for the one of the other machine while versions are resolved.
_STAND_IN = "stand.in"
_COMMIT = "commit.txt"


def main(argv: Sequence[str] | None = None) -> None:
    """Download or install the kit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("download", help="fill a folder with what the other machine needs")
    command.add_argument("kit", type=Path)
    command.add_argument("--python", default=".".join(map(str, sys.version_info[:2])), metavar="X.Y", help="that it has")
    command.add_argument("--torch", default=read_pins()["torch"], metavar="VERSION", help="that it has")
    command = commands.add_parser("install", help="make a virtual environment that sees this Python's torch")
    command.add_argument("kit", type=Path)
    command.add_argument("environment", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "download":
        download(arguments.kit, arguments.python, arguments.torch)
    else:
        install(arguments.kit, arguments.environment)


def download(kit: Path, python: str, torch: str) -> None:
    """Fill the folder `kit` for a machine with versions `python` (X.Y) and `torch`; what was in it is removed."""
    shutil.rmtree(kit, ignore_errors=True)
    kit.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        stand_in = write_stand_in(Path(scratch), torch)
        pins = read_pins()
        if torch != pins["torch"]:
            del pins["torchvision"]  # each fits one torch
        del pins["torch"]
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()), encoding="utf-8")
        _run(
            *(sys.executable, "-m", "pip", "download", "--dest", str(kit), "--find-links", scratch),
            *("--only-binary=:all:", "--python-version", python, "--constraint", str(constraints)),
            *(f"torch=={torch}+{_STAND_IN}", *requirements()),
        )
        (kit / stand_in.name).unlink()
    if _abi(python) == _abi():
        _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(kit), str(ROOT))
    (kit / _COMMIT).write_text(f"{find_commit(kit)}\n", encoding="utf-8")


def install(kit: Path, environment: Path) -> None:
    """Install the kit into a new virtual environment that sees the packages of this Python.

    Raises:
        SystemExit: if there is no kit, or this Python has no torch.
    """
    pip = next(kit.glob("pip-*.whl"), None)
    if pip is None:
        sys.exit(f"{kit} is no kit: make gpu-proof-kit makes it, on a machine with a network")
    if not _has(sys.executable, "torch"):
        sys.exit(f"{sys.executable} has no torch; name one that has: make gpu-proof GPU_PYTHON=...")
    venv.create(environment, clear=True, system_site_packages=True)
    python = str(environment / "bin" / "python")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    # Where this Python is of a virtual environment itself, the new one would not see what is installed in it.
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "parent.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    carried = [wheel for wheel in sorted(kit.glob("*.whl")) if _name(wheel) not in ("spade-faiss", *_INSTALLERS)]
    if _has(sys.executable, "torchvision"):  # its own fits its torch
        carried = [wheel for wheel in carried if _name(wheel) != "torchvision"]
    command = (python, str(pip / "pip"), "install", "--quiet", "--no-index", "--no-deps", "--find-links", str(kit))
    _run(*command, *map(str, carried))
    ours = next(kit.glob(f"spade_faiss-*-{_abi()}-*.whl"), ROOT)  # the checkout: its kernel is compiled if there is a compiler
    _run(*command, str(ours))
    # What runs in a checkout imports the checkout: the kernel must be there.
    for kernel in (site / NATIVE).glob("_native*.so"):
        shutil.copy(kernel, ROOT / NATIVE)


def requirements() -> list[str]:
    """What the other machine needs beside torch, as pyproject.toml states it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    tools = [text for text in optional["dev"] if _name_of(text) in (*_TOOLS, *_INSTALLERS)]
    # `cpu` names the other two.
    extras = [text for extra in ("cpu", "torch", "onnxruntime", "demo") for text in optional[extra]]
    named = [*project["dependencies"], *extras, *tools, "pip"]
    return [text for text in named if _name_of(text) not in ("torch", "spade-faiss", *_NOT_CARRIED)]


def read_pins() -> dict[str, str]:
    """The versions in constraints.txt, by package."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {name: pin for name, is_pin, pin in (line.partition("==") for line in lines) if is_pin}


def write_stand_in(folder: Path, version: str) -> Path:
    """Write a wheel that is called torch and holds nothing: with it, pip resolves the others without torch's gigabytes."""
    name = f"torch-{version}+{_STAND_IN}"
    wheel = folder / f"{name}-py3-none-any.whl"
    information = {
        "METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}+{_STAND_IN}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: spade_faiss\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in information.items():
            archive.writestr(f"{name}.dist-info/{file}", text)
    return wheel


def find_commit(kit: Path) -> str:
    """The commit of this checkout, with `-dirty` if files differ from it; what the kit says where git does not tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return (kit / _COMMIT).read_text("utf-8").strip() if (kit / _COMMIT).is_file() else "unknown"


def _abi(python: str = ".".join(map(str, sys.version_info[:2]))) -> str:
    return "cp" + python.replace(".", "")


def _has(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    # Not in this folder, where a package of the checkout could pass for an installed one.
    return subprocess.run([python, "-c", code], cwd=tempfile.gettempdir(), check=False).returncode == 0


def _name(wheel: Path) -> str:
    return wheel.name.partition("-")[0].replace("_", "-").lower()


def _name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def _run(*command: str) -> None:
    """Run a command in the root of the checkout.

    Raises:
        SystemExit: if it fails.
    """
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}, check=False)
    if done.returncode:
        sys.exit(f"failed with exit status {done.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    main()
