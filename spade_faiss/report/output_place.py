"""Where results must not go: into images and banks, which would take them for their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spade_faiss.bank.places import MANIFEST, SHARDS
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.report.output_folder import check_folder
from spade_faiss.report.output_url import check_url
from spade_faiss.storage.url import is_url, local_path, parse_url


def check_place(out: str | Path, *, bank: Snapshot, images: Iterable[str | Path] = ()) -> None:
    """Raise InputError if `out` is no place for results.

    Args:
        out: the folder that they are to be written to, or a URL.
        bank: the bank that is searched.
        images: what is read: folders of images, images, folders of results.
    """
    if is_url(out):
        read = [bank.name, *images]
        check_url(parse_url(str(out)), [parse_url(str(each)) for each in read if is_url(each)])
        return
    sources = [local_path(each) for each in images if not is_url(each)]
    place = local_path(out).resolve()
    for source in sources:
        folder = source.resolve()
        if source.is_dir() and place.is_relative_to(folder):
            raise InputError(f"out={out} lies inside of {source}: its pictures would be scored the next time; choose another")
        if folder.is_relative_to(place):
            raise InputError(f"out={out} holds {source}, which is read; choose another folder")
    for folder in (place, *place.parents):
        if folder == bank.path.resolve() or ((folder / MANIFEST).is_file() and (folder / SHARDS).is_dir()):
            raise InputError(f"out={out} lies inside of the bank {folder}; choose a folder outside of it")
    if bank.path.resolve().is_relative_to(place):
        raise InputError(f"out={out} holds the bank {bank.path}; choose another folder")
    for folder in place.parents:
        if (folder / "train" / "good").is_dir() or (folder / "test" / "good").is_dir():
            part = place.relative_to(folder).parts[0]
            if part in ("train", "test", "ground_truth"):
                raise InputError(f"out={out} lies inside of the data set {folder}; choose a folder outside of its {part}/")
    _check_normal_images(local_path(out), bank)
    check_folder(local_path(out))


def _check_normal_images(out: Path, bank: Snapshot) -> None:
    """Refuse a folder of the bank's own images, from which more may be added to it, unless the bank lies there as well."""
    place, home = out.resolve(), bank.path.resolve()
    above = {folder for folder in (place, *place.parents) if not home.is_relative_to(folder)}
    if not above:
        return
    if inside := sorted(above & bank.image_folders()):
        raise InputError(f"out={out} lies inside of {inside[0]}, where normal images of the bank are; choose another")
