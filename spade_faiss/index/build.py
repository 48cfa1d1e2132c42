"""Building the indexes that a recipe needs beside a bank, and keeping them up to date."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from spade_faiss.bank.locks import WriterLock
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.core.inside import check_inside, files_in
from spade_faiss.core.process import fork_safe
from spade_faiss.index.built_index import check_not_empty, index_folder, read_built
from spade_faiss.index.encoding import Encode, encode_here
from spade_faiss.index.gallery_build import build_gallery
from spade_faiss.index.gallery_manifest import GalleryIndexManifest
from spade_faiss.index.image_index import ImageIndexManifest, build_image_index, check_factory
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Recipe


@dataclass(frozen=True)
class Built:
    """What `build_index` did for a recipe.

    Args:
        recipe: the name of the recipe.
        image: the manifest of its image index; None if it needs none.
        gallery: the manifest of its gallery index; None if it needs none.
        done: `image` or `gallery` -> what was done, in words.
        products: of a bank of several products, what was done for each that needs an index of its own.
        bytes_before: the bytes of the index files before.
        total_s: the seconds that it took.
    """

    recipe: str
    image: ImageIndexManifest | None
    gallery: GalleryIndexManifest | None
    done: dict[str, str]
    bytes_before: int
    total_s: float
    products: dict[str, Built] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The bytes of all index files."""
        own = sum(part.bytes for part in (self.image, self.gallery) if part is not None)
        return own + sum(built.bytes for built in self.products.values())


class _Options(TypedDict):
    """How something is built, see `_build`."""

    rebuild: bool
    progress: bool
    asked: bool
    encode: Encode


@fork_safe
def build_index(
    bank: Snapshot,
    recipe: Recipe,
    *,
    rebuild: bool = False,
    progress: bool = False,
    encode: Encode = encode_here,
) -> Built | None:
    """Build the indexes that a recipe needs beside a bank, or bring them up to date.

    Images that an index does not hold are added to it. It is built anew if it was built with other settings, if too many of its
    entries are tombstones, or if its training does not fit the bank any more.

    In a bank of several products, the index of the embeddings is of all of them, and each product has an index of its maps by
    itself: what others are added says nothing about it, and a search of a product costs nothing for them.

    Args:
        bank: the bank, not empty.
        recipe: the recipe.
        rebuild: build all indexes anew in any case.
        progress: show bars on stderr if that is a terminal.
        encode: encodes the maps of shards, in this process or elsewhere; and embeddings for an inverted file.

    Returns:
        What was done; None if the recipe needs no index.

    Raises:
        InputError: for an empty bank, settings that do not fit it, or a full disk.
        BankError: if another process is building it.
    """
    return _build(bank, recipe, rebuild=rebuild, progress=progress, asked=True, encode=encode)


def _build(bank: Snapshot, recipe: Recipe, *, rebuild: bool, progress: bool, asked: bool, encode: Encode) -> Built | None:
    """Do what `build_index` does; `asked` tells whether the recipe is the user's, and not just what a bank says."""
    start = time.perf_counter()
    check_not_empty(bank)
    needs_gallery_index = resolve_recipe(recipe).method.train is not None and not bank.is_of_products
    options: _Options = {"rebuild": rebuild, "progress": progress, "asked": asked, "encode": encode}
    parts = _build_products(bank, recipe, options) if bank.is_of_products else {}
    if not needs_gallery_index and not recipe.needs_image_index:
        before = sum(built.bytes_before for built in parts.values())
        return Built(recipe.name, None, None, {}, before, time.perf_counter() - start, parts) if parts else None
    folder = index_folder(bank, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    image, gallery, done = None, None, {}
    with WriterLock(folder, f"the index {folder}")():
        before = _bytes_of(bank, recipe)
        for place in _folders(bank, recipe):
            for leftover in files_in(place, TEMPORARY_PATTERN):  # a killed build left it
                leftover.unlink()
        if recipe.needs_image_index:
            image, done["image"] = build_image_index(
                bank, recipe, rebuild=rebuild, progress=progress, asked=asked, encode=encode
            )
        if needs_gallery_index:
            gallery, done["gallery"] = build_gallery(bank, recipe, rebuild=rebuild, progress=progress, encode=encode)
    before += sum(built.bytes_before for built in parts.values())
    return Built(recipe.name, image, gallery, done, before, time.perf_counter() - start, parts)


def _build_products(bank: Snapshot, recipe: Recipe, options: _Options) -> dict[str, Built]:
    """Do what `_build` does for each product of a bank."""
    found = {}
    for name in bank.products:
        try:
            built = _build(bank.part(name), recipe.within_product, **options)
        except InputError as error:
            raise InputError(f"product {name}: {error}") from error
        if built is not None:
            found[name] = built
    return found


@fork_safe
def update_indexes(
    bank: Snapshot, *, rebuild: bool = False, progress: bool = False, encode: Encode = encode_here
) -> list[Built]:
    """Bring all indexes that were built beside a bank up to date; see `build_index`, which it calls for each recipe.

    Raises:
        InputError: as `build_index`, and for an index that has to be built anew, which takes long however small the bank is:
            give its recipe.
    """
    recipes: dict[str, Build] = {}
    for image in read_built(ImageIndexManifest, bank):
        recipes[image.recipe] = Build(image=image.factory)
    for gallery in [gallery for part in views_of(bank) for gallery in read_built(GalleryIndexManifest, part)]:
        factory = recipes.get(gallery.recipe, Build()).image
        recipes[gallery.recipe] = Build(
            image=factory, gallery=gallery.gallery, settings=gallery.settings, levels=gallery.levels
        )
    found = (
        _build(bank, Recipe(name=name, build=build), rebuild=rebuild, progress=progress, asked=False, encode=encode)
        for name, build in sorted(recipes.items())
    )
    return [built for built in found if built is not None]


def views_of(bank: Snapshot) -> list[Snapshot]:
    """What indexes and calibrations may be of: the bank, and each product of a bank of several."""
    return [bank, *(bank.part(name) for name in (bank.products if bank.is_of_products else ()))]


def check_recipe(recipe: Recipe, embedding_dim: int) -> None:
    """Raise InputError if a recipe's indexes cannot be built; to be called before long work that would end in it."""
    check_factory(recipe, embedding_dim)
    resolve_recipe(recipe)


def _bytes_of(bank: Snapshot, recipe: Recipe) -> int:
    """Return the bytes of all files of a recipe's indexes."""
    suffixes = (ImageIndexManifest.SUFFIX, GalleryIndexManifest.SUFFIX)
    files = [path for place in _folders(bank, recipe) for path in place.glob("*") if path.suffix in suffixes]
    return sum(path.lstat().st_size for path in files)


def _folders(bank: Snapshot, recipe: Recipe) -> tuple[Path, Path]:
    """Return the folders that hold the files of a recipe's indexes, of which the second one may be missing."""
    folder = index_folder(bank, recipe)
    return folder, check_inside(folder, GalleryIndexManifest.FOLDER)
