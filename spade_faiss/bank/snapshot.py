"""Reading one committed state of a bank: features by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.as_plain import first_difference, named_source
from spade_faiss.bank.codes import check_codes_file
from spade_faiss.bank.compaction import join_shards, plan_compaction
from spade_faiss.bank.locks import Lease, readers
from spade_faiss.bank.manifest import Manifest, read_manifest
from spade_faiss.bank.pictures import Pictures
from spade_faiss.bank.places import PRODUCTS, SHARDS
from spade_faiss.bank.shards import check_shard
from spade_faiss.bank.state import BankState, Place
from spade_faiss.core.copies import named
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.extraction import Source
from spade_faiss.core.hints import add_command, verify_command
from spade_faiss.core.presets import BankSize, Usual, of_few
from spade_faiss.core.products import product_folder
from spade_faiss.core.schema import shorten
from spade_faiss.core.settings import Method
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.codes import Codes, LevelCodes
from spade_faiss.features.layout import LARGEST, Layout, prepare, within_range
from spade_faiss.features.tiles import Places, check_places
from spade_faiss.storage.copy import bank_folder

# How many products a message names.
_LISTED = 12


class Snapshot:
    """The features of one committed state, mapped into memory. Its files stay on disk as long as its lease is held.

    Pickled or copied, it is the folder and the manifest, and holds a lease of its own: the same state is opened again, or
    BankError is raised if a file of that state is gone or has changed since.

    Rows are the entries that were not removed, in the order in which they were added. Most are a picture of their own; of
    others, several were made of one picture, see `pictures`.

    Args:
        path: the bank's folder.
        manifest: the state.
        lease: tells others that somebody reads it.
    """

    def __init__(self, path: Path, manifest: Manifest, lease: Lease) -> None:
        self.path = path.absolute()
        self._lease = lease
        # A bank that commits replaces it: a method takes it once, and then works on one state.
        self._state = BankState(self.path, manifest)

    def __reduce__(self) -> tuple[Callable[..., Snapshot], tuple[type[Snapshot], str, Manifest]]:
        return _open_again, (type(self), self.name, self.manifest)

    @property
    def name(self) -> str:
        """Where it is: its folder, or its URL."""
        return named(str(self.path))

    @property
    def manifest(self) -> Manifest:
        """What was committed."""
        return self._state.manifest

    @property
    def layout(self) -> Layout:
        """The shapes and settings that all features of the bank share."""
        return self.manifest.layout

    @property
    def usual(self) -> Usual:
        """How it is searched unless something else is asked for; with fewer neighbors, if it has few images."""
        usual = self.manifest.usual
        return replace(usual, method=self.fitted(usual.method))

    def fitted(self, method: Method) -> Method:
        """Return a method for this bank, which may have too few images for it, see `of_few`."""
        return of_few(method, *self.size)

    @property
    def size(self) -> BankSize:
        """What decides for how many neighbors it has too few images."""
        return BankSize(len(self), self.siblings.largest)

    @property
    def few_images_notice(self) -> str:
        """That it, or a product of it, has too few images for as many neighbors as is usual; empty if all have enough."""
        asked, found = self.manifest.usual.method.k_image, self.usual.method.k_image
        if self.is_of_products:
            return self._few_of_products(asked)
        if found == asked or not len(self):
            return ""
        nearest = "the nearest normal image alone" if found == 1 else f"the {found} nearest normal images"
        holder = f"the product {shorten(self.product)}" if self.product else "the bank"
        return (
            f"image scores are distances to {nearest}, where k_image={asked} is usual: {holder} holds {self.size_text}; "
            f"add more with: {add_command(self.path, self.product)}"
        )

    def _few_of_products(self, asked: int) -> str:
        """Which products have too few images for `asked` neighbors, and how many they are compared with."""
        k_of = {name: self.part(name).usual.method.k_image for name in self.products}
        few = [f"{shorten(name)} (k_image={k})" for name, k in k_of.items() if k < asked]
        if not few:
            return ""
        listed = ", ".join(few[:_LISTED]) + (f" and {len(few) - _LISTED} more" if len(few) > _LISTED else "")
        return (
            f"image scores are distances to fewer normal images than k_image={asked}, which is usual, in products that hold "
            f"too few: {listed}; add more with: {add_command(self.path, 'NAME')}"
        )

    @property
    def generation(self) -> int:
        """The number of commits so far, which identifies the state."""
        return self.manifest.generation

    @property
    def bytes_on_disk(self) -> int:
        """The bytes of all shards."""
        return sum(shard.bytes for shard in self.manifest.shards)

    def __len__(self) -> int:
        return len(self._state)

    def check_source(self, source: Source | None) -> None:
        """Raise InputError if features from `source` cannot be compared with the bank's; the message has both values.

        Features without a source are not checked: the caller knows where they come from.
        """
        ours = self.manifest.source
        if source is None or ours is None:
            return
        difference = first_difference(named_source(ours.comparable()), named_source(source.comparable()))
        if difference is None:
            return
        name, value, theirs = difference
        raise InputError(
            f"the bank {self.path} was extracted with {name}={shorten(value)}, these features with {shorten(theirs)}; "
            f"distances between them mean nothing. Use the bank's setting, or extract a new bank"
        )

    @property
    def codes(self) -> Codes | None:
        """How its maps become codes; None in a bank that stores none, or is empty yet.

        Raises:
            BankError: if the file of the codes is missing or damaged.
        """
        return self._state.codes

    def codes_of(self, level: str) -> LevelCodes | None:
        """What decodes the stored maps of a level; None where they are numbers as they are."""
        codes = self._state.codes
        return None if codes is None else codes.levels[level]

    def prepared(self, batch: FeatureBatch) -> FeatureBatch:
        """Bring features into the form in which they are compared with the bank's, see `prepare` and `Codes.query`.

        Raises:
            InputError: for features that do not fit the bank's layout.
        """
        found, codes = prepare(batch, self.layout), self._state.codes
        return found if codes is None else codes.query(found)

    @property
    def is_tiled(self) -> bool:
        """Whether its entries are tiles of pictures."""
        source = self.manifest.source
        return source is not None and source.preprocess.tile is not None

    def check_tiles(self, batch: FeatureBatch) -> None:
        """Raise InputError if features are of tiles and the bank's are not, or the other way round."""
        if batch.places is None and not self.is_tiled:
            return
        if batch.places is None:
            raise InputError(
                f"the bank {self.path} holds tiles of images, these features are of whole images; say in `places` and "
                f"`pictures` where each tile lies in which image"
            )
        source = self.manifest.source
        check_places(batch.places, None if source is None else source.preprocess)

    @property
    def tile_places(self) -> Places | None:
        """(n, 4) int32, where each row's tile lies in its picture, see `TILE_COLUMNS`; None where rows are whole pictures.

        Raises:
            BankError: if a tile lies where no picture has one.
        """
        return self._state.tile_places

    @property
    def ids(self) -> list[str]:
        """The entry ids in row order."""
        return self._state.ids.listed()

    @property
    def pictures(self) -> Pictures:
        """The pictures that the rows were made of."""
        return self._state.pictures

    @property
    def siblings(self) -> Pictures:
        """The groups that the rows belong to, as `pictures` are what they were made of; a picture without one is by itself."""
        return self._state.siblings

    @property
    def group_of(self) -> dict[str, str]:
        """Picture id -> the group that it belongs to, where it belongs to one."""
        return self._state.group_of

    @property
    def size_text(self) -> str:
        """How many normal images it holds, in words, and how many entries where there are more of them."""
        images, entries = len(self.pictures), len(self)
        return f"{images} normal image{'' if images == 1 else 's'}" + (f" ({entries} entries)" if entries > images else "")

    @property
    def removed(self) -> dict[str, tuple[Place, ...]]:
        """Removed picture id -> where its entries are: the number of the shard, and the position in it."""
        return self._state.removed.pictures

    @property
    def sha256_of(self) -> dict[str, str]:
        """Picture id -> sha256 of its file, where one was recorded."""
        return self._state.sha256_of

    def image_path(self, image: str) -> Path | None:
        """Return the file that a picture was read from; None if it did not come from a file.

        Raises:
            KeyError: for a picture that has no row.
        """
        state = self._state
        if not (places := state.places(image)):
            raise KeyError(image)
        number, position = places[0]
        return state.shard(number).image_path(position)

    def image_folders(self) -> set[Path]:
        """Return the folders that hold the files which its pictures were read from."""
        return self._state.image_folders()

    def with_removed(self) -> Snapshot:
        """Return the same state as if nothing had been removed. Indexes are built over it, so that images can be restored."""
        shards = tuple(replace(shard, removed=()) for shard in self.manifest.shards)
        return Snapshot(self.path, replace(self.manifest, shards=shards), self._lease)

    def with_shards(self, numbers: Sequence[int]) -> Snapshot:
        """Return the same state as if the bank held some of its shards alone; its rows are numbered anew, in the same order."""
        shards = tuple(self.manifest.shards[number] for number in sorted(numbers))
        return Snapshot(self.path, replace(self.manifest, shards=shards), self._lease)

    @property
    def place(self) -> tuple[str, ...]:
        """The folders below the bank's own in which the indexes and calibrations of this lie: none, or those of a product."""
        return ()

    @property
    def product(self) -> str:
        """The product that all of this is of; empty for a whole bank, whether it has one or several."""
        return ""

    @property
    def products(self) -> tuple[str, ...]:
        """The products that it holds images of, in the order in which they came; empty in a bank that was made without."""
        return tuple(dict.fromkeys(shard.product for shard in self.manifest.shards if shard.product and shard.live_count))

    @property
    def is_of_products(self) -> bool:
        """Whether its images are of several products, each searched and calibrated by itself."""
        return self.manifest.products is not None and not self.product

    def part(self, product: str) -> Part:
        """Return the images of one product as a bank by themselves; their rows are counted from 0.

        Raises:
            InputError: for a product that it holds no image of; the message names those that it does.
        """
        if product not in self.products:
            raise InputError(unknown_product(self, product))
        shards = tuple(shard for shard in self.manifest.shards if shard.product == product)
        return Part(self.path, replace(self.manifest, shards=shards), self._lease)

    def images_of(self, product: str) -> int:
        """Return how many images of a product it holds."""
        return len(np.unique(self.pictures.of(self.rows_of(product))))

    def rows_of(self, product: str) -> npt.NDArray[np.int64]:
        """Return the row of each row of `part`, ascending."""
        starts, shards = self._state.starts, self.manifest.shards
        found = [np.arange(starts[number], starts[number + 1]) for number, each in enumerate(shards) if each.product == product]
        return np.concatenate([np.empty(0, np.int64), *found])

    def products_at(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return the number in `products` of the product of each of some rows, of any shape."""
        number = {name: place for place, name in enumerate(self.products)}
        of_shard = np.array([number.get(shard.product, -1) for shard in self.manifest.shards], np.int64)
        found: npt.NDArray[np.int64] = of_shard[np.searchsorted(self._state.starts, rows, side="right") - 1]
        return found

    def readers(self) -> list[int]:
        """Return the generations that others read, one entry for each reader."""
        return readers(self.path, besides=self._lease)

    def stored_batches(self, target_bytes: int) -> Iterator[FeatureBatch]:
        """Yield the images in the order of their rows, as they are stored, in batches of about so many bytes, copied."""
        state = self._state
        for group in plan_compaction(state.manifest.shards, target_bytes):
            if any(state.manifest.shards[number].live_count for number in group):
                yield join_shards(state, group)

    def rows_of_shard(self, index: int) -> npt.NDArray[np.int64]:
        """Return the row of each entry of a shard, (count,); -1 for removed ones."""
        return self._state.rows_of_shard(index)

    def embeddings_of_shard(self, index: int) -> FloatArray:
        """Return the embeddings of a shard's rows, (n, d): a read-only view where no image was removed.

        Raises:
            BankError: if one is not finite, or so large that its square leaves the range of float32.
        """
        return self._checked(self.stored_embeddings(index))

    def stored_embeddings(self, index: int) -> FloatArray:
        """Return what `embeddings_of_shard` returns, whatever values are stored."""
        state = self._state
        embedding, entry = state.shard(index).embedding, state.manifest.shards[index]
        return embedding[entry.live] if entry.removed else embedding

    def release_embeddings(self, index: int) -> None:
        """Release the memory of a shard's embeddings, as far as they were read; they are read again at their next use."""
        self._state.shard(index).release_embeddings()

    def embedding(self, rows: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Return the embeddings of rows, (n, d), copied; it raises what `embeddings_of_shard` raises."""
        state = self._state
        found = np.empty((len(rows), self.layout.embedding_dim), np.float32)
        for place, row in enumerate(rows):
            number, position = state.locate(int(row))
            found[place] = state.shard(number).embedding[position]
        return self._checked(found)

    def read(self, rows: npt.NDArray[np.integer[Any]]) -> FeatureBatch:
        """Return the features of rows, copied: in the form that queries have once they are prepared."""
        maps, ids, pictures, places = {}, self.ids, self.pictures, self.tile_places
        for level in self.layout.levels:
            stored = np.empty((len(rows), *level.stored_shape), self.layout.stored_dtype)
            for out, row in zip(stored, rows, strict=True):
                self.read_map(level.name, int(row), out)
            codes = self.codes_of(level.name)
            maps[level.name] = stored if codes is None else codes.decode(stored)
        parts = [self._inspected(int(row)) for row in rows]
        # Where one is None, the extractor did not say where its inputs show an image.
        known = [part for part in parts if part is not None]
        valid = np.array(known, np.bool_).reshape(len(rows), *self.layout.input_size) if len(known) == len(rows) else None
        return FeatureBatch(
            [ids[row] for row in rows],
            self.embedding(rows),
            maps,
            self.manifest.source,
            valid=valid,
            pictures=() if pictures.are_rows else pictures.names(np.asarray(rows, np.int64)),
            groups=self._state.groups_at(rows),
            places=None if places is None else places[rows],
        )

    def inspected(self, row: int) -> npt.NDArray[np.bool_]:
        """Return where the input of one image is inspected, (H, W).

        Raises:
            BankError: if images have regions of interest of their own, and this one's is missing or empty.
        """
        found = self._inspected(row)
        return np.ones(self.layout.input_size, np.bool_) if found is None else found

    def _inspected(self, row: int) -> npt.NDArray[np.bool_] | None:
        state, layout = self._state, self.layout
        number, position = state.locate(row)
        found = layout.inspected(1, state.shard(number).valid(np.array([position]), layout.input_size))
        if layout.own_rois and (found is None or not found.any()):
            raise BankError(
                f"the bank {self.path} is damaged: the image in row {row} has no region of interest; extract a new bank"
            )
        return None if found is None else found[0]

    def level_map(self, level: str, row: int) -> npt.NDArray[Any]:
        """Return one image's map at one level, of `Level.stored_shape` and `Layout.stored_dtype`: a read-only view of the file.

        Where codes are stored, `codes_of` decodes them.
        """
        state = self._state
        number, position = state.locate(row)
        found: npt.NDArray[Any] = state.shard(number).levels[level][position]
        return found

    def vectors_of_map(self, level: str, row: int) -> FloatArray:
        """Return one image's map at one level as float32, (..., channels): the vectors that are searched."""
        stored, codes = self.level_map(level, row), self.codes_of(level)
        return stored.astype(np.float32, copy=False) if codes is None else codes.decode(stored)

    def read_map(self, level: str, row: int, out: npt.NDArray[Any]) -> None:
        """Copy one image's map at one level into `out`, of `Level.stored_shape` and `Layout.stored_dtype`, contiguous."""
        state = self._state
        number, position = state.locate(row)
        state.shard(number).read_map(level, position, out)

    def prefetch_map(self, level: str, row: int) -> None:
        """Ask the operating system to read one image's map from disk soon."""
        state = self._state
        number, position = state.locate(row)
        state.shard(number).prefetch_map(level, position)

    def check_lengths(self) -> None:
        """Raise BankError if a file has become shorter since it was mapped, for who keeps views of maps from call to call."""
        state = self._state
        for number in range(len(state.manifest.shards)):
            state.shard(number).check_length()

    def release_maps(self, level: str, rows: Iterable[int]) -> None:
        """Release the memory of some images' maps, as far as they were read; they are read again at their next use."""
        state = self._state
        by_shard: dict[int, list[int]] = {}
        for number, position in map(state.locate, rows):
            by_shard.setdefault(number, []).append(position)
        for number, positions in by_shard.items():
            state.shard(number).release_maps(level, positions)

    def shard_of(self, rows: IntArray) -> IntArray:
        """Return the number of the shard that holds each of some rows, of the shape of `rows`."""
        return np.searchsorted(self._state.starts, rows, side="right") - 1

    def locate(self, row: int) -> Place:
        """Return the number of the shard that holds a row, and the row's position in it."""
        return self._state.locate(row)

    def _checked(self, embeddings: FloatArray) -> FloatArray:
        if not within_range(embeddings):
            raise BankError(
                f"the bank {self.path} holds embeddings that are not finite, or beyond {LARGEST:g}; find their shard with: "
                f"{verify_command(self.path)} --deep"
            )
        return embeddings

    def check_texts(self, index: int) -> None:
        """Raise BankError if the ids, paths, checksums, pictures or groups of a shard cannot be read."""
        for field in ("id", "path", "sha256", "picture", "group"):
            self._state.shard(index).texts(field)


class Part(Snapshot):
    """The images of one product of a bank, which are searched and calibrated as if there were no others.

    What is built of them lies in a folder of its own, and says nothing about the shards of other products: whatever is added to
    those, or removed, it stays as it is.
    """

    @property
    def place(self) -> tuple[str, ...]:
        """See `Snapshot.place`."""
        return PRODUCTS, product_folder(self.product)

    @property
    def product(self) -> str:
        """The product."""
        return self.manifest.shards[0].product

    def with_removed(self) -> Part:
        """See `Snapshot.with_removed`."""
        whole = super().with_removed()
        return Part(self.path, whole.manifest, self._lease)

    def with_shards(self, numbers: Sequence[int]) -> Part:
        """See `Snapshot.with_shards`; one shard at least."""
        return Part(self.path, super().with_shards(numbers).manifest, self._lease)


def unknown_product(bank: Snapshot, product: object) -> str:
    """Say that a bank holds no images of a product."""
    if bank.manifest.products is None:
        return f"product={shorten(product)}: the bank {bank.path} was made without products; leave it out"
    held = ", ".join(bank.products[:_LISTED]) + (" ..." if len(bank.products) > _LISTED else "")
    return f"the bank {bank.path} holds no images of product {shorten(product)}; its products: {held or 'none'}"


def _open_again(kind: type[Snapshot], place: str, manifest: Manifest) -> Snapshot:
    """Open a state that may not be the newest one any more.

    Raises:
        NotFoundError: if there is no bank at `place`.
        BankError: if a shard of that state is missing or changed.
    """
    path = bank_folder(place)
    read_manifest(path)
    lease = Lease(path, manifest.generation)
    for shard in manifest.shards:
        check_shard(path / SHARDS / shard.file, shard)
    if manifest.codes is not None:
        check_codes_file(path, manifest.codes)
    return kind(path, manifest, lease)
