"""The files of a gallery index: what a search method trained, and the encodings of images, by level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.core.arrays import map_arrays
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.schema import shorten
from spade_faiss.core.types import Arrays
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.protocol import ResolvedRecipe

# The attribute of a file of encodings that lists the checksums of its shards, in the order of their images.
SHARDS = "shards"


def encode_images(
    resolved: ResolvedRecipe, blocks: dict[str, Blocks], trained: dict[str, Arrays], rows: Sequence[int], bar: Any = None
) -> Arrays:
    """Encode the images of a shard; each array is stacked over them, or all are packed."""
    assert resolved.method.encode is not None
    stacks: Arrays = {}
    for position, row in enumerate(rows):
        for name, of_level in blocks.items():
            for key, array in resolved.method.encode(of_level(row), trained.get(name, {}), resolved.build).items():
                stack = stacks.setdefault(f"{name}/{key}", np.empty((len(rows), *array.shape), array.dtype))
                stack[position] = array
            of_level.release(row)
        if bar is not None:
            bar.update()
    if (pack := resolved.method.pack) is None:
        return stacks
    return {
        f"{name}/{key}": array
        for name, stacked in by_level(stacks).items()
        for key, array in pack(stacked, trained[name], resolved.build).items()
    }


def by_level(arrays: Arrays) -> dict[str, Arrays]:
    """Sort arrays named `level/key` by their level."""
    by_level: dict[str, Arrays] = {}
    for name, array in arrays.items():
        level, _, key = name.rpartition("/")
        by_level.setdefault(level, {})[key] = array
    return by_level


def read_trained(
    path: Path, sha256: str, levels: Mapping[str, Level], resolved: ResolvedRecipe, command: str
) -> dict[str, Arrays]:
    """Read what was trained, by level. `command` builds it anew.

    Raises:
        BankError: if it is not what the recipe's search method trains on these levels.
    """
    by_level: dict[str, Arrays] = {name: {} for name in levels}
    for name, array in map_arrays(path, sha256).arrays.items():
        level_name, _, key = name.rpartition("/")
        if level_name not in by_level:
            raise BankError(f"{path} is damaged: it holds {shorten(name)}, which is of no level; rebuild it with: {command}")
        by_level[level_name][key] = array
    if (check := resolved.method.check_trained) is not None:
        for name, level in levels.items():
            with naming(path, name, command):
                check(level, by_level[name], resolved.build)
    return by_level


@contextmanager
def naming(path: Path, level_name: str, command: str) -> Iterator[None]:
    """Turn what a search method says about arrays into an error that names their file."""
    try:
        yield
    except InputError as error:
        raise BankError(f"{path} is damaged: level {level_name!r}: {error}; rebuild it with: {command}") from error
