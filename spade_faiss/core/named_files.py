"""Files of settings that come with the package or are the user's own, as YAML that people read, copy and edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from spade_faiss.core.errors import InputError, NotFoundError

# What YAML's parser raises; ValueError stands for text that is not UTF-8, or for a date that does not exist.
_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)


def packaged_names(folder: str) -> list[str]:
    """The names of the files that come with the package in a folder, such as `indexes`."""
    return sorted(path.stem for path in _packaged(folder).glob("*.yaml"))


def read_named(kind: str, folder: str, name: str | Path) -> tuple[Any, str]:
    """Read a file of the package by its name, or any other by its path.

    Args:
        kind: what it is, for messages.
        folder: the folder of the package's own.
        name: a name, or the path of a .yaml file.

    Returns:
        The parsed content, and where it came from.

    Raises:
        NotFoundError: for a name that is neither one of the package's nor a file.
        InputError: for a file that is not valid YAML.
    """
    is_file = Path(name).suffix in (".yaml", ".yml")
    path = Path(name) if is_file else _packaged(folder) / f"{name}.yaml"
    # A name is looked up in the list, so that no '../' in it leads elsewhere.
    if not (path.is_file() if is_file else str(name) in packaged_names(folder)):
        known = ", ".join(packaged_names(folder))
        raise NotFoundError(f"no {kind} {str(name)!r}; known are {known}, or pass a .yaml file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")), str(path)
    except _NO_YAML as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error


def parse_value(name: str, text: str) -> Any:
    """A value as YAML reads it.

    Raises:
        InputError: for text that is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except _NO_YAML as error:
        raise InputError(f"{name}={text!r} is no value: {' '.join(str(error).split())}") from error


def _packaged(folder: str) -> Path:
    # A wheel carries them inside the package; in a checkout they stand at the top level.
    packaged = Path(__file__).parents[1] / folder
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / folder
