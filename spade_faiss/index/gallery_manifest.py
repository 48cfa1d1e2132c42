"""What a gallery index holds: its manifest, the names of its files, and its levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.files import FileEntry
from spade_faiss.core.signed_json import hash_json
from spade_faiss.features.batch import Level
from spade_faiss.index.built_index import BuiltIndex
from spade_faiss.index.staleness import IndexedShard
from spade_faiss.search.levels import index_name, searched_levels
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.search.recipe import Recipe, Settings


@dataclass(frozen=True, kw_only=True)
class EncodedShard(IndexedShard):
    """A shard whose images were encoded, removed ones included, and the file that holds their encodings.

    Shards whose images are packed together have one file.
    """

    file: FileEntry


@dataclass(frozen=True, kw_only=True)
class GalleryIndexManifest(BuiltIndex):
    """The manifest of a gallery index.

    Args:
        gallery: the name of the search method.
        settings: its build settings, with the defaults written out.
        levels: the levels that it holds, by `search.levels.index_name`; empty for each of the bank's levels.
        trained_file: the record of the file that holds what was trained.
        build_s: the seconds that the last build took.
    """

    FORMAT: ClassVar[str] = "spade_faiss gallery index"
    SCHEMA: ClassVar[int] = 2
    MANIFEST: ClassVar[str] = "gallery.json"
    FOLDER: ClassVar[str] = "gallery"
    SUFFIX: ClassVar[str] = ".h5"
    SUBJECT: ClassVar[str] = "maps"

    shards: tuple[EncodedShard, ...]
    gallery: str
    settings: Settings
    trained_file: FileEntry
    build_s: float
    levels: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The records of all files."""
        return (self.trained_file, *dict.fromkeys(shard.file for shard in self.shards))

    @property
    def groups(self) -> list[list[str]]:
        """The checksums of the shards of each file of encodings."""
        groups: dict[str, list[str]] = {}
        for shard in self.shards:
            groups.setdefault(shard.file.file, []).append(shard.sha256)
        return list(groups.values())

    def file_names(self) -> list[str]:
        """Return the names that the files of this build must have."""
        return [trained_name(self.build), *(encoded_name(self.build, group) for group in self.groups)]

    @staticmethod
    def settings_of(recipe: Recipe) -> Mapping[str, object]:
        """Return the settings that a recipe asks for."""
        return {"gallery": recipe.build.gallery, "settings": asdict(resolve_recipe(recipe).build)}


def trained_name(build: int) -> str:
    """The name of the file with what was trained."""
    return f"trained-{build:03d}.h5"


def encoded_name(build: int, shards: Sequence[str]) -> str:
    """The name of the file with the encodings of shards that have these checksums."""
    return f"{build:03d}-{(shards[0] if len(shards) == 1 else hash_json({'shards': sorted(shards)}))[:16]}.h5"


def indexed_levels(bank: Snapshot, names: Sequence[str]) -> dict[str, Level]:
    """The levels that an index of these `levels` holds, by their names in it."""
    levels = bank.layout.levels
    return {index_name(level, levels): level for level in searched_levels(levels, "mean", names)}


def level_names(bank: Snapshot, names: Sequence[str]) -> tuple[str, ...]:
    """The `levels` of an index's manifest, for levels that were named in any way."""
    levels = tuple(indexed_levels(bank, names))
    return () if levels == tuple(indexed_levels(bank, ())) else levels
