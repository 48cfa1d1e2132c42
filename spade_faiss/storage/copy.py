"""The copy of a bank that lies at a URL: fetched file by file, and committed there before it counts here.

At the URL there is what a folder would hold, under the same names. Files are written once, under names that nobody else
chooses; a manifest is replaced only if it is still the one that was read. So a writer that is killed leaves the state before,
and of two that write at the same time, one is told that it came too late.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from spade_faiss.core.copies import Entry, copy_of, register
from spade_faiss.core.errors import BankError, BusyError, InputError
from spade_faiss.core.files import hash_file, write_bytes
from spade_faiss.core.inside import is_regular
from spade_faiss.core.memory import format_bytes
from spade_faiss.core.progress import progress_bar
from spade_faiss.storage.cache import open_cache
from spade_faiss.storage.names import MANIFEST, MARKS, PROBES, SHARDS, is_document, is_file, named_files
from spade_faiss.storage.objects import NoConditions, ObjectStore, Stored, Taken
from spade_faiss.storage.stores import open_store
from spade_faiss.storage.url import is_url, local_path, parse_url

# How long a file stays that no manifest names: somebody may read an older state of the bank, or be about to commit the file.
GRACE_S = 24 * 3600.0
# What a document may be long, as `core.signed_json` has it.
_MOST_BYTES = 8 << 20

_log = logging.getLogger(__name__)


class BankCopy:
    """The copy of a bank in the cache, and what is known of the URL.

    Args:
        store: what lies at the URL.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.url = store.url
        self._store = store
        self._cache = open_cache()
        self._place = self._cache.place(store.url)
        self.folder = self._place.folder
        # The versions of the documents that the copy has, and the sizes of the files that were listed.
        self._versions: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._can_write = False

    def refresh(self, *, whole: bool) -> None:
        """See `Copy.refresh`.

        Raises:
            StorageError: if the URL cannot be reached.
        """
        with self._place.lock():
            if whole:
                self._refresh(self._store.list())
            elif (found := self._store.find(MANIFEST)) is not None:
                self._fetch_document(found)

    def _refresh(self, listed: Sequence[Stored]) -> None:
        documents = {stored.name: stored for stored in listed if is_document(stored.name)}
        self._sizes = {stored.name: stored.bytes for stored in listed if is_file(stored.name)}
        if MANIFEST not in documents:  # there is no bank, or none any more: nothing that is here belongs to the next one
            self._versions.clear()
            if is_regular(self.folder / MANIFEST):  # else somebody may be about to make a bank
                self._place.clear(last=MANIFEST)
            return
        (self.folder / SHARDS).mkdir(exist_ok=True)
        for name in self._local_documents() - documents.keys():
            (self.folder / name).unlink(missing_ok=True)
            self._versions.pop(name, None)
        for stored in documents.values():
            self._fetch_document(stored)

    def _fetch_document(self, stored: Stored) -> None:
        path = self.folder / stored.name
        known = self._versions.get(stored.name, "").partition("\n")[0]
        if stored.version and known == stored.version and is_regular(path):
            return
        if stored.bytes > _MOST_BYTES:
            raise BankError(
                f"{self.url}/{stored.name} is of {stored.bytes} bytes, more than the {_MOST_BYTES} that such a file may have"
            )
        try:
            data, version = self._store.read(stored.name, _MOST_BYTES)
        except FileNotFoundError:  # it was deleted since it was listed
            path.unlink(missing_ok=True)
            self._versions.pop(stored.name, None)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        self._versions[stored.name] = version

    def _local_documents(self) -> set[str]:
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.json"))
        return {name for name in found if is_document(name)}

    def fetch(self, path: Path, sha256: str, user: object | None = None) -> None:
        """See `Copy.fetch`.

        Raises:
            BankError: if the object is missing, or has another checksum.
            StorageError: if the URL cannot be reached.
            InputError: if there is no room in the cache.
        """
        name = self._name(path)

        def fetch(to: Path) -> None:
            _log.debug("fetching %s/%s", self.url, name)
            try:
                with progress_bar(self._sizes.get(name, 0), "fetch", self._cache.progress, unit="B") as bar:
                    self._store.download(name, to, bar.update)
            except FileNotFoundError as error:
                raise BankError(
                    f"{self.url}/{name} is missing; if the bank was compacted since it was opened, open it again, else restore "
                    "it from a backup"
                ) from error

        if name not in self._sizes and not self._place.is_kept(path, sha256):
            if (found := self._store.find(name)) is not None:
                self._sizes[name] = found.bytes
            elif is_regular(path):  # written here, and not committed yet: it cannot be evicted
                if hash_file(path) != sha256:
                    raise BankError(f"{path} has changed since it was written; run the command again")
                return
        self._place.hold(path, sha256, self._sizes.get(name, 0), fetch, user)

    def commit(self, path: Path, data: bytes, files: Iterable[tuple[Path, Entry]]) -> None:
        """See `Copy.commit`.

        Raises:
            BusyError: if somebody else has replaced the manifest since it was read; nothing is changed then.
            InputError: if the storage cannot write on a condition.
            BankError: if a file is missing that the manifest names.
            StorageError: if the URL cannot be reached, or cannot be written to.
        """
        name = self._name(path)
        for file, entry in files:
            self.store(file, entry)
        self._check_can_write()
        with self._place.lock():
            version = self._versions.get(name)
            try:
                new = self._store.create(name, data) if version is None else self._store.replace(name, data, version)
            except Taken as error:
                # A connection that broke after the storage had written makes the same request twice.
                there, new = self._read(name)
                if there != data:
                    raise BusyError(
                        f"somebody else has changed {self.url}/{name} since it was read here; what they wrote is kept, and so "
                        "is all that was stored before. Run the same command again: it begins with what is there now"
                    ) from error
            write_bytes(path, data)
            self._versions[name] = new

    def _read(self, name: str) -> tuple[bytes | None, str]:
        try:
            return self._store.read(name, _MOST_BYTES)
        except FileNotFoundError:
            return None, ""

    def store(self, path: Path, entry: Entry) -> None:
        """See `Copy.store`.

        Raises:
            BusyError: if there is another file of its name.
            BankError: if it is neither here nor at the URL.
            InputError: if the storage cannot write on a condition.
        """
        name = self._name(path)
        is_here = is_regular(path)
        if name in self._sizes and (not is_here or self._place.is_kept(path, entry.sha256)):
            return
        if not is_here and (found := self._store.find(name)) is not None:  # by another node
            self._sizes[name] = found.bytes
            return
        if not is_here:
            raise BankError(f"{self.url}/{name} is missing, and so is its copy {path.name} in the cache; run the command again")
        self._check_can_write()
        _log.debug("storing %s/%s, %s", self.url, name, format_bytes(entry.bytes))
        try:
            self._store.create(name, path)
        except Taken as error:
            # By us, if we were killed or the connection broke; the same content is as good.
            if self._hash(name) != entry.sha256:
                raise BusyError(
                    f"somebody else has stored another {self.url}/{name}; run the command again, and if that does not help, "
                    "build the index anew with --rebuild"
                ) from error
        self._sizes[name] = entry.bytes
        self._place.keep(path, entry.sha256)
        self._cache.grown(entry.bytes)

    def stored_sha256(self, path: Path) -> str:
        """See `Copy.stored_sha256`."""
        return self._hash(self._name(path))

    def _hash(self, name: str) -> str:
        temporary = self.folder / f".spade-{secrets.token_hex(8)}.tmp"
        try:
            self._store.download(name, temporary)
            return hash_file(temporary)
        except FileNotFoundError:
            return ""
        finally:
            temporary.unlink(missing_ok=True)

    def _check_can_write(self) -> None:
        """Raise InputError unless the storage does what a condition says; some answer as if they did and do not."""
        if self._can_write:
            return
        name = f"{PROBES}-{secrets.token_hex(8)}"
        try:
            version = self._store.create(name, b"1")
            try:
                kept = [self._refuses(partial(self._store.create, name, b"2"))]
                version = self._store.replace(name, b"3", version)
                kept.append(self._refuses(partial(self._store.replace, name, b"4", _other(version))))
            finally:
                self._store.delete([name])
        except NoConditions as error:
            raise self._cannot_write(str(error)) from error
        except Taken as error:
            raise self._cannot_write("it refused a write whose condition was true") from error
        if not all(kept):
            raise self._cannot_write("it took a write whose condition was not true")
        self._can_write = True

    @staticmethod
    def _refuses(write: Callable[[], str]) -> bool:
        try:
            write()
        except Taken:
            return True
        return False

    def _cannot_write(self, why: str) -> InputError:
        return InputError(
            f"{self.url} cannot be written to: its storage has no conditional writes ({why}), without which two writers would "
            "destroy what the other one stored. Banks there can be read; write one in a folder, or in storage that has them, "
            "such as Amazon S3, MinIO, Google Cloud Storage or Azure"
        )

    def check_new(self) -> None:
        """See `Copy.check_new`."""
        # What a killed creation left is named by nobody, and is no harm.
        others = [name for name in self._sizes if not name.startswith("network/")]
        if others:
            raise InputError(f"{self.url} holds {others[0]} but no {MANIFEST}; restore it from a backup, or choose another URL")

    def is_kept(self, path: Path) -> bool:
        """See `Copy.is_kept`."""
        return path in self._place.kept_files()

    def sweep(self) -> None:
        """See `Copy.sweep`: files that no document has named for a day are deleted.

        Since when nobody has named a file is remembered at the URL, by an empty object whose time is that of the storage:
        clocks of machines differ.
        """
        with self._place.lock():
            self._store.put(f"{MARKS}/now", b"")
            listed = {stored.name: stored for stored in self._store.list()}
            self._refresh(list(listed.values()))
            try:
                kept = named_files({name: self.folder / name for name in self._local_documents()})
            except (OSError, ValueError, RecursionError) as error:
                _log.warning("nothing of %s is swept: %s", self.url, error)
                return
            now_s = listed[f"{MARKS}/now"].modified_s
            unnamed = {name for name in listed if is_file(name) and name not in kept}
            marks = {name.removeprefix(f"{MARKS}/"): stored for name, stored in listed.items() if name.startswith(f"{MARKS}/")}
            old = {name for name in unnamed if name in marks and now_s - marks[name].modified_s >= GRACE_S}
            for name in unnamed - marks.keys():
                self._store.put(f"{MARKS}/{name}", b"")
            probes = [
                name for name, stored in listed.items() if name.startswith(PROBES) and now_s - stored.modified_s >= GRACE_S
            ]
            gone = [f"{MARKS}/{name}" for name in marks if name not in unnamed or name in old]
            self._store.delete([*sorted(old), *gone, *probes])
            for name in old:
                self._sizes.pop(name, None)

    def _name(self, path: Path) -> str:
        name = Path(os.path.abspath(path)).relative_to(self.folder).as_posix()  # noqa: PTH100  # without following links
        if not (is_file(name) or is_document(name)):
            raise BankError(f"{name[:200]!r} cannot be the name of a file of the bank {self.url}; it was made by nobody of us")
        return name


def _other(version: str) -> str:
    """A version that no object has."""
    e_tag, _, number = version.partition("\n")
    quote = '"' if e_tag.startswith('"') else ""
    return f"{quote}{'0' * 32}{quote}" + ("\n1" if number else "")


_OPEN: dict[str, BankCopy] = {}


def bank_folder(place: str | os.PathLike[str]) -> Path:
    """Return the folder of a bank; of one at a URL, that of its copy, whose manifests are those at the URL now.

    Raises:
        InputError: for a URL that cannot be used.
        DependencyError: if a package is missing that reaches it.
        StorageError: if it cannot be reached.
    """
    if not is_url(place):
        if (copy := copy_of(path := local_path(place))) is not None and isinstance(copy, BankCopy) and path == copy.folder:
            copy.refresh(whole=True)
        return path
    url = parse_url(str(place))
    copy = _OPEN.get(str(url))
    if copy is None:
        copy = _OPEN[str(url)] = BankCopy(open_store(url))
        register(copy.folder, str(url), copy)
    copy.refresh(whole=True)
    return copy.folder
