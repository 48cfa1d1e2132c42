"""Building everything that a recipe's queries need and that is not made when a bank is opened."""

from __future__ import annotations

import time
from dataclasses import dataclass

from spade_faiss.bank import Bank
from spade_faiss.gallery import find_method
from spade_faiss.gallery.store import Description as GalleryDescription
from spade_faiss.gallery.store import build_gallery
from spade_faiss.image_index import Description as ImageDescription
from spade_faiss.image_index import build_image_index, check_factory, index_folder
from spade_faiss.recipe import Recipe


@dataclass(frozen=True)
class Built:
    """What was built: the index over embeddings, the one over the maps; None where the recipe needs none."""

    recipe: str
    image: ImageDescription | None
    gallery: GalleryDescription | None
    total_s: float

    @property
    def bytes(self) -> int:
        """Bytes on disk of all of it."""
        return sum(part.bytes for part in (self.image, self.gallery) if part is not None)


def build_index(bank: Bank, recipe: Recipe, *, rebuild: bool = False, progress: bool = False) -> Built | None:
    """Build what a recipe needs beside a bank, or bring it up to date with it; None where it needs nothing.

    Args:
        bank: the bank, not empty.
        recipe: what to build.
        rebuild: begin anew, where otherwise what is there and fits would be kept.
        progress: show bars on stderr if that is a terminal.

    Raises:
        InputError: for an empty bank, settings that do not fit it, or a full disk.
    """
    start = time.perf_counter()
    keeps = find_method(recipe).method.train is not None
    if not keeps and not recipe.needs_image_index:
        return None
    image = build_image_index(bank, recipe, progress=progress) if recipe.needs_image_index else None
    gallery = build_gallery(bank, recipe, rebuild=rebuild, progress=progress) if keeps else None
    return Built(recipe.name, image, gallery, time.perf_counter() - start)


def built_before(bank: Bank, recipe: Recipe) -> int:
    """Bytes on disk of the index files that stand at a recipe's place."""
    folder = index_folder(bank, recipe)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".faiss", ".h5"))


def check_recipe(recipe: Recipe, embedding_dim: int) -> None:
    """Raise InputError if the recipe cannot be built, before long work that would end in it."""
    check_factory(recipe, embedding_dim)
    find_method(recipe)
