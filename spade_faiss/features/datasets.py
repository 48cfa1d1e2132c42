"""Finds images: a folder, a list or a labeled set on disk becomes records of its images.

Of an image, nothing is read here but how many pages it has; `features.pictures` reads the rest.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.settings import LabeledSet, Run
from spade_faiss.features.folders import SUFFIXES, LeftOut, Walk, is_image, name_some, name_suffixes
from spade_faiss.features.kinds import check_kinds
from spade_faiss.features.mask_files import FOLDER, MASK_NAMES, MaskFinder
from spade_faiss.features.pages import list_pages
from spade_faiss.features.records import ImageRecord as ImageRecord  # for whoever looks for it beside `find_images`
from spade_faiss.features.video_frames import LostFrames, VideoFrame, list_frames
from spade_faiss.features.video_names import VIDEO_SUFFIXES, check_can_read, is_video
from spade_faiss.storage.pictures import local_pictures

# A folder, an image, or a list of both.
Images = str | Path | Sequence[str | Path]

LAYOUT = "ROOT/train/good/*, ROOT/test/<kind>/* and, where there are masks, ROOT/ground_truth/<kind>/<stem>_mask.png"

_SUFFIXES = (*SUFFIXES, *VIDEO_SUFFIXES)
_by_id = attrgetter("id")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Survey:
    """The images that were found, and what else lies there.

    Args:
        root: the folder that the ids of the records start from.
        records: the images.
        left_out: what lies in the folders and is not read.
        sources: the folders that were asked for.
        entered: the real paths of all folders that were walked, those behind links included.
    """

    root: Path
    records: list[ImageRecord]
    left_out: LeftOut
    sources: Sequence[Path] = ()
    entered: Sequence[Path] = ()

    def warn(self) -> None:
        """Log what is left out, where no result can say it."""
        for notice in self.left_out.notices():
            _log.warning("%s: %s", self.root, notice)


@dataclass(frozen=True)
class Dataset:
    """A labeled set: normal images to learn from, and images of all kinds to test with, as they were found."""

    root: Path
    train: list[ImageRecord]
    found: Survey

    @property
    def test(self) -> list[ImageRecord]:
        """The images to test with."""
        return self.found.records

    @property
    def has_masks(self) -> bool:
        """Whether masks mark the defects of the test images."""
        return any(record.mask is not None for record in self.test)


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Duplicate:
    """An image whose content was seen before, under the id `of`."""

    id: str
    of: str


def find_images(source: Images, run: Run = Run()) -> tuple[Path, list[ImageRecord]]:
    """Find images as `survey` does, and log what is left out.

    Returns:
        The root and the records.
    """
    found = survey(source, run)
    found.warn()
    return found.root, found.records


def survey(source: Images, run: Run = Run()) -> Survey:
    """Find the images of a folder (at any depth), of one file, or of a list of files and folders.

    Hidden files and folders are left out. Links to folders are followed; each folder is entered once. Videos in folders
    are left out where PyAV is missing, which reads them.

    Args:
        source: what to look through; what is at a URL is fetched.
        run: says which frames of videos are images.

    Returns:
        The root (the folder, the file's folder, or the common parent of the list), the records (those of a folder sorted by id,
        those of a list in its order), and what is left out.

    Raises:
        NotFoundError: for a path that does not exist.
        InputError: if there is no image, if a listed file is not an image, or if an image is listed twice.
        DependencyError: for a listed video, if PyAV is not installed.
    """
    listed = [source] if isinstance(source, str | Path) else list(source)
    items = [local_pictures(item, is_read, progress=run.progress) for item in listed]
    folders = [item.resolve() for item in items if item.is_dir()]
    walk = Walk()
    walked = iter(walk(folders))
    bases: list[Path] = []
    paths: list[Path] = []
    for item in items:
        if item.is_dir():
            bases.append(item.resolve())
            found = sorted(next(walked), key=lambda path: path.relative_to(bases[-1]).as_posix())
        elif not item.exists():
            raise NotFoundError(f"{str(item)!r} does not exist; give an image file, a folder of images, or a list of both")
        else:
            bases.append(item.parent.resolve())
            is_listed = item.is_file() and (is_image(item.name) or is_video(item.name))
            if is_listed and is_video(item.name):
                check_can_read(item)
            found = [bases[-1] / item.name] if is_listed else []
        if not found:
            there = walk.left_out(bases[-1]).files if item.is_dir() and len(items) == 1 else {}
            holds = f"; it holds {name_suffixes(there)}" if there else ""
            raise InputError(f"no image in {str(item)!r}: looked for files ending in {' '.join(_SUFFIXES)}{holds}")
        paths += found
    if not paths:
        raise InputError(f"the list of images is empty; give files ending in {' '.join(_SUFFIXES)}, or folders of them")
    root = Path(os.path.commonpath(bases))
    records = [record for path in paths for record in records_of(path, root, run)]
    if repeated := [name for name, count in Counter(record.id for record in records).items() if count > 1]:
        raise InputError(
            f"listed twice, in {str(root)!r}: {name_some(repeated)}; list every image once, alone or with its folder"
        )
    return Survey(root, records, walk.left_out(root), folders, walk.entered)


def is_read(name: str) -> bool:
    """Whether a file of this name is read: an image, a video, or a mask, which is an image."""
    return is_image(name) or is_video(name)


def records_of(path: Path, root: Path, run: Run = Run()) -> list[ImageRecord]:
    """The images that a file holds: one, or one for each page or for frames of a video.

    Args:
        path: the file.
        root: the folder that ids start from.
        run: says which frames of videos are images.

    Raises:
        InputError: for a name that is no UTF-8.
        DependencyError: for a video, if PyAV is not installed.
    """
    if not is_video(path.name):
        return [ImageRecord(_name(page, root), page) for page in list_pages(path)]
    frames, video, lost = list_frames(path, run.every)
    records: list[ImageRecord] = [
        VideoFrame(_name(frame, root), frame, video=video, number=number, time_s=time_s) for frame, number, time_s in frames
    ]
    return [*records, LostFrames(_name(path, root), path, reason=lost)] if lost else records


def load_dataset(root: str | Path, *, normal_kind: str = LabeledSet.normal_kind, run: Run = Run()) -> Dataset:
    """Read a labeled set that is laid out as MVTec AD: `train/good`, `test/<kind>`, `ground_truth/<kind>`.

    `train/good` may be missing. A set without a `ground_truth` folder has no masks; in a set with one, every defective image
    has its mask there, named as `mask_files.MASK_NAMES` says.

    Args:
        root: the folder of the set.
        normal_kind: what is called `good` there.
        run: says which frames of videos are images.

    Raises:
        NotFoundError: if there is no such folder.
        InputError: if `test` holds no images, or images outside the folders that name their kind, or a kind that is normal by
            its name and not the normal kind; or if a mask is missing or ambiguous.
    """
    root = local_pictures(root, is_read, progress=run.progress).resolve()
    if not root.is_dir():
        raise NotFoundError(f"dataset folder {str(root)!r} does not exist; expected {LAYOUT}")
    entries = sorted((root / "test").iterdir()) if (root / "test").is_dir() else []
    if strays := [f"test/{path.name}" for path in entries if path.is_file() and (is_image(path.name) or is_video(path.name))]:
        raise InputError(f"images of no kind in {str(root)!r}: {name_some(strays)}; expected {LAYOUT}")
    walk, masks = Walk(), MaskFinder(root)
    kinds = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    _check_links(kinds)
    found = [(path, kind.name) for kind, paths in zip(kinds, walk(kinds), strict=True) for path in paths]
    if not found:
        raise InputError(f"no test images in {str(root)!r}; expected {LAYOUT}, images ending in {' '.join(SUFFIXES)}")
    check_kinds({kind for _, kind in found}, normal_kind)
    test = [
        record
        for path, kind in sorted(found, key=lambda item: item[0].relative_to(root).as_posix())
        for record in _labeled(path, root, (kind, normal_kind), masks(path) if kind != normal_kind else None, run)
    ]
    unmasked = [record for record in test if record.defective and record.mask is None]
    if unmasked and masks.exists:
        raise InputError(
            f"{len(unmasked)} defective images in {str(root)!r} have no mask: {name_some([item.id for item in unmasked])}; "
            f"expected {FOLDER}/<kind>/{MASK_NAMES} for each of them, and {masks.describe(unmasked[0].path)} (without a "
            f"{FOLDER} folder, masks are not used; images of the kind {normal_kind!r} need none, see --normal-kind)"
        )
    for path in entries:
        if path.is_file() and not path.name.startswith("."):
            walk.count(path)
    normal = root / "train" / normal_kind
    normals = Walk()([normal])[0] if normal.is_dir() else []
    train = [record for path in normals for record in _labeled(path, root, (normal_kind, normal_kind), None, run)]
    return Dataset(root, sorted(train, key=_by_id), Survey(root, test, walk.left_out(root), kinds, walk.entered))


def check_skipped(skipped: Sequence[Skipped], max_skipped: int) -> None:
    """Raise InputError, which names the first of them, when more than `max_skipped` images were skipped."""
    check_at_least("max_skipped", max_skipped, 0)
    if len(skipped) > max_skipped:
        named = name_some([f"{item.id!r} ({item.reason})" for item in skipped])
        raise InputError(
            f"{len(skipped)} images were skipped, at most {max_skipped} may be: {named}; "
            f"repair or remove them, or go on without them: --max-skipped {len(skipped)}"
        )


def _check_links(kinds: Sequence[Path]) -> None:
    """Raise InputError if one kind is another one, or a part of it, by a link: its images would have two labels."""
    real = {kind: kind.resolve() for kind in kinds}
    for link in (kind for kind in kinds if kind.is_symlink()):
        for kind in kinds:
            if kind != link and (real[kind].is_relative_to(real[link]) or real[link].is_relative_to(real[kind])):
                raise InputError(f"{link} is a link to the images of {kind}, which would be of two kinds; remove the link")


def _labeled(path: Path, root: Path, kinds: tuple[str, str], mask: Path | None, run: Run) -> list[ImageRecord]:
    """The images of a file in a labeled set, of a kind beside the normal kind; each page with the page of the mask that has its
    number.
    """
    kind, normal_kind = kinds
    records = [replace(record, kind=kind, normal_kind=normal_kind) for record in records_of(path, root, run)]
    if mask is None:
        return records
    masks = list_pages(mask)
    if len(masks) != len(records):
        raise InputError(
            f"the mask {str(mask)!r} has {len(masks)} pages, its image {path.name!r} has {len(records)}; they must have as many"
        )
    return [replace(record, mask=page_mask) for record, page_mask in zip(records, masks, strict=True)]


def _name(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the file name {name!r} is not valid UTF-8, as which ids are stored; rename the file") from error
    return name
