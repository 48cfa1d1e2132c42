"""What all indexes that are built beside a bank have in common: a manifest that is read and checked, and files it names."""

from __future__ import annotations

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from spade_faiss.bank.places import INDEXES
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.copies import copy_of, fetched
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import FileEntry, check_sha256, hash_file
from spade_faiss.core.hints import index_command
from spade_faiss.core.inside import check_inside, files_in, is_regular
from spade_faiss.core.schema import shorten
from spade_faiss.core.signed_json import read_signed, write_signed
from spade_faiss.index.staleness import IndexedShard
from spade_faiss.search.recipe import Recipe

# More commits and builds than there can have been.
_MOST = 1 << 53
# Numbers of builds at a URL begin here.
_OTHERS = 1 << 40

UP_TO_DATE = "is up to date"
REBUILD_ASKED_FOR = "asked for"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuiltIndex(ABC):
    """The manifest of an index: which images it holds, how it was built, its files and their checksums.

    Args:
        recipe: the name of the recipe that it was built for.
        generation: the bank's generation when it was built or added to.
        build: a number that is part of its files' names, so that a new build never writes over files that are in use.
        trained: it was trained on the first so many of its `shards`; 0 for an index without training.
        shards: the shards whose images it holds, in the order in which they were added.
        faiss: the version of FAISS that built it.
    """

    FORMAT: ClassVar[str]
    SCHEMA: ClassVar[int]
    # The name of the manifest, the folder beside it that holds the files, and their suffix.
    MANIFEST: ClassVar[str]
    FOLDER: ClassVar[str]
    SUFFIX: ClassVar[str]
    # What messages say that it is an index of.
    SUBJECT: ClassVar[str]

    recipe: str
    generation: int
    build: int
    trained: int
    shards: tuple[IndexedShard, ...]
    faiss: str

    def __post_init__(self) -> None:
        if len({shard.sha256 for shard in self.shards}) < len(self.shards):
            raise InputError("it lists a shard twice")
        for name in ("build", "generation", "trained"):
            if not 0 <= (value := getattr(self, name)) <= _MOST:
                raise InputError(f"{name}={shorten(value)} cannot be of an index")
        for entry in self.files:
            check_sha256(entry.sha256)
        if (found := [entry.file for entry in self.files]) != (expected := self.file_names()):
            raise InputError(f"build {self.build} names the files {shorten(found)}, expected {shorten(expected)}")

    @property
    @abstractmethod
    def files(self) -> tuple[FileEntry, ...]:
        """The records of all files."""

    @abstractmethod
    def file_names(self) -> list[str]:
        """Return the names that the files of this build must have."""

    @staticmethod
    @abstractmethod
    def settings_of(recipe: Recipe) -> Mapping[str, object]:
        """Return the settings that a recipe asks for; the manifest has a field for each."""

    @property
    def count(self) -> int:
        """The number of images that it holds, removed ones included."""
        return sum(shard.count for shard in self.shards)

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(entry.bytes for entry in self.files)

    def difference(self, recipe: Recipe) -> str | None:
        """Say in which setting the index differs from a recipe, with both values; None if it has the recipe's settings."""
        for name, wanted in self.settings_of(recipe).items():
            if (found := getattr(self, name)) != wanted:
                return f"was built with {name} {found!r}, the recipe says {wanted!r}"
        return None


M = TypeVar("M", bound=BuiltIndex)


class IndexFolder(Generic[M]):
    """The place of a recipe's index beside a bank.

    Args:
        kind: the class of its manifest.
        bank: the bank.
        recipe: the name of the recipe.

    Raises:
        BankError: if a part of its path is a link.
    """

    def __init__(self, kind: type[M], bank: Snapshot, recipe: str) -> None:
        check_inside(bank.path, *bank.place, INDEXES, recipe, kind.MANIFEST, kind="file")
        check_inside(bank.path, *bank.place, INDEXES, recipe, kind.FOLDER, kind="folder")
        self._kind = kind
        self._bank = bank
        self._recipe = recipe
        self.path = bank.path.joinpath(*bank.place, INDEXES, recipe)
        self.files = self.path / kind.FOLDER
        self.manifest = self.path / kind.MANIFEST

    def command(self, *, levels: Sequence[str] = (), rebuild: bool = False) -> str:
        """Return the command that builds the index, of these levels or those that it has."""
        return index_command(self._bank.path, self._recipe, levels=levels, rebuild=rebuild)

    def read(self) -> M:
        """Read the manifest.

        Raises:
            BankError: if it is damaged, of another version, or of another recipe.
        """
        kind, remedy = self._kind, f"rebuild the index with: {self.command()}"
        built = read_signed(self.manifest, kind, kind.FORMAT, kind.SCHEMA, remedy)
        if built.recipe != self._recipe:
            raise BankError(f"{self.manifest} is damaged: it is of recipe {shorten(built.recipe)}, its folder is not; {remedy}")
        return built

    def read_if_usable(self) -> M | None:
        """Read the manifest; return None if there is none, and log a warning and return None if it cannot be used."""
        try:
            return self.read() if is_regular(self.manifest) else None
        except BankError as error:
            _log.warning("%s", error)
            return None

    def read_for(self, recipe: Recipe) -> M:
        """Read the manifest of an index that is about to be searched.

        Raises:
            BankError: if the index was not built, its manifest cannot be used, or it was built with other settings.
        """
        if not is_regular(self.manifest):
            raise BankError(
                f"the bank {self._bank.path} has no index {self._recipe!r} of its {self._kind.SUBJECT}; "
                f"build it with: {self.command(levels=recipe.build.levels)}"
            )
        built = self.read()
        if difference := built.difference(recipe):
            raise BankError(f"index {self.path} {difference}; run: {self.command()}")
        return built

    def check_shards(self, built: M) -> None:
        """Raise BankError if the index and the bank disagree about a shard; warn if the index holds no image of the bank."""
        counts = {shard.sha256: shard.count for shard in self._bank.manifest.shards}
        if len(self._bank) and not any(shard.sha256 in counts for shard in built.shards):
            _log.warning(
                "index %s holds no image of the bank, so all are searched without it; bring it up to date: %s",
                self.path,
                self.command(),
            )
        for shard in built.shards:
            if (count := counts.get(shard.sha256, shard.count)) != shard.count:
                raise BankError(
                    f"index {self.path} says that a shard has {shard.count} images, it has {count}; "
                    f"rebuild it with: {self.command(rebuild=True)}"
                )

    def fetched(self, entry: FileEntry) -> Path:
        """Return the path of a file that is about to be opened; it raises what `copies.fetched` raises."""
        return fetched(self.files / entry.file, entry.sha256)

    def next_build(self, number: int) -> int:
        """Return the number of the next build: `number`, or, at a URL, one that nobody who builds at the same time chooses."""
        return number if copy_of(self.path) is None else _OTHERS + secrets.randbelow(_OTHERS)

    def check_content(self, entry: FileEntry) -> None:
        """Raise BankError if a file is missing, or its checksum is not the recorded one; the file is read in full."""
        path = self.fetched(entry)
        found = hash_file(path) if is_regular(path) else None
        if found != entry.sha256:
            state = "is missing" if found is None else f"has sha256 {found}, expected {entry.sha256}"
            raise BankError(f"{path} {state}; rebuild it with: {self.command(rebuild=True)}")

    def write(self, built: M) -> None:
        """Write the manifest: from now on, the files that it names are the index."""
        files = ((self.files / entry.file, entry) for entry in built.files)
        write_signed(self.manifest, built.FORMAT, built.SCHEMA, asdict(built), files)

    def sweep(self, built: M) -> None:
        """Delete files of other builds."""
        named = {entry.file for entry in built.files}
        for path in files_in(self.files, f"*{built.SUFFIX}"):
            if path.name not in named:
                path.unlink()


def index_folder(bank: Snapshot, recipe: Recipe) -> Path:
    """Return the folder of all indexes of a recipe; raise BankError if it is a link."""
    return check_inside(bank.path, *bank.place, INDEXES, recipe.name)


def index_folders(kind: type[M], bank: Snapshot) -> list[IndexFolder[M]]:
    """Return the places of all indexes of a kind that were built beside a bank, sorted by recipe."""
    folder = check_inside(bank.path, *bank.place, INDEXES)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [
        IndexFolder(kind, bank, recipe)
        for recipe in names
        if is_regular(check_inside(bank.path, *bank.place, INDEXES, recipe, kind.MANIFEST))
    ]


def read_built(kind: type[M], bank: Snapshot) -> list[M]:
    """Read the manifests of all indexes of a kind that were built beside a bank, sorted by recipe.

    Raises:
        BankError: if one is damaged, or of another version.
    """
    return [folder.read() for folder in index_folders(kind, bank)]


def outcome(before: BuiltIndex | None, why_anew: str | None, added: int) -> str:
    """Say what a build did, for people.

    Args:
        before: the index that was there.
        why_anew: why it was not added to.
        added: the number of images that were added to it.
    """
    if before is None:
        return "built"
    return f"built anew: {why_anew}" if why_anew else f"added {added} images to it"


def check_not_empty(bank: Snapshot) -> None:
    """Raise InputError for a bank without images, over which no index can be built."""
    if len(bank) == 0:
        raise InputError(f"the bank {bank.path} is empty; extract images first")
