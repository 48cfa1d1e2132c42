"""Provides what is searched at pixel level: banks of real sets and of generated features, with test images, made once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.datasets import write_elpv
from benchmarks.features import INPUT_SIZE, SHAPES, Product, write_bank
from spade_faiss import Bank, FeatureBatch
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.files import atomic_path
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.core.types import Bools
from spade_faiss.features.batch import Level, concatenate
from spade_faiss.features.datasets import load_dataset
from spade_faiss.features.pictures import to_mask

BACKBONE = "efficientnet_lite0"
# A letterbox alone shows whole tiles.
RESIZE_MODES = {
    "mvtec_bottle": "crop",
    "mvtec_screw": "crop",
    "mvtec_toothbrush": "crop",
    "aws_cookies": "crop",
    "magnetic_tile": "letterbox",
    "elpv": "crop",
}
# What may stand after the name of a real set, and how its maps are prepared then: vectors of unit length at each location, or
# averages over 3 x 3 locations, those outside of the map being zeros, of all levels or of all but the finest; or both. Or, as
# they are and averaged, stored as float32.
NORMALIZED, POOLED, COARSE_POOLED, POOLED_NORMALIZED = "-l2", "-pool3", "-pool133", "-pool3l2"
FULL, POOLED_FULL = "-float32", "-pool3float32"
PREPARED: dict[str, dict[str, Any]] = {
    NORMALIZED: {"normalize": "l2"},
    POOLED: {"pool": 3, "pool_border": "zero"},
    COARSE_POOLED: {"pool": (1, 3, 3), "pool_border": "zero"},
    POOLED_NORMALIZED: {"pool": 3, "pool_border": "zero", "normalize": "l2"},
    FULL: {"store": "float32"},
    POOLED_FULL: {"pool": 3, "pool_border": "zero", "store": "float32"},
}
GENERATED_NORMALS, GENERATED_TESTS = 200, 32
_SIDE = 56
_BATCH = 16


@dataclass(frozen=True)
class Places:
    """Folders: `data` holds real sets, if there are any; `scratch` takes banks and indexes, gigabytes of them."""

    data: Path | None
    scratch: Path


@dataclass(frozen=True, eq=False)
class PixelSet:
    """A bank, and test images.

    Args:
        bank: the folder of the bank.
        tests: the features of the test images.
        defective: which test images are defective, (n,); None for generated ones.
        masks: which pixels are defective, (n, H, W); None if there are no masks.
        valid: which pixels were scored, (n, H, W); None if there are no masks.
    """

    bank: Path
    tests: FeatureBatch
    defective: Bools | None
    masks: Bools | None
    valid: Bools | None

    def part(self, images: int) -> PixelSet:
        """Return the set with at most so many test images, evenly spread; 0 means all."""
        if images == 0 or images >= len(self.tests):
            return self
        chosen = np.linspace(0, len(self.tests) - 1, images).round().astype(int)
        return PixelSet(
            self.bank,
            concatenate([self.tests[int(place) : int(place) + 1] for place in chosen]),
            *(None if array is None else array[chosen] for array in (self.defective, self.masks, self.valid)),
        )


def pixel_set(name: str, places: Places, *, normals: int = 0, side: int = 0) -> PixelSet:
    """Return a set by its name: a real one, or generated features of one of `features.SHAPES`.

    Args:
        name: the name of the set.
        places: where real sets are, and where to store features.
        normals: the number of normal images, the first ones of a real set; 0 for the usual number.
        side: the side of a generated set's finest level; 0 for that of an input of 224 x 224 pixels.

    Raises:
        InputError: for an unknown set, or for a real one whose data is not there.
    """
    folder = places.scratch / "sets" / "-".join([name, *(str(value) for value in (normals, side) if value)])
    if not folder.is_dir():
        with _whole(folder) as temporary:
            if name in SHAPES:
                _generate(temporary, name, normals or GENERATED_NORMALS, side or _SIDE)
            elif (real := _real(name)) is not None:
                _extract(temporary, real[0], places, real[1])
            else:
                raise InputError(f"set {name!r} is not one of {', '.join((*RESIZE_MODES, *SHAPES))}")
    with np.load(folder / "tests.npz") as file:
        arrays = {key: file[key] for key in file}
    levels = {key.removeprefix("level/"): array for key, array in arrays.items() if key.startswith("level/")}
    ids = [f"test {number}" for number in range(len(arrays["embedding"]))]
    tests = FeatureBatch(ids, arrays["embedding"], levels, valid=arrays.get("valid"))
    return PixelSet(folder / "set.bank", tests, arrays.get("defective"), arrays.get("masks"), arrays.get("scored"))


def _generate(folder: Path, name: str, normals: int, side: int) -> None:
    shape = SHAPES[name]
    scale = side / _SIDE
    levels = tuple(
        Level(level.name, level.channels, level.stride, round(level.height * scale), round(level.width * scale))
        for level in shape.levels
    )
    product = Product(replace(shape, levels=levels))
    write_bank(folder / "set.bank", product, normals)
    _save(folder, product.tests(GENERATED_TESTS), {})


def _real(name: str) -> tuple[str, dict[str, Any]] | None:
    """The name of a real set without what stands after it, and how its maps are prepared; None if it is no real set."""
    suffix = next((suffix for suffix in PREPARED if name.endswith(suffix)), "")
    found = name.removesuffix(suffix)
    return (found, PREPARED.get(suffix, {})) if found in RESIZE_MODES else None


def _extract(folder: Path, name: str, places: Places, prepared: dict[str, Any]) -> None:
    from spade_faiss.core.extraction import Preprocess
    from spade_faiss.features.loading import load_backbone
    from spade_faiss.features.stream import FeatureStream
    from spade_faiss.workflows.extract import extract

    if name == "elpv":
        root = folder / "images"
        write_elpv(root, ("mono", "poly"))
    elif places.data is not None and (places.data / name).is_dir():
        root = places.data / name
    else:
        raise InputError(f"the set {name!r} is not there; say where with: --data FOLDER, the folder that holds {name}")
    preprocess = Preprocess(resize_mode=RESIZE_MODES[name])
    backbone = load_backbone(BACKBONE, preprocess=preprocess)
    extract(
        root / "train" / "good", bank=folder / "set.bank", extraction=Extraction(backbone=backbone, **prepared), preset="spade"
    )
    dataset = load_dataset(root)
    extracted = list(FeatureStream(backbone, Run(), timings=Timings(), batch_size=_BATCH)(dataset.root, dataset.test, name))
    records = [record for part in extracted for record in part.records]
    arrays: dict[str, npt.NDArray[Any]] = {"defective": np.array([bool(record.defective) for record in records])}
    if dataset.has_masks:
        placements = [item.placement for part in extracted for item in part.loaded]
        arrays["masks"] = np.zeros((len(records), *INPUT_SIZE), np.bool_)
        arrays["scored"] = np.stack([placement.valid for placement in placements])
        for mask, record, placement in zip(arrays["masks"], records, placements, strict=True):
            if record.mask is not None:
                mask[:] = to_mask(record.mask, placement)
    tests = concatenate([part.batch for part in extracted])
    _save(folder, tests, arrays)
    shutil.rmtree(folder / "images", ignore_errors=True)


def _save(folder: Path, tests: FeatureBatch, arrays: dict[str, npt.NDArray[Any]]) -> None:
    stored: dict[str, Any] = {"embedding": np.asarray(tests.embedding, np.float32), **arrays}
    stored |= {f"level/{name}": np.asarray(maps, np.float16) for name, maps in tests.levels.items()}
    if tests.valid is not None:
        stored["valid"] = tests.valid
    with atomic_path(folder / "tests.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **stored)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Make a folder that appears under its name once all of it is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def embeddings_of(name: str, places: Places) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Bools]:
    """Return the embeddings of a real set: of its normal images, of its test images, and which of these are defective."""
    found = pixel_set(name, places)
    bank = Bank.open(found.bank)
    assert found.defective is not None
    return bank.embedding(np.arange(len(bank))), np.asarray(found.tests.embedding, np.float32), found.defective
