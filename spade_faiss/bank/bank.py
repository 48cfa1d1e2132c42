"""The bank on disk: a manifest that names immutable, checksummed shards. One writer at a time commits new states."""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_faiss.bank.as_plain import first_difference, named_layout
from spade_faiss.bank.codes import CODES, CodesEntry, check_codes_file, codes_path, read_codes, write_codes
from spade_faiss.bank.compaction import Compaction, join_shards, plan_compaction
from spade_faiss.bank.locks import LOCK, READERS, WRITER, Lease, WriterLock
from spade_faiss.bank.manifest import Manifest, read_manifest, versions, write_manifest
from spade_faiss.bank.network import NETWORK, write_network
from spade_faiss.bank.origin import Origin
from spade_faiss.bank.places import MANIFEST, PRODUCTS, SHARDS, STAGED, check_places, leftovers
from spade_faiss.bank.shards import SHARD_BYTES, ShardEntry, StagedShard, check_shard, write_shard
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.bank.state import BankState, Place
from spade_faiss.core.copies import copy_of
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import TEMPORARY_PATTERN, sync_folder
from spade_faiss.core.inside import check_inside, files_in, is_regular
from spade_faiss.core.presets import Usual
from spade_faiss.core.process import PerProcess
from spade_faiss.core.products import check_product, is_product_folder, product_folder
from spade_faiss.core.schema import shorten
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.code_losses import measure_losses
from spade_faiss.features.codes import learn_codes
from spade_faiss.features.layout import Layout, prepare
from spade_faiss.storage.copy import bank_folder

if TYPE_CHECKING:
    pass

_log = logging.getLogger(__name__)


class Bank(Snapshot):
    """The features of normal images, to be read, added and removed. Shards that were committed are never changed.

    A `Bank` shows the state that was current when it was opened, until it writes: then it begins with the newest state.
    """

    def __init__(self, path: Path, manifest: Manifest, lease: Lease) -> None:
        super().__init__(path, manifest, lease)
        self._lock = WriterLock(self.path, f"the bank {self.path}")
        self._committing = PerProcess(threading.Lock)
        self._continued = False  # whether the command that holds the lock has committed before

    @classmethod
    def create(
        cls,
        path: str | Path,
        layout: Layout,
        origin: Origin = Origin(),
    ) -> Bank:
        """Create an empty bank in a new or empty folder.

        Args:
            path: the folder.
            layout: the shapes and settings that all features of the bank share.
            origin: what it records beside it.

        Raises:
            InputError: for a folder that holds a bank, or anything else.
            BusyError: if somebody else has created one at the same URL at the same time.
        """
        folder = bank_folder(path)
        _check_new(folder)
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        with WriterLock(folder, f"the bank {folder}")():
            _check_new(folder)  # another process may have created it since
            manifest = _first_manifest(folder, layout, origin)
            write_manifest(folder, manifest)
            return cls(folder, manifest, Lease(folder, 0))

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> Bank:
        """Open a bank and check that its shards are those that the manifest names.

        A shard whose size or modification time is not the recorded one is read in full, and its checksum is compared. The
        shards stay on disk while the bank is open, whatever others do to it.

        Args:
            path: the folder.
            check: False to open a bank whose shards are damaged.

        Raises:
            NotFoundError: if there is no bank at `path`.
            BankError: for a damaged manifest, one of another version, and for a missing or changed shard; for a link, a pipe or
                the like where a file or a folder of the bank should be.
            AccessError: if the operating system does not open a file.
            StorageError: if a URL cannot be reached.
        """
        folder = bank_folder(path)
        check_places(folder)
        while True:
            manifest = read_manifest(folder)
            lease = Lease(folder, manifest.generation)
            # Before the lease was there, another process may have compacted and deleted shards that nobody seemed to read.
            if read_manifest(folder).generation == manifest.generation:
                break
            lease.end()
        for shard in manifest.shards if check else ():
            check_shard(folder / SHARDS / shard.file, shard)
        if check and manifest.codes is not None:
            check_codes_file(folder, manifest.codes)
        return cls(folder, manifest, lease)

    @classmethod
    def open_or_create(
        cls,
        path: str | Path,
        layout: Layout,
        origin: Origin = Origin(),
    ) -> Bank:
        """Open the bank at `path`, or create it if there is none.

        Raises:
            InputError: if there is a bank of another layout, source or augmentation; the message has both values.
        """
        if not is_regular(bank_folder(path) / MANIFEST):
            return cls.create(path, layout, origin)
        bank = cls.open(path)
        if bank.generation == 0:  # nothing was ever stored, so its settings may still change
            with bank.writing():
                if bank.generation == 0:
                    manifest = _first_manifest(bank.path, layout, origin)
                    write_manifest(bank.path, manifest)
                    bank._state = BankState(bank.path, manifest)
        if origin.source is not None and bank.manifest.source is None:
            raise InputError(
                f"the bank {path} holds the features of another extractor, not of {origin.source.backbone!r}; make a new bank"
            )
        bank.check_source(origin.source)
        if difference := first_difference(_comparable(bank.layout), _comparable(layout)):
            name, ours, theirs = difference
            raise InputError(
                f"the bank {path} has {name}={ours!r}, asked for {theirs!r}; use the bank's setting, or make a new bank"
            )
        # What a preset is called does not matter, and a bank may have the indexes of many recipes.
        method = bank.manifest.usual.method
        if difference := first_difference(asdict(method), asdict(method if origin.usual is None else origin.usual.method)):
            name, ours, theirs = difference
            raise InputError(
                f"the bank {path} is searched with {name}={ours!r}, asked for {theirs!r}; leave the preset out, which takes "
                f"the bank's, and give other settings when it is scored; or make a new bank"
            )
        if origin.grouping is not None and origin.grouping != (grouping := bank.manifest.grouping):
            raise InputError(
                f"the bank {path} has group_by={grouping or 'none'}, asked for {origin.grouping}; use the bank's, "
                f"or make a new bank"
            )
        if origin.products is not None and origin.products != (products := bank.manifest.products):
            raise InputError(
                f"the bank {path} has products={products or 'none'}, asked for {origin.products}; use the bank's, "
                f"or make a new bank"
            )
        if origin.augment != (augment := bank.manifest.augment):
            raise InputError(
                f"the bank {path} has augment={augment or 'none'}, asked for {origin.augment or 'none'}; use the bank's "
                f"setting, or make a new bank"
            )
        return bank

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writer lock for a whole command, which begins with the bank's newest state.

        Raises:
            BankError: if another process is writing to the bank; the message names it.
        """
        with self._lock(self._entered):
            yield

    def _entered(self) -> None:
        """Begin to write: take over the newest state, and delete what a killed writer left."""
        self._continued = False
        check_places(self.path)
        if (copy := copy_of(self.path)) is not None:
            copy.refresh(whole=True)
        current = read_manifest(self.path)
        if current.generation != self.generation:
            self._state = BankState(self.path, current)
        for leftover in leftovers(self.path):
            leftover.unlink()
        if copy is not None:  # what a killed writer had not stored is not at the URL, and nobody else has it
            named = {shard.file for shard in current.shards}
            for path in files_in(check_inside(self.path, SHARDS), "*.h5"):
                if path.name not in named and not copy.is_kept(path):
                    path.unlink()

    def append(self, batch: FeatureBatch, *, product: str = "") -> None:
        """Store a batch as one new shard and commit it. After this returns, the batch survives a crash.

        Args:
            batch: the features.
            product: the product that all of them are of, in a bank of several.

        Raises:
            InputError: for a batch that does not fit the bank's layout or source, an id that the bank holds already, or an
                entry of a picture that was removed; without a product in a bank of several, and with one in any other.
            BankError: if another process is writing to the bank.
        """
        self.check_source(batch.source)
        self.check_tiles(batch)
        self.append_prepared(prepare(batch, self.layout), product=product)

    def append_prepared(self, batch: FeatureBatch, *, product: str = "") -> None:
        """Do what `append` does for a batch that `prepare` returned and that is from this bank's source.

        The first batch of a bank of codes is what its codes are learned from: give some hundred pictures at once.
        """
        self._check_product(product)
        with self.writing(), self._committing():
            self._check_not_held(batch.ids, batch.picture_ids)
            learned = self._learned_codes(batch)
            encoded = batch if learned is None else self._encoded(batch, learned)
            shard = write_shard(self._new_shard(f"{self.generation + 1:06d}.h5"), encoded, product)
            self._commit_added(shard, batch.ids, batch.picture_ids, learned)

    def stage(self, batch: FeatureBatch, *, product: str = "") -> StagedShard:
        """Write a batch that `prepare` returned beside the bank's shards, for `append_staged` of the process that writes to it.

        It takes no lock, and nothing of it is seen until it is committed.

        Raises:
            InputError: if the disk has no room, or for a bank of codes that has learned none yet.
        """
        if self.layout.store.is_coded:
            if self.manifest.codes is None:
                raise InputError(
                    f"the bank {self.path} has no codes yet: add its first pictures, that they are learned from, here"
                )
            batch = self._encoded(batch, self.manifest.codes)
        copy = copy_of(self.path)
        name = STAGED.replace("*", secrets.token_hex(8)) if copy is None else f"{secrets.token_hex(8)}.h5"
        path = check_inside(self.path, SHARDS, name)
        entry = write_shard(path, batch, product)
        if copy is not None:  # whoever commits it has another copy
            copy.store(path, entry)
        return StagedShard(entry=entry, ids=tuple(batch.ids), pictures=tuple(batch.picture_ids), sha256=tuple(batch.sha256))

    def append_staged(self, staged: StagedShard) -> None:
        """Commit a shard that another process has written beside the bank's own, see `stage`; else as `append_prepared`.

        Raises:
            InputError: for an id that the bank holds already, or an entry of a picture that was removed.
            BankError: if another process is writing to the bank, or the shard is missing or not the one that was written.
        """
        self._check_product(staged.entry.product)
        with self.writing(), self._committing():
            self._check_not_held(staged.ids, staged.pictures)
            written = check_inside(self.path, SHARDS, staged.entry.file)
            if copy_of(self.path) is not None:  # it is at the URL, under a name of its own
                self._commit_added(staged.entry, staged.ids, staged.pictures)
                return
            check_shard(written, staged.entry)
            path = self._new_shard(f"{self.generation + 1:06d}.h5")
            written.replace(path)
            sync_folder(path.parent)
            self._commit_added(replace(staged.entry, file=path.name), staged.ids, staged.pictures)

    def _check_not_held(self, ids: Sequence[str], pictures: Sequence[str]) -> None:
        """Raise InputError for entries that the bank holds, or that are of pictures which were removed."""
        state = self._state
        gone = state.removed.pictures
        of = zip(ids, pictures, strict=True)
        if held := [(name, picture) for name, picture in of if state.holds(name) or picture in gone]:
            removed = " (it was removed: restore it, or compact the bank first)" if held[0][1] in gone else ""
            raise InputError(
                f"the bank {self.path} already holds {len(held)} of these images, the first is {held[0][0]!r}{removed}"
            )

    def _commit_added(
        self, shard: ShardEntry, ids: Sequence[str], pictures: Sequence[str], codes: CodesEntry | None = None
    ) -> None:
        state = self._state
        manifest = self._commit("add", len(set(pictures)), (*state.manifest.shards, shard), codes)
        self._state = state.appended(manifest, ids)

    def remove(self, ids: Sequence[str]) -> int:
        """Remove images, for all who open the bank from now on. `restore` brings them back until the bank is compacted.

        Args:
            ids: of pictures; each is removed with all of its entries.

        Returns:
            How many images were removed; those that were removed before are not counted.

        Raises:
            InputError: for an id that the bank does not hold; then no image is removed.
            BankError: if another process is writing to the bank.
        """
        with self.writing(), self._committing():
            state = self._state
            live = {name: state.places(name) for name in ids}
            if missing := [name for name in ids if not live[name] and name not in state.removed.pictures]:
                raise InputError(
                    f"the bank {self.path} does not hold {len(missing)} of these images, the first is {missing[0]!r}"
                    f"{_whose(state, missing[0])}; nothing was removed"
                )
            return self._mark("remove", {name: places for name, places in live.items() if places})

    def restore(self, ids: Sequence[str]) -> int:
        """Bring removed images back.

        Args:
            ids: of pictures; each is brought back with all of its entries.

        Returns:
            How many images were restored; those that were not removed are not counted.

        Raises:
            InputError: for an id that the bank does not hold, or not any more; then no image is restored.
            BankError: if another process is writing to the bank.
        """
        with self.writing(), self._committing():
            state = self._state
            gone = state.removed.pictures
            if missing := [name for name in ids if name not in gone and state.pictures.number(name) is None]:
                raise InputError(
                    f"the bank {self.path} does not hold {len(missing)} of these images (any more), the first is "
                    f"{missing[0]!r}{_whose(state, missing[0])}; nothing was restored"
                )
            return self._mark("restore", {name: gone[name] for name in ids if name in gone})

    def compact(self, *, target_bytes: int = SHARD_BYTES) -> Compaction:
        """Rewrite shards that hold removed images without them, and join small neighbors. The order of images stays, in a bank
        of several products that of each product's.

        Removed images are then gone for good. Shards that somebody still reads stay on disk until the next `compact`.

        Raises:
            BankError: if another process is writing to the bank.
            InputError: if the disk has no room.
        """
        with self.writing(), self._committing():
            state, before = self._state, self.bytes_on_disk
            old, dropped, shards = state.manifest.shards, len(state.removed.pictures), []
            for number, group in enumerate(groups := plan_compaction(old, target_bytes)):
                if len(group) == 1 and not old[group[0]].removed:
                    shards.append(old[group[0]])
                elif any(old[index].live_count for index in group):
                    name = f"{self.generation + 1:06d}-{number:06d}.h5"
                    shards.append(write_shard(self._new_shard(name), join_shards(state, group), old[group[0]].product))
            if len(groups) < len(old) or dropped:
                self._state = BankState(self.path, self._commit("compact", dropped, tuple(shards)))
            self._sweep()
            written = sum(shard.bytes for shard in set(self.manifest.shards) - set(old))
            return Compaction(dropped=dropped, bytes_before=before, bytes_after=self.bytes_on_disk, bytes_written=written)

    def choose(self, usual: Usual, action: str = "tune") -> None:
        """Commit another way in which the bank is searched unless something else is asked for; its features stay.

        Args:
            usual: the recipe and the method.
            action: what its history calls it.

        Raises:
            BankError: if another process is writing to the bank.
        """
        with self.writing(), self._committing():
            manifest = self.manifest
            manifest = replace(manifest.next(action, 0, manifest.shards, continued=self._continued), usual=usual)
            write_manifest(self.path, manifest)
            self._continued = True
            self._state = BankState(self.path, manifest)

    def learn_prepared(self, batch: FeatureBatch) -> None:
        """Learn the codes of a bank before any picture is stored; otherwise, it learns from the first batch of pictures.

        Args:
            batch: what `prepare` returned for pictures of all kinds that the bank will hold; they are not stored.

        Raises:
            InputError: for a bank that stores no codes, or has learned them.
            BankError: if another process is writing to the bank.
        """
        with self.writing(), self._committing():
            if not self.layout.store.is_coded or self.manifest.codes is not None:
                why = "has learned its codes" if self.manifest.codes is not None else f"stores {self.layout.store}, no codes"
                raise InputError(f"the bank {self.path} {why}; there is nothing to learn")
            count = len(set(batch.picture_ids))
            manifest = self._commit("learn", count, self.manifest.shards, self._learned_codes(batch))
            self._state = BankState(self.path, manifest)

    def _learned_codes(self, batch: FeatureBatch) -> CodesEntry | None:
        """Return the codes of the bank, which are learned from this batch if it has none; None for a bank that stores none."""
        if not self.layout.store.is_coded or self.manifest.codes is not None:
            return self.manifest.codes
        codes = learn_codes(batch, self.layout)
        return write_codes(self.path, codes, len(set(batch.picture_ids)), measure_losses(batch, codes))

    def _encoded(self, batch: FeatureBatch, entry: CodesEntry) -> FeatureBatch:
        return read_codes(codes_path(self.path, entry), entry.sha256, self.layout).encode(batch)

    def _new_shard(self, name: str) -> Path:
        """Return the path of a shard that is about to be written; raise BankError if a committed one has its name."""
        if copy_of(self.path) is not None:  # others may write at the same time: no two choose the same name
            name = f"{Path(name).stem}-{secrets.token_hex(4)}.h5"
        path = check_inside(self.path, SHARDS, name)
        if is_regular(path) and any(shard.file == name for shard in self.manifest.shards):
            raise BankError(
                f"the bank {self.path} is damaged: it lists {name}, which the next commit writes; extract a new bank"
            )
        return path

    def _mark(self, action: str, pictures: Mapping[str, Sequence[Place]]) -> int:
        """Commit that pictures, whose entries are at some places, are removed or restored; return how many there are."""
        marked = {place for places in pictures.values() for place in places}
        shards = list(self.manifest.shards)
        for number in {number for number, _ in marked}:
            positions = {position for of, position in marked if of == number}
            removed = set(shards[number].removed)
            removed = removed | positions if action == "remove" else removed - positions
            shards[number] = replace(shards[number], removed=tuple(sorted(removed)))
        if marked:
            self._state = BankState(self.path, self._commit(action, len(pictures), tuple(shards)))
        return len(pictures)

    def _commit(self, action: str, images: int, shards: tuple[ShardEntry, ...], codes: CodesEntry | None = None) -> Manifest:
        """Write the next manifest; whoever opens the bank from now on sees it. `codes` are those that it had or learned."""
        manifest = self.manifest.next(action, images, shards, continued=self._continued)
        manifest = manifest if codes is None else replace(manifest, codes=codes)
        write_manifest(self.path, manifest)
        self._continued = True
        return manifest

    def _sweep(self) -> None:
        """Delete shards that are not of this state, unless somebody may still read them."""
        if any(generation < self.generation for generation in self.readers()):
            _log.info("an older state of %s is still being read; its shards are deleted by a later compact", self.path)
            return
        self._sweep_products()
        named = {shard.file for shard in self.manifest.shards}
        for path in files_in(check_inside(self.path, SHARDS), "*.h5"):
            if path.name not in named:
                path.unlink()
        if (copy := copy_of(self.path)) is not None:
            copy.sweep()

    def _sweep_products(self) -> None:
        """Delete what was built of products that are gone, and nothing else that lies there."""
        if self.manifest.products is None:
            return
        named = {product_folder(shard.product) for shard in self.manifest.shards if shard.product}
        folder = check_inside(self.path, PRODUCTS)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in named and is_product_folder(path.name) and path.is_dir():
                shutil.rmtree(path)

    def _check_product(self, product: str) -> None:
        """Raise InputError unless a batch says of which product it is where, and only where, the bank is of several."""
        if self.manifest.products is None:
            if product:
                raise InputError(f"product={shorten(product)}: the bank {self.path} was made without products; make a new bank")
            return
        if not product:
            raise InputError(f"the bank {self.path} is of several products; say of which one these images are: product=NAME")
        check_product(product)

    def snapshot(self) -> Snapshot:
        """Return the current state, which does not change when this bank writes."""
        return Snapshot(self.path, self.manifest, self._lease)


def _first_manifest(folder: Path, layout: Layout, origin: Origin) -> Manifest:
    """Return the manifest of an empty bank; the network that it names is written."""
    return Manifest(
        generation=0,
        layout=layout,
        source=origin.source,
        weights_file=origin.weights_file,
        network=None if origin.network is None else write_network(folder, origin.network),
        usual=origin.usual or Usual(),
        augment=origin.augment,
        grouping=origin.grouping,
        products=origin.products,
        shards=(),
        versions=versions(),
    )


def _comparable(layout: Layout) -> dict[str, Any]:
    values = named_layout(replace(layout, numbers=None, bits=None))
    del values["dtype"]
    return {"store": str(layout.store), "roi": None, **values}


def _whose(state: BankState, name: str) -> str:
    """Say which picture has an entry of this name; empty if none has."""
    if (row := state.ids.row(name)) is None:
        return ""
    (picture,) = state.pictures.names(np.array([row]))
    return f", an entry of {picture!r}: name that image, which is removed and restored as a whole"


def _check_new(folder: Path) -> None:
    """Raise InputError unless a bank can be created in `folder`."""
    check_places(folder)
    if (copy := copy_of(folder)) is not None and not is_regular(folder / MANIFEST):
        copy.check_new()
        return
    if is_regular(folder / MANIFEST):
        raise InputError(f"{folder} already holds a bank; open it, or choose another folder")
    if not folder.exists():
        return
    if folder.is_dir() and any((folder / SHARDS).glob("*.h5")):
        raise InputError(f"{folder} holds shards but no {MANIFEST}; restore it from a backup, or choose another folder")
    # The files of a creation that was interrupted are allowed.
    if not folder.is_dir() or any(
        item.name not in (SHARDS, CODES, NETWORK, LOCK, WRITER, READERS) and not item.match(TEMPORARY_PATTERN)
        for item in folder.iterdir()
    ):
        raise InputError(f"{folder} exists and is not a bank; choose a new or empty folder")
