"""Building everything that a recipe's queries need and that is not made when a bank is opened, and keeping it up to date."""

from __future__ import annotations

import time
from dataclasses import dataclass

from spade_faiss.bank.bank import Bank
from spade_faiss.bank.locks import WriterLock
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.index.gallery_index import GalleryIndexManifest, build_gallery, built_galleries
from spade_faiss.index.image_index import ImageIndexManifest, build_image_index, built_indexes, check_factory
from spade_faiss.index.staleness import index_folder
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Build, Recipe


@dataclass(frozen=True)
class Built:
    """What was built: the index over embeddings, the one over the maps; None where the recipe needs none.

    `done` says in words what was done, for each of them.
    """

    recipe: str
    image: ImageIndexManifest | None
    gallery: GalleryIndexManifest | None
    done: dict[str, str]
    bytes_before: int
    total_s: float

    @property
    def bytes(self) -> int:
        """Bytes on disk of all of it."""
        return sum(part.bytes for part in (self.image, self.gallery) if part is not None)


def build_index(bank: Bank, recipe: Recipe, *, rebuild: bool = False, progress: bool = False) -> Built | None:
    """Build what a recipe needs beside a bank, or bring it up to date with it; None where it needs nothing.

    Images that are not covered are added; where that does not do, because what was learned does not fit the bank any more or
    too many entries are of removed images, it is built anew.

    Args:
        bank: the bank, not empty.
        recipe: what to build.
        rebuild: build anew in any case.
        progress: show bars on stderr if that is a terminal.

    Raises:
        InputError: for an empty bank, settings that do not fit it, or a full disk.
        BankError: if another process is building it.
    """
    start = time.perf_counter()
    if len(bank) == 0:
        raise InputError(f"the bank {bank.path} is empty; extract images first")
    keeps = resolve_recipe(recipe).method.train is not None
    if not keeps and not recipe.needs_image_index:
        return None
    folder = index_folder(bank, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    image, gallery, done = None, None, {}
    with WriterLock(folder, f"the index {folder}")():
        before = _bytes_of(bank, recipe)
        for leftover in folder.rglob(TEMPORARY_PATTERN):  # of a killed build
            leftover.unlink()
        if recipe.needs_image_index:
            image, done["image"] = build_image_index(bank, recipe, rebuild=rebuild, progress=progress)
        if keeps:
            gallery, done["gallery"] = build_gallery(bank, recipe, rebuild=rebuild, progress=progress)
    return Built(recipe.name, image, gallery, done, before, time.perf_counter() - start)


def update_indexes(bank: Bank, *, rebuild: bool = False, progress: bool = False) -> list[Built]:
    """Bring everything that was built beside a bank up to date with it; raises as `build_index`."""
    recipes: dict[str, Build] = {}
    for image in built_indexes(bank):
        recipes[image.recipe] = Build(image=image.factory)
    for gallery in built_galleries(bank):
        factory = recipes.get(gallery.recipe, Build()).image
        recipes[gallery.recipe] = Build(image=factory, gallery=gallery.gallery, settings=gallery.settings)
    found = (
        build_index(bank, Recipe(name=name, build=build), rebuild=rebuild, progress=progress)
        for name, build in sorted(recipes.items())
    )
    return [built for built in found if built is not None]


def check_recipe(recipe: Recipe, embedding_dim: int) -> None:
    """Raise InputError if the recipe cannot be built, before long work that would end in it."""
    check_factory(recipe, embedding_dim)
    resolve_recipe(recipe)


def _bytes_of(bank: Bank, recipe: Recipe) -> int:
    """Bytes on disk of the index files that stand at a recipe's place."""
    folder = index_folder(bank, recipe)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".faiss", ".h5"))
