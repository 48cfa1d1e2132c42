"""The pictures that options are compared on: normal ones, spoilt copies of some of them, and the features of all, kept on disk.

Features are computed once for a network and a size of its input; all options are made of the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.progress import Bar, progress_bar
from spade_faiss.core.settings import Run
from spade_faiss.core.timing import Timings
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch, concatenate
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.decoding import MAX_PIXELS, decode, naming_file
from spade_faiss.features.frames import Frame
from spade_faiss.features.pages import split_page
from spade_faiss.features.pictures import Mask, Picture, to_mask
from spade_faiss.features.pixels import to_rgb
from spade_faiss.features.placement import Placement, place
from spade_faiss.features.roi import mask_of
from spade_faiss.features.roi_files import place_roi
from spade_faiss.features.stream import FeatureStream
from spade_faiss.spoil.foreground import find_object
from spade_faiss.spoil.spoiling import Spoil, plan_spoils, spoil

# Of larger pictures a smaller copy is spoilt: the network sees no more of them.
_LONGEST_SIDE = 1024
_BATCH = 16
# How many defects are shown on the page, about.
_SHOWN = 12


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples:
    """What options are compared on.

    Args:
        references: the features of the normal pictures that others are compared with.
        normals: the features of normal pictures that are none of them; None where the references stand for themselves, each
            left out.
        rows: (n,) which references are scored as normal pictures, where `normals` is None.
        spoilt: the features of S defective pictures.
        masks: (S, H, W), where they are defective; None if that is not known.
        owner: (S,) which of the n normal pictures each was made of; where `normals` is given, nothing was made of another.
        spoils: how each was made; empty for real defects.
        kinds: the kind of each defect.
        shown: a few of them: the number of the defect, and its picture as the network saw it.
    """

    references: FeatureBatch
    normals: FeatureBatch | None
    rows: npt.NDArray[np.int64]
    spoilt: FeatureBatch
    masks: npt.NDArray[np.bool_] | None
    owner: npt.NDArray[np.int64]
    spoils: Sequence[Spoil]
    kinds: Sequence[str]
    shown: Mapping[int, Picture]

    @property
    def normal_count(self) -> int:
        """How many normal pictures are scored."""
        return len(self.rows) if self.normals is None else len(self.normals)

    @property
    def groups(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(n,), (S,) the number of the picture that each was made of, or of the group that this belongs to."""
        if self.normals is not None:
            return np.arange(len(self.normals)), len(self.normals) + np.arange(len(self.spoilt))
        names, rows = self.references.groups or [""] * len(self.references), self.rows.tolist()
        numbers: dict[str, int] = {}
        own = [numbers.setdefault(f"group {names[row]}" if names[row] else f"picture {row}", len(numbers)) for row in rows]
        return np.array(own), np.array(own)[self.owner]


def make_samples(
    folder: Path, backbone: Backbone, records: Sequence[ImageRecord], counts: tuple[int, int], run: Run, seed: int
) -> Samples:
    """Spoil copies of normal pictures and compute the features of all; what is in `folder` already is read.

    Args:
        folder: where features are kept.
        backbone: computes them.
        records: the normal pictures, which are the references.
        counts: of how many of them copies are spoilt, and how many copies of each.
        run: how images are read.
        seed: decides which are spoilt, and how.
    """
    pictures, each = min(counts[0], len(records)), counts[1]
    rows = np.sort(np.random.default_rng([seed, 0x5A3]).permutation(len(records))[:pictures])
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bar(len(records) + pictures * each, "features", run.progress) as bar:
            stream = _Stream(backbone, run, bar)
            _save(folder / "references", concatenate([batch for batch, _, _ in stream.records(records)]))
            plans = plan_spoils(pictures, each, seed)
            batches: list[FeatureBatch] = []
            masks: list[Mask] = []
            made: list[Spoil] = []
            owner: list[int] = []
            shown: dict[int, Picture] = {}
            for number, row in enumerate(rows.tolist()):
                other = records[(row + 1 + len(records) // 2) % len(records)]
                frames, found, spoils = _spoilt(backbone, records[row], other, plans[number])
                placed: list[Placement] = []
                for batch, placements, pictures_seen in stream.records(frames):
                    if number % max(1, pictures // _SHOWN) == 0 and not placed:
                        shown[len(made)] = pictures_seen[0]
                    batches.append(batch)
                    placed += placements
                masks += [_placed_mask(mask, where) for mask, where in zip(found, placed, strict=True)]
                made += spoils
                owner += [number] * len(frames)
        if not batches:
            raise InputError("no copy of these pictures could be spoilt: they show nothing but one color")
        _save(folder / "spoilt", concatenate(batches))
        np.save(folder / "masks.npy", np.packbits(np.stack(masks), axis=-1))
        _save_shown(folder, shown)
        content = {"owner": owner, "spoils": [asdict(each) for each in made], "width": masks[0].shape[1]}
        (folder / "made.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "done").touch()
    made_content = json.loads((folder / "made.json").read_bytes())
    spoils = [Spoil(**values) for values in made_content["spoils"]]
    packed = np.load(folder / "masks.npy")
    return Samples(
        references=_load(folder / "references", backbone),
        normals=None,
        rows=rows,
        spoilt=_load(folder / "spoilt", backbone),
        masks=np.unpackbits(packed, axis=-1, count=made_content["width"]).astype(np.bool_),
        owner=np.array(made_content["owner"], np.int64),
        spoils=spoils,
        kinds=[each.kind for each in spoils],
        shown=_load_shown(folder),
    )


def read_samples(
    folder: Path, backbone: Backbone, records: Sequence[ImageRecord], labeled: Sequence[ImageRecord], run: Run
) -> Samples:
    """Compute the features of normal pictures, the references, and of a labeled set in place of spoilt copies."""
    defective = np.array([bool(record.defective) for record in labeled])
    has_masks = any(record.mask is not None for record in labeled)
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bar(len(records) + len(labeled), "features", run.progress) as bar:
            stream = _Stream(backbone, run, bar)
            _save(folder / "references", concatenate([batch for batch, _, _ in stream.records(records)]))
            parts, masks = [], []
            shown: dict[int, Picture] = {}
            number, every = 0, max(1, int(defective.sum()) // _SHOWN)
            for start in range(0, len(labeled), _BATCH):
                some = labeled[start : start + _BATCH]
                for batch, placements, pictures in stream.records(some):
                    parts.append(batch)
                    for record, where, picture in zip(some, placements, pictures, strict=True):
                        if record.defective:
                            shown |= {number: picture} if number % every == 0 else {}
                            number += 1
                        if has_masks and record.defective:
                            empty = np.zeros(where.valid.shape, np.bool_)
                            masks.append(empty if record.mask is None else _given_mask(record, where))
        _save(folder / "labeled", concatenate(parts))
        if has_masks:
            np.save(folder / "masks.npy", np.stack(masks))
        _save_shown(folder, shown)
        (folder / "done").touch()
    features = _load(folder / "labeled", backbone)
    return Samples(
        references=_load(folder / "references", backbone),
        normals=_chosen(features, np.flatnonzero(~defective)),
        rows=np.empty(0, np.int64),
        spoilt=_chosen(features, np.flatnonzero(defective)),
        masks=np.load(folder / "masks.npy") if has_masks else None,
        owner=np.empty(0, np.int64),
        spoils=[],
        kinds=[str(record.kind) for record in labeled if record.defective],
        shown=_load_shown(folder),
    )


def _given_mask(record: ImageRecord, where: Placement) -> Mask:
    """The mask of a picture, of which a smaller copy may have been placed."""
    assert record.mask is not None
    with naming_file(record.path):
        file, page = split_page(record.path)
        size = decode(file.read_bytes(), MAX_PIXELS, page).size
    return to_mask(record.mask, replace(where, original=size))


def _chosen(batch: FeatureBatch, places: npt.NDArray[np.int64]) -> FeatureBatch:
    return concatenate([batch[int(place) : int(place) + 1] for place in places])


class _Stream:
    """Computes features of records a few at a time, without their names: sets may have the same."""

    def __init__(self, backbone: Backbone, run: Run, bar: Bar) -> None:
        self._backbone, self._run, self._bar = backbone, Run(device=run.device, memory=run.memory, max_skipped=0), bar

    def records(self, records: Sequence[ImageRecord]) -> Iterator[tuple[FeatureBatch, list[Placement], list[Picture]]]:
        """Yield the features of some pictures, where each lies in the input, and the inputs as pictures."""
        for start in range(0, len(records), _BATCH):
            frames = [
                record if isinstance(record, Frame) else self._frame(record) for record in records[start : start + _BATCH]
            ]
            stream = FeatureStream(self._backbone, self._run, batch_size=_BATCH, timings=Timings())
            for extracted in stream(Path(), frames, "features"):
                yield (
                    extracted.batch,
                    [image.placement for image in extracted.loaded],
                    [image.picture for image in extracted.loaded],
                )
            self._bar.update(len(frames))

    def _frame(self, record: ImageRecord) -> Frame:
        return Frame(record.id, record.path, pixels=read_picture(record, self._backbone))


def read_picture(record: ImageRecord, backbone: Backbone) -> Picture:
    """(H, W, 3) the picture as it is spoilt: upright, in RGB of 8 bits, and not larger than it has to be."""
    file, page = split_page(record.path)
    with naming_file(record.path):
        image = to_rgb(decode(file.read_bytes(), MAX_PIXELS, page), backbone.source.preprocess.bit_depth)
    longest = max(_LONGEST_SIDE, 2 * max(backbone.input_size))
    if max(image.size) > longest:
        factor = longest / max(image.size)
        size = (max(1, round(image.size[0] * factor)), max(1, round(image.size[1] * factor)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def _spoilt(
    backbone: Backbone, record: ImageRecord, other: ImageRecord, plans: Sequence[Spoil]
) -> tuple[list[Frame], list[Mask], list[Spoil]]:
    """Spoilt copies of a picture with their masks; those that show nothing are left out."""
    picture, donor = read_picture(record, backbone), read_picture(other, backbone)
    placement = place(picture.shape[1], picture.shape[0], backbone.source.preprocess)
    roi = place_roi(backbone.source.preprocess)
    allowed = visible_in(picture, placement, placement.valid if roi is None else placement.valid & mask_of(roi))
    on = find_object(picture) & allowed
    on = on if on.any() else allowed
    frames, masks, made = [], [], []
    for number, how in enumerate(plans):
        found = spoil(picture, how, on=on, other=donor)
        if found is not None and _placed_mask(found.mask, placement).any():
            frames.append(Frame(f"{record.id} ({number}: {how.kind})", record.path, pixels=found.picture))
            masks.append(found.mask)
            made.append(how)
    return frames, masks, made


def visible_in(picture: Picture, placement: Placement, inside: Mask) -> Mask:
    """(H, W) of the picture: True where the input shows it, inside a part (h, w) of the input."""
    places = []
    for side, resized, offset, most in zip(
        (picture.shape[0], picture.shape[1]), placement.resized[::-1], placement.offset[::-1], inside.shape, strict=True
    ):
        at = ((np.arange(side) + 0.5) * resized / side).astype(np.int64) + offset
        places.append((np.clip(at, 0, most - 1), (at >= 0) & (at < most)))
    (rows, row_shown), (columns, column_shown) = places
    found: Mask = inside[np.ix_(rows, columns)] & row_shown[:, None] & column_shown[None, :]
    return found


def _placed_mask(mask: Mask, placement: Placement) -> Mask:
    """A mask of the picture in the place of the picture: True where half of a pixel is defective, or any of it if none is."""
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(placement.resized, Image.Resampling.BOX)
    share = np.asarray(resized.crop(placement.visible))
    found = share >= 128
    return np.pad(found if found.any() else share > 0, placement.padding)


def _save(path: Path, batch: FeatureBatch) -> None:
    """Features as files that are mapped later: maps in half precision, as banks store them."""
    arrays: dict[str, npt.NDArray[Any]] = {"embedding": np.asarray(batch.embedding, np.float32)}
    if batch.valid is not None:
        arrays["valid"] = batch.valid
    path.mkdir(exist_ok=True)
    for name, values in arrays.items():
        np.save(path / f"{name}.npy", values)
    for number, maps in enumerate(batch.levels.values()):
        np.save(path / f"level-{number}.npy", np.asarray(maps, np.float16))
    with atomic_path(path / "ids.json") as temporary:
        temporary.write_text(json.dumps([list(batch.ids), list(batch.levels)]), encoding="utf-8")


def _save_shown(folder: Path, shown: Mapping[int, Picture]) -> None:
    np.save(folder / "shown.npy", np.stack(list(shown.values())))
    np.save(folder / "numbers.npy", np.array(list(shown), np.int64))


def _load_shown(folder: Path) -> dict[int, Picture]:
    return dict(zip(np.load(folder / "numbers.npy").tolist(), np.load(folder / "shown.npy"), strict=True))


def _load(path: Path, backbone: Backbone) -> FeatureBatch:
    ids, levels = json.loads((path / "ids.json").read_bytes())
    valid = path / "valid.npy"
    return FeatureBatch(
        ids,
        np.load(path / "embedding.npy"),
        {name: np.load(path / f"level-{number}.npy", mmap_mode="r") for number, name in enumerate(levels)},
        valid=np.load(valid) if valid.exists() else None,
    )
