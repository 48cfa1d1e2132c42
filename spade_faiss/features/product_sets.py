"""A labeled set of several products: a folder of labeled sets, each named after its product."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from spade_faiss.core.settings import LabeledSet, Run
from spade_faiss.features.datasets import Dataset, Survey, load_dataset
from spade_faiss.features.folders import LeftOut
from spade_faiss.features.records import ImageRecord


def is_product_set(root: str | Path) -> bool:
    """Whether a folder is no labeled set itself, and holds at least one."""
    folder = Path(root)
    return folder.is_dir() and not (folder / "test").is_dir() and bool(_sets(folder))


def load_product_set(root: str | Path, *, normal_kind: str = LabeledSet.normal_kind, run: Run = Run()) -> Dataset:
    """Read the labeled sets in a folder as one: ids begin with the name of the product, and so do kinds.

    Args:
        root: a folder with a labeled set for each product, see `load_dataset`, whose errors it raises.
        normal_kind: what is called `good` in all of them.
        run: says which frames of videos are images.
    """
    folder = Path(root).resolve()
    sets = {path.name: load_dataset(path, normal_kind=normal_kind, run=run) for path in _sets(folder)}
    files: Counter[str] = Counter()
    for found in sets.values():
        files.update(found.found.left_out.files)
    left_out = LeftOut(
        dict(files),
        tuple(f"{name}/{item}" for name, found in sets.items() for item in found.found.left_out.hidden),
        tuple(f"{name}/{item}" for name, found in sets.items() for item in found.found.left_out.links),
    )
    survey = Survey(
        folder,
        [_named(record, name) for name, found in sets.items() for record in found.test],
        left_out,
        [source for found in sets.values() for source in found.found.sources],
        [entered for found in sets.values() for entered in found.found.entered],
    )
    return Dataset(folder, [_named(record, name) for name, found in sets.items() for record in found.train], survey)


def product_of(record: ImageRecord) -> str:
    """The product of an image of `load_product_set`."""
    return record.id.partition("/")[0]


def _sets(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and (path / "test").is_dir())


def _named(record: ImageRecord, product: str) -> ImageRecord:
    return replace(
        record,
        id=f"{product}/{record.id}",
        kind=None if record.kind is None else f"{product}/{record.kind}",
        normal_kind=f"{product}/{record.normal_kind}",
    )
