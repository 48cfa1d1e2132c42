"""Features as files that are mapped later, and the few pictures that are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.files import atomic_path
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.pictures import Picture

_IDS = "ids.json"


def are_saved(path: Path) -> bool:
    """Whether a folder holds all that `save_features` writes."""
    return (path / _IDS).exists()


def save_features(path: Path, batch: FeatureBatch) -> None:
    """Write features into a folder: maps in half precision, as banks store them."""
    arrays: dict[str, npt.NDArray[Any]] = {"embedding": np.asarray(batch.embedding, np.float32)}
    if batch.valid is not None:
        arrays["valid"] = batch.valid
    path.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(path / f"{name}.npy", values)
    for number, maps in enumerate(batch.levels.values()):
        np.save(path / f"level-{number}.npy", np.asarray(maps, np.float16))
    with atomic_path(path / _IDS) as temporary:  # last: what it names is there
        temporary.write_text(json.dumps([list(batch.ids), list(batch.levels)]), encoding="utf-8")


def load_features(path: Path) -> FeatureBatch:
    """What `save_features` wrote; maps are mapped, not read."""
    ids, levels = json.loads((path / _IDS).read_bytes())
    valid = path / "valid.npy"
    return FeatureBatch(
        ids,
        np.load(path / "embedding.npy"),
        {name: np.load(path / f"level-{number}.npy", mmap_mode="r") for number, name in enumerate(levels)},
        valid=np.load(valid) if valid.exists() else None,
    )


def save_shown(folder: Path, shown: Mapping[int, Picture]) -> None:
    """Write the pictures that are shown, with their numbers."""
    np.save(folder / "shown.npy", np.stack(list(shown.values())))
    np.save(folder / "numbers.npy", np.array(list(shown), np.int64))


def load_shown(folder: Path) -> dict[int, Picture]:
    """What `save_shown` wrote."""
    return dict(zip(np.load(folder / "numbers.npy").tolist(), np.load(folder / "shown.npy"), strict=True))
