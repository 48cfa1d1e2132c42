"""Finds image files: a folder, a list or a labeled set on disk becomes records of its images.

Of an image, nothing is read here but how many pages it has; `features.pictures` reads the rest.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.schema import check_at_least
from spade_faiss.features.pages import list_pages

# A folder, an image, or a list of both.
Images = str | Path | Sequence[str | Path]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
LAYOUT = "ROOT/train/good/*, ROOT/test/<kind>/* and, where there are masks, ROOT/ground_truth/<kind>/<stem>_mask.png"

_by_id = attrgetter("id")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image file that was found.

    Args:
        id: its POSIX path below the root under which it was found; of a page, with its number, as `scan.tif#2`.
        path: where the file is; of a page, with its number.
        kind: `good` or the kind of defect, in a labeled set; None elsewhere.
        mask: the file that marks its defective pixels, in a labeled set that has masks.
    """

    id: str
    path: Path
    kind: str | None = None
    mask: Path | None = None

    @property
    def defective(self) -> bool | None:
        """Whether the image shows a defect; None where it is not labeled."""
        return None if self.kind is None else self.kind != "good"


@dataclass(frozen=True)
class Dataset:
    """A labeled set: normal images to learn from, and images of all kinds to test with."""

    root: Path
    train: list[ImageRecord]
    test: list[ImageRecord]

    @property
    def has_masks(self) -> bool:
        """Whether masks mark the defects of the test images."""
        return any(record.mask is not None for record in self.test)


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and the reason."""

    id: str
    reason: str


def find_images(source: Images) -> tuple[Path, list[ImageRecord]]:
    """Find the images of a folder (at any depth), of one file, or of a list of files and folders.

    Hidden files and folders are left out, and links to folders are not followed.

    Returns:
        The root (the folder, the file's folder, or the common parent of the list) and the records: those of a folder sorted
        by id, those of a list in its order.

    Raises:
        NotFoundError: for a path that does not exist.
        InputError: if there is no image, if a listed file is not an image, or if an image is listed twice.
    """
    sources = [source] if isinstance(source, str | Path) else source
    bases: list[Path] = []
    paths: list[Path] = []
    for item in map(Path, sources):
        if item.is_dir():
            bases.append(item.resolve())
            found = sorted(_walk(bases[-1]), key=lambda path: path.relative_to(bases[-1]).as_posix())
        elif not item.exists():
            raise NotFoundError(f"{str(item)!r} does not exist; give an image file, a folder of images, or a list of both")
        else:
            bases.append(item.parent.resolve())
            found = [bases[-1] / item.name] if item.is_file() and item.suffix.lower() in SUFFIXES else []
        if not found:
            raise InputError(f"no image in {str(item)!r}: looked for files ending in {' '.join(SUFFIXES)}")
        paths += found
    if not paths:
        raise InputError(f"the list of images is empty; give files ending in {' '.join(SUFFIXES)}, or folders of them")
    root = Path(os.path.commonpath(bases))
    records = [_record(page, root) for path in paths for page in list_pages(path)]
    if repeated := [name for name, count in Counter(record.id for record in records).items() if count > 1]:
        raise InputError(
            f"listed twice, in {str(root)!r}: {_name_some(repeated)}; list every image once, alone or with its folder"
        )
    return root, records


def load_dataset(root: str | Path) -> Dataset:
    """Read a labeled set that is laid out as MVTec AD: `train/good`, `test/<kind>`, `ground_truth/<kind>`.

    `train/good` may be missing. A set without a `ground_truth` folder has no masks; in a set with one, every defective image
    has its mask there, named `<stem>_mask.png` or `<stem>.png`.

    Raises:
        NotFoundError: if there is no such folder.
        InputError: if `test` holds no images, or images outside the folders that name their kind, or if a mask is missing.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise NotFoundError(f"dataset folder {str(root)!r} does not exist; expected {LAYOUT}")
    entries = sorted((root / "test").iterdir()) if (root / "test").is_dir() else []
    if strays := [f"test/{path.name}" for path in entries if path.is_file() and _is_image(path.name)]:
        raise InputError(f"images of no kind in {str(root)!r}: {_name_some(strays)}; expected {LAYOUT}")
    kinds = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    test = [record for kind in kinds for path in _walk(kind) for record in _labeled(path, root, kind.name)]
    if not test:
        raise InputError(f"no test images in {str(root)!r}; expected {LAYOUT}, images ending in {' '.join(SUFFIXES)}")
    unmasked = sorted(record.id for record in test if record.defective and record.mask is None)
    if unmasked and (root / "ground_truth").is_dir():
        raise InputError(
            f"{len(unmasked)} defective images in {str(root)!r} have no mask: {_name_some(unmasked)}; expected "
            "ground_truth/<kind>/<stem>_mask.png for each of them (without a ground_truth folder, masks are not used)"
        )
    normal = root / "train" / "good"
    train = [_record(page, root, "good") for path in _walk(normal) for page in list_pages(path)] if normal.is_dir() else []
    return Dataset(root, sorted(train, key=_by_id), sorted(test, key=_by_id))


def check_skipped(skipped: Sequence[Skipped], max_skipped: int) -> None:
    """Raise InputError, which names the first of them, when more than `max_skipped` images were skipped."""
    check_at_least("max_skipped", max_skipped, 0)
    if len(skipped) > max_skipped:
        named = _name_some([f"{item.id!r} ({item.reason})" for item in skipped])
        raise InputError(
            f"{len(skipped)} images were skipped, at most {max_skipped} may be: {named}; "
            f"repair or remove them, or go on without them: --max-skipped {len(skipped)}"
        )


def _walk(folder: Path) -> list[Path]:
    """The image files below a folder, in no particular order."""

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list {str(error.filename)!r}: {error.strerror}; make it readable, or move it elsewhere")

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if _is_image(name))
        # Pipes and devices are left out: reading one could block forever. A broken link stays in, and is reported when it is
        # read.
        found += (path for path in paths if path.is_file() or not path.exists())
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _labeled(path: Path, root: Path, kind: str) -> list[ImageRecord]:
    """The images of a file in a labeled set, each page with the page of the mask that has its number."""
    pages, mask = list_pages(path), _find_mask(path, root)
    if mask is None or kind == "good":
        return [_record(page, root, kind) for page in pages]
    masks = list_pages(mask)
    if len(masks) != len(pages):
        raise InputError(
            f"the mask {str(mask)!r} has {len(masks)} pages, its image {path.name!r} has {len(pages)}; they must have as many"
        )
    return [_record(page, root, kind, its_mask) for page, its_mask in zip(pages, masks, strict=True)]


def _find_mask(path: Path, root: Path) -> Path | None:
    folder = root / "ground_truth" / path.relative_to(root / "test").parent
    candidates = (folder / f"{path.stem}_mask.png", folder / f"{path.stem}.png")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _record(path: Path, root: Path, kind: str | None = None, mask: Path | None = None) -> ImageRecord:
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the file name {name!r} is not valid UTF-8, as which ids are stored; rename the file") from error
    return ImageRecord(name, path, kind, mask if kind != "good" else None)


def _name_some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
