"""The pictures that options are compared on: normal ones, spoilt copies of some of them, and the features of all, kept on disk.

Features are computed once for a network and a size of its input; all options are made of the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.settings import Run
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import FeatureBatch, concatenate
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.decoding import MAX_PIXELS, decode, naming_file
from spade_faiss.features.frames import Frame
from spade_faiss.features.pages import split_page
from spade_faiss.features.pictures import Mask, Picture, to_mask
from spade_faiss.features.placement import Placement, place
from spade_faiss.features.roi import mask_of
from spade_faiss.features.roi_files import place_roi
from spade_faiss.spoil.foreground import find_object
from spade_faiss.spoil.spoiling import Spoil, plan_spoils, spoil
from spade_faiss.tuning.feature_files import load_features, load_shown, save_features, save_shown
from spade_faiss.tuning.picture_grid import SIDE, visible_in, whole
from spade_faiss.tuning.picture_stream import PicturesOf, longest_side
from spade_faiss.tuning.references import Sizes, chosen, read_references

# How many defects are shown on the page, about.
_SHOWN = 12


@dataclass(frozen=True, eq=False, kw_only=True)
class InPicture:
    """Where the pictures that are scored lie in the input, so that maps in other inputs can be compared with theirs.

    Args:
        preprocess: how pictures lie in the input.
        normal_sizes, spoilt_sizes: the width and height of each picture, as it was spoilt.
        masks: (S, SIDE, SIDE) where defective pictures are defective, see `picture_grid`; None if that is not known.
    """

    preprocess: Preprocess
    normal_sizes: Sizes
    spoilt_sizes: Sizes
    masks: npt.NDArray[np.bool_] | None


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
        in_picture: where they lie in the input; None where no other input is compared with this one.
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
    in_picture: InPicture | None = None

    @property
    def normal_count(self) -> int:
        """How many normal pictures are scored."""
        return len(self.rows) if self.normals is None else len(self.normals)

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """(S,) whether the input shows anything of the defect; those whose place is not known count as shown."""
        if self.masks is None:
            return np.ones(len(self.spoilt), np.bool_)
        return np.asarray(self.masks.any(axis=(1, 2)))

    @property
    def groups(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(n,), (S,) the number of the picture that each was made of, or of the group that this belongs to."""
        if self.normals is not None:
            return np.arange(len(self.normals)), len(self.normals) + np.arange(len(self.spoilt))
        names, rows = self.references.groups or [""] * len(self.references), self.rows.tolist()
        numbers: dict[str, int] = {}
        own = [numbers.setdefault(f"group {names[row]}" if names[row] else f"picture {row}", len(numbers)) for row in rows]
        return np.array(own), np.array(own)[self.owner]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Of how many normal pictures copies are spoilt, how many copies of each, and the seed that decides which and how."""

    pictures: int
    each: int
    seed: int


def make_samples(
    folder: Path,
    backbone: Backbone,
    records: Sequence[ImageRecord],
    copies: Copies,
    run: Run,
    inputs: Sequence[Preprocess] = (),
) -> tuple[Samples, list[ImageRecord]]:
    """Spoil copies of normal pictures and compute the features of all; what is in `folder` already is read.

    Args:
        folder: where features are kept; those of the normal pictures beside it, for whoever spoils others of their copies.
        backbone: computes them.
        records: the normal pictures, which are the references.
        copies: how many of them are spoilt, and how.
        run: how images are read, and how many may be skipped.
        inputs: all inputs that are compared: copies are then the same in each of them, and spoilt wherever one shows the
            picture. Without, they are spoilt where the backbone's own input shows it.

    Returns:
        The samples, and the records of the normal pictures that could be read.
    """
    own = backbone.source.preprocess
    longest = longest_side([each.input_size for each in (own, *inputs)])
    found, records, sizes = read_references(folder.parent / f"references-{longest}", backbone, records, run, longest)
    if len(records) < len(found):  # some of them cannot be read for another input
        wanted = {record.id for record in records}
        places = [place for place, name in enumerate(found.ids) if name in wanted]
        found, sizes = chosen(found, places), [sizes[place] for place in places]
    rows = np.sort(np.random.default_rng([copies.seed, 0x5A3]).permutation(len(records))[: copies.pictures])
    if not (folder / "done").exists():
        _spoil_all(folder, PicturesOf(backbone, run, longest), records, rows.tolist(), copies, inputs or [own])
    made = json.loads((folder / "made.json").read_bytes())
    spoils, owner = [Spoil(**values) for values in made["spoils"]], made["owner"]
    own_sizes = [sizes[row] for row in rows.tolist()]
    where = InPicture(
        preprocess=own,
        normal_sizes=own_sizes,
        spoilt_sizes=[own_sizes[number] for number in owner],
        masks=_unpacked(folder / "grid.npy", SIDE),
    )
    samples = Samples(
        references=found,
        normals=None,
        rows=rows,
        spoilt=load_features(folder / "spoilt"),
        masks=_unpacked(folder / "masks.npy", backbone.input_size[1]),
        owner=np.array(owner, np.int64),
        spoils=spoils,
        kinds=[each.kind for each in spoils],
        shown=load_shown(folder),
        in_picture=where if inputs else None,
    )
    return samples, records


def _spoil_all(
    folder: Path,
    pictures: PicturesOf,
    records: Sequence[ImageRecord],
    rows: Sequence[int],
    copies: Copies,
    inputs: Sequence[Preprocess],
) -> None:
    """Spoil copies of the pictures of some rows, and write their features, masks and plans into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = plan_spoils(len(rows), copies.each, copies.seed)
    batches: list[FeatureBatch] = []
    masks: list[Mask] = []
    on_grid: list[Mask] = []
    made: list[Spoil] = []
    owner: list[int] = []
    shown: dict[int, Picture] = {}
    with pictures.stream(len(rows) * copies.each, "spoilt copies") as stream:
        for number, row in enumerate(rows):
            other = records[(row + 1 + len(records) // 2) % len(records)]
            scene = [pictures.read(record) for record in (records[row], other)]
            spoilt = _spoilt(records[row], scene, inputs, plans[number])
            placed: list[Placement] = []
            for part in stream([copy.frame for copy in spoilt]):
                if number % max(1, len(rows) // _SHOWN) == 0 and not placed:
                    shown[len(made)] = part.pictures[0]
                batches.append(part.batch)
                placed += part.placements
            for copy, where in zip(spoilt, placed, strict=True):
                masks.append(_placed_mask(copy.mask, where))
                on_grid.append(_placed_mask(copy.mask, whole(*where.original)))
                made.append(copy.how)
                owner.append(number)
    if not batches:
        raise InputError("no copy of these pictures could be spoilt: they show nothing but one color")
    save_features(folder / "spoilt", concatenate(batches))
    np.save(folder / "masks.npy", np.packbits(np.stack(masks), axis=-1))
    np.save(folder / "grid.npy", np.packbits(np.stack(on_grid), axis=-1))
    save_shown(folder, shown)
    content = {"owner": owner, "spoils": [asdict(each) for each in made]}
    (folder / "made.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "done").touch()


def read_samples(
    folder: Path,
    backbone: Backbone,
    records: Sequence[ImageRecord],
    labeled: Sequence[ImageRecord],
    run: Run,
    inputs: Sequence[Preprocess] = (),
) -> tuple[Samples, list[ImageRecord]]:
    """Compute the features of normal pictures, the references, and of a labeled set in place of spoilt copies.

    Args:
        folder: where features are kept.
        backbone: computes them.
        records: the normal pictures.
        labeled: the labeled ones; those that cannot be read are skipped, as `evaluate` skips them.
        run: how images are read.
        inputs: see `make_samples`.
    """
    longest = longest_side([each.input_size for each in (backbone.source.preprocess, *inputs)])
    references, readable, _ = read_references(folder.parent / f"references-{longest}", backbone, records, run, longest)
    has_masks = any(record.mask is not None for record in labeled)
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with PicturesOf(backbone, run, longest).stream(len(labeled), "labeled pictures") as stream:
            parts, masks, on_grid = [], [], []
            kept: list[ImageRecord] = []
            sizes: Sizes = []
            shown: dict[int, Picture] = {}
            number, every = 0, max(1, sum(bool(record.defective) for record in labeled) // _SHOWN)
            for part in stream(labeled):
                parts.append(part.batch)
                kept += part.records
                sizes += [where.original for where in part.placements]
                for record, where, picture in zip(part.records, part.placements, part.pictures, strict=True):
                    if record.defective:
                        shown |= {number: picture} if number % every == 0 else {}
                        number += 1
                    if has_masks and record.defective:
                        own_mask, grid_mask = _given_masks(record, where)
                        masks.append(own_mask)
                        on_grid.append(grid_mask)
        defective = [bool(record.defective) for record in kept]
        if not any(defective) or all(defective):
            raise InputError("of the labeled pictures, no normal or no defective one could be read")
        save_features(folder / "labeled", concatenate(parts))
        if has_masks:
            np.save(folder / "masks.npy", np.stack(masks))
            np.save(folder / "grid.npy", np.stack(on_grid))
        save_shown(folder, shown)
        content = {"defective": defective, "kinds": [str(record.kind) for record in kept], "sizes": sizes}
        (folder / "made.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "done").touch()
    features, content = load_features(folder / "labeled"), json.loads((folder / "made.json").read_bytes())
    is_defective = np.array(content["defective"], np.bool_)
    normals, spoilt = np.flatnonzero(~is_defective).tolist(), np.flatnonzero(is_defective).tolist()
    all_sizes = [(width, height) for width, height in content["sizes"]]
    samples = Samples(
        references=references,
        normals=chosen(features, normals),
        rows=np.empty(0, np.int64),
        spoilt=chosen(features, spoilt),
        masks=np.load(folder / "masks.npy") if has_masks else None,
        owner=np.empty(0, np.int64),
        spoils=[],
        kinds=[content["kinds"][place] for place in spoilt],
        shown=load_shown(folder),
        in_picture=InPicture(
            preprocess=backbone.source.preprocess,
            normal_sizes=[all_sizes[place] for place in normals],
            spoilt_sizes=[all_sizes[place] for place in spoilt],
            masks=np.load(folder / "grid.npy") if has_masks else None,
        )
        if inputs
        else None,
    )
    return samples, readable


def _given_masks(record: ImageRecord, where: Placement) -> tuple[Mask, Mask]:
    """The mask of a picture, of which a smaller copy may have been placed: in the input, and on the grid of the picture."""
    if record.mask is None:
        return np.zeros(where.valid.shape, np.bool_), np.zeros((SIDE, SIDE), np.bool_)
    with naming_file(record.path):
        file, page = split_page(record.path)
        size = decode(file.read_bytes(), MAX_PIXELS, page).size
    return to_mask(record.mask, replace(where, original=size)), to_mask(record.mask, whole(*size))


@dataclass(frozen=True, eq=False)
class _Copy:
    """A spoilt copy: its picture, where it was spoilt (H, W), and how."""

    frame: Frame
    mask: Mask
    how: Spoil


def _spoilt(record: ImageRecord, scene: Sequence[Picture], inputs: Sequence[Preprocess], plans: Sequence[Spoil]) -> list[_Copy]:
    """Spoilt copies of a picture; those that no input shows anything of are left out.

    Args:
        record: the picture.
        scene: its pixels, and those of another one.
        inputs: the inputs that it is looked at in.
        plans: how it is spoilt.
    """
    picture, donor = scene
    size = picture.shape[0], picture.shape[1]
    placements = [place(size[1], size[0], preprocess) for preprocess in inputs]
    allowed = np.zeros(size, np.bool_)
    for preprocess, placement in zip(inputs, placements, strict=True):
        roi = place_roi(preprocess)
        allowed |= visible_in(size, placement, placement.valid if roi is None else placement.valid & mask_of(roi))
    on = find_object(picture) & allowed
    on = on if on.any() else allowed
    found = []
    for number, how in enumerate(plans):
        made = spoil(picture, how, on=on, other=donor)
        if made is not None and any(_placed_mask(made.mask, placement).any() for placement in placements):
            frame = Frame(f"{record.id} ({number}: {how.kind})", record.path, pixels=made.picture)
            found.append(_Copy(frame, made.mask, how))
    return found


def _placed_mask(mask: Mask, placement: Placement) -> Mask:
    """A mask of the picture in the place of the picture: True where half of a pixel is defective, or any of it if none is."""
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(placement.resized, Image.Resampling.BOX)
    share = np.asarray(resized.crop(placement.visible))
    found = share >= 128
    return np.pad(found if found.any() else share > 0, placement.padding)


def _unpacked(path: Path, width: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.load(path), axis=-1, count=width).astype(np.bool_)
