"""The bank on disk: a manifest that names immutable, checksummed shards; what is committed, by one writer at a time."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from spade_faiss.bank.locks import LOCK, READERS, WRITER, Lease, WriterLock, readers
from spade_faiss.bank.manifest import MANIFEST, Manifest, read_manifest, versions, write_manifest
from spade_faiss.bank.shards import SHARD_BYTES, ShardEntry, check_shard, write_shard
from spade_faiss.bank.snapshot import SHARDS, Snapshot, first_difference
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.core.settings import Source
from spade_faiss.features.batch import FeatureBatch, concatenate
from spade_faiss.features.layout import Layout, prepare

_log = logging.getLogger(__name__)


class Bank(Snapshot):
    """The features of normal images: read them, add and remove; what was committed is never written again.

    A `Bank` reads the state that was current when it was opened, until it changes something itself.
    """

    def __init__(self, path: Path, manifest: Manifest, lease: Lease) -> None:
        super().__init__(path, manifest, lease)
        self._lock = WriterLock(self.path, f"the bank {self.path}")
        self._committing = threading.Lock()
        self._continued = False

    @classmethod
    def create(cls, path: str | Path, layout: Layout, *, source: Source | None = None, weights_file: str | None = None) -> Bank:
        """Create an empty bank in a new or empty folder.

        Args:
            path: the folder.
            layout: what all features of the bank have in common.
            source: who makes the features; queries must have the same.
            weights_file: where the backbone's weights were loaded from, to load them again.

        Raises:
            InputError: for a folder that holds something else.
        """
        folder = Path(path)
        _check_new(folder)
        manifest = Manifest(
            generation=0, layout=layout, source=source, weights_file=weights_file, shards=(), versions=versions()
        )
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        with WriterLock(folder, f"the bank {folder}")():
            _check_new(folder)  # again: another process may have been faster
            write_manifest(folder, manifest)
            return cls(folder, manifest, Lease(folder, 0))

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> Bank:
        """Open a bank and check that its shards are those that the manifest names.

        A shard whose size or modification time is not the recorded one is read in full and its checksum compared. What it
        reads stays on disk while it is open, whatever others do to the bank.

        Args:
            path: the folder.
            check: False to open a damaged bank, too.

        Raises:
            NotFoundError: if there is no bank at `path`.
            BankError: for a damaged or newer manifest, and for a missing or changed shard.
        """
        folder = Path(path)
        while True:
            manifest = read_manifest(folder)
            lease = Lease(folder, manifest.generation)
            # Between the two, another process may have compacted and deleted what nobody seemed to read.
            if read_manifest(folder).generation == manifest.generation:
                break
            lease.end()
        for shard in manifest.shards if check else ():
            check_shard(folder / SHARDS / shard.file, shard)
        return cls(folder, manifest, lease)

    @classmethod
    def open_or_create(
        cls, path: str | Path, layout: Layout, *, source: Source | None = None, weights_file: str | None = None
    ) -> Bank:
        """Open the bank at `path`, or create it; an existing one must have this layout and source.

        Raises:
            InputError: if it has not, with both values.
        """
        if not (Path(path) / MANIFEST).exists():
            return cls.create(path, layout, source=source, weights_file=weights_file)
        bank = cls.open(path)
        if bank.generation == 0:  # of a run that stored nothing: its settings bind nobody
            with bank.writing():
                manifest = replace(bank.manifest, layout=layout, source=source, weights_file=weights_file)
                if bank.generation == 0 and manifest != bank.manifest:
                    write_manifest(bank.path, manifest)
                    bank._adopt(manifest)
        if source is not None and bank.manifest.source is None:
            raise InputError(
                f"the bank {path} holds the features of another extractor, not of {source.backbone!r}; make a new bank"
            )
        bank.check_source(source)
        if difference := first_difference(asdict(bank.layout), asdict(layout)):
            name, ours, theirs = difference
            raise InputError(
                f"the bank {path} has {name}={ours!r}, asked for {theirs!r}; use the bank's setting, or make a new bank"
            )
        return bank

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the right to write for a whole command, and begin with the bank's newest state.

        Raises:
            BankError: if another process is writing to the bank; names it.
        """
        with self._lock(self._entered):
            yield

    def _entered(self) -> None:
        self._continued = False
        current = read_manifest(self.path)
        if current.generation != self.generation:
            self._adopt(current)
        # Of a killed writer. Not below indexes/, which may be built at the same time.
        for leftover in (*self.path.glob(TEMPORARY_PATTERN), *(self.path / SHARDS).glob(TEMPORARY_PATTERN)):
            leftover.unlink()

    def append(self, batch: FeatureBatch) -> None:
        """Store a batch as one new shard and commit it: after this returns, the batch survives a crash.

        Raises:
            InputError: for a batch that does not fit the bank's layout or source, or an id that the bank holds already.
            BankError: if another process is writing to the bank.
        """
        self.check_source(batch.source)
        self.append_prepared(prepare(batch, self.layout))

    def append_prepared(self, batch: FeatureBatch) -> None:
        """`append` for a batch that `prepare` has returned, from this bank's source."""
        with self.writing(), self._committing:
            known = self._known
            if held := [name for name in batch.ids if name in known]:
                was = " (it was removed: restore it, or compact the bank first)" if held[0] not in self._row_of else ""
                raise InputError(
                    f"the bank {self.path} already holds {len(held)} of these images, the first is {held[0]!r}{was}"
                )
            shard = write_shard(self.path / SHARDS / f"{self.generation + 1:06d}.h5", batch)
            row_of, first = self._row_of, len(self)
            self._commit("add", len(batch), (*self.manifest.shards, shard))
            # Encoded, not read again: a long extraction would read all ids so far for each of its shards.
            row_of.update(zip(batch.ids, range(first, len(self)), strict=True))
            known.update(batch.ids)
            self.__dict__.update(_row_of=row_of, _known=known)

    def remove(self, ids: Sequence[str]) -> int:
        """Take images out: at once for all who open the bank from now on. Until `compact`, `restore` brings them back.

        Returns:
            How many were taken out now; those that were out before are left as they are.

        Raises:
            InputError: for an id that the bank does not hold; then none is removed.
            BankError: if another process is writing to the bank.
        """
        with self.writing(), self._committing:
            if missing := [name for name in ids if name not in self._known]:
                raise InputError(
                    f"the bank {self.path} does not hold {len(missing)} of these images, the first is {missing[0]!r}; "
                    f"nothing was removed"
                )
            places = [self.locate(self._row_of[name]) for name in ids if name in self._row_of]
            return self._mark("remove", places, lambda removed, position: removed | {position})

    def restore(self, ids: Sequence[str]) -> int:
        """Bring removed images back.

        Returns:
            How many were brought back now; those that were there are left as they are.

        Raises:
            InputError: for an id that the bank does not hold, or not any more; then none is restored.
            BankError: if another process is writing to the bank.
        """
        with self.writing(), self._committing:
            if missing := [name for name in ids if name not in self._known]:
                raise InputError(
                    f"the bank {self.path} does not hold {len(missing)} of these images (any more), the first is "
                    f"{missing[0]!r}; nothing was restored"
                )
            places = [self.removed[name] for name in ids if name in self.removed]
            return self._mark("restore", places, lambda removed, position: removed - {position})

    def compact(self, *, target_bytes: int = SHARD_BYTES) -> Compaction:
        """Rewrite shards that hold removed images without them, and join small neighbors: their order stays.

        Removed images are gone for good then. Shards that somebody still reads stay on disk until the next `compact`.

        Raises:
            BankError: if another process is writing to the bank.
            InputError: if the disk has no room.
        """
        with self.writing(), self._committing:
            before, held = self.bytes_on_disk, set(self.manifest.shards)
            dropped, shards = len(self.removed), []
            for number, group in enumerate(groups := plan_compaction(self.manifest.shards, target_bytes)):
                first = self.manifest.shards[group[0]]
                if len(group) == 1 and not first.removed:
                    shards.append(first)
                elif any(self.manifest.shards[index].live_count for index in group):
                    name = f"{self.generation + 1:06d}-{number:06d}.h5"
                    shards.append(write_shard(self.path / SHARDS / name, self._joined(group)))
            if len(groups) < len(self.manifest.shards) or dropped:
                self._commit("compact", dropped, tuple(shards))
            self._sweep()
            written = sum(shard.bytes for shard in self.manifest.shards if shard not in held)
            return Compaction(dropped=dropped, bytes_before=before, bytes_after=self.bytes_on_disk, bytes_written=written)

    def _joined(self, group: Sequence[int]) -> FeatureBatch:
        """The live images of some shards as one batch."""
        batches = [self._live(index) for index in group if self.manifest.shards[index].live_count]
        # What some say and others do not: no file, and an input that shows the image everywhere.
        has_paths, has_sha256 = (any(getattr(batch, name) for batch in batches) for name in ("paths", "sha256"))
        has_valid = any(batch.valid is not None for batch in batches)
        root = next((batch.root for batch in batches if batch.paths), "")

        def like_the_others(batch: FeatureBatch) -> FeatureBatch:
            nothing, paths = [""] * len(batch), batch.paths
            if batch.root != root:
                paths = [os.path.relpath(Path(batch.root, path), root) if path else "" for path in paths]
            valid = np.ones((len(batch), *self.layout.input_size), np.bool_) if has_valid else None
            return replace(
                batch,
                root=root,
                paths=paths or nothing if has_paths else (),
                sha256=batch.sha256 or nothing if has_sha256 else (),
                valid=valid if batch.valid is None else batch.valid,
            )

        return concatenate([like_the_others(batch) for batch in batches])

    def _live(self, index: int) -> FeatureBatch:
        """The images of a shard that were not removed, as they are stored; copied."""
        shard, live = self._shard(index), self.manifest.shards[index].live

        def texts(field: str) -> list[str]:
            found = shard.texts(field)
            return [found[position] for position in live] if found else []

        return FeatureBatch(
            texts("id"),
            shard.embedding[live],
            {name: maps[live] for name, maps in shard.levels.items()},
            self.manifest.source,
            valid=shard.valid(live, self.layout.input_size),
            paths=texts("path"),
            sha256=texts("sha256"),
            root=shard.root,
        )

    def _mark(self, action: str, places: Sequence[tuple[int, int]], change: Callable[[set[int], int], set[int]]) -> int:
        """Commit that the images at some shards' positions are removed, or are not."""
        removed = [set(shard.removed) for shard in self.manifest.shards]
        for index, position in places:
            removed[index] = change(removed[index], position)
        if places:
            marked = zip(self.manifest.shards, removed, strict=True)
            shards = tuple(replace(shard, removed=tuple(sorted(positions))) for shard, positions in marked)
            self._commit(action, len(set(places)), shards)
        return len(set(places))

    def _commit(self, action: str, images: int, shards: tuple[ShardEntry, ...]) -> None:
        manifest = self.manifest.next(action, images, shards, continued=self._continued)
        write_manifest(self.path, manifest)
        self._continued = True
        self._adopt(manifest)

    def _sweep(self) -> None:
        """Delete shards that no state names that somebody reads."""
        if any(generation < self.generation for generation in self.readers()):
            _log.info("somebody reads an older state of %s; what only it needs is deleted by a later compact", self.path)
            return
        named = {shard.file for shard in self.manifest.shards}
        for path in (self.path / SHARDS).glob("*.h5"):
            if path.name not in named:
                path.unlink()

    def snapshot(self) -> Snapshot:
        """The state as it is now, which stays whatever this bank does next."""
        return Snapshot(self.path, self.manifest, self._lease)

    def readers(self) -> list[int]:
        """The generations that others read, each named as often as it is opened."""
        return readers(self.path, besides=self._lease)


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What `Bank.compact` did: how many removed images it dropped, bytes of all shards before and after, bytes written."""

    dropped: int
    bytes_before: int
    bytes_after: int
    bytes_written: int


def plan_compaction(shards: Sequence[ShardEntry], target_bytes: int) -> list[list[int]]:
    """Groups of neighboring shards that become one each: of up to `target_bytes`, and none that is half as large is moved."""
    groups: list[list[int]] = []
    gathered = 0
    for index, shard in enumerate(shards):
        size = shard.bytes * shard.live_count // shard.count
        stays = not shard.removed and size >= target_bytes // 2
        if groups and gathered and not stays and gathered + size <= target_bytes:
            groups[-1].append(index)
            gathered += size
        else:
            groups.append([index])
            gathered = 0 if stays else size
    return groups


def _check_new(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise InputError(f"{folder} already holds a bank; open it, or choose another folder")
    if not folder.exists():
        return
    if folder.is_dir() and any((folder / SHARDS).glob("*.h5")):
        raise InputError(f"{folder} holds shards but no {MANIFEST}; restore it from a backup, or choose another folder")
    # What a creation that was interrupted leaves behind is no obstacle.
    if not folder.is_dir() or any(
        item.name not in (SHARDS, LOCK, WRITER, READERS) and not item.match(TEMPORARY_PATTERN) for item in folder.iterdir()
    ):
        raise InputError(f"{folder} exists and is not a bank; choose a new or empty folder")
