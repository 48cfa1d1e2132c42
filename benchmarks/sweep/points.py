"""Says what is measured: sweeps in YAML expand to points."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import from_mapping
from spade_faiss.search.recipe import Recipe, Settings, gallery_names, load_recipe

# The version is part of every hash: raise it when points that were measured before cannot be compared with new ones.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ImagePoint:
    """A search for the `k` nearest of `n` embeddings by an index.

    Args:
        set: the name of the embeddings, see `embeddings`.
        n: how many embeddings are searched.
        factory: FAISS's string for the index.
        query: FAISS's string for the query parameters.
        rerank: how many candidates are compared again by true distances, read from the file of the base; 0 for none.
        k: how many neighbors are searched.
        threads: how many threads FAISS uses.
        queries: the most test images.
    """

    kind: ClassVar[str] = "image"
    set: str
    n: int
    factory: str
    query: str = ""
    rerank: int = 0
    k: int = 5
    threads: int = 2
    queries: int = 200

    @property
    def build_key(self) -> str:
        """The name of the index; points of the same key share it."""
        return _digest({"set": self.set, "n": self.n, "factory": self.factory, "threads": self.threads})

    @property
    def label(self) -> str:
        """The name in plots."""
        return " ".join(filter(None, (self.factory, self.query, f"rerank={self.rerank}" if self.rerank else "")))


@dataclass(frozen=True, kw_only=True)
class PixelPoint:
    """A search for the nearest gallery vectors of every location, by a recipe.

    Args:
        set: the name of the features, see `sets`.
        recipe: the name of the recipe.
        k: how many nearest normals are searched.
        normals: how many normal images a generated set has; 0 for the usual number.
        side: the side of a generated set's finest level; 0 for the usual one.
        build: build settings that differ from those of the recipe.
        query: query settings that differ from those of the recipe.
        threads: how many threads FAISS uses.
        images: the most test images; 0 for all.
    """

    kind: ClassVar[str] = "pixel"
    set: str
    recipe: str
    k: int
    normals: int = 0
    side: int = 0
    build: Settings = field(default_factory=dict)
    query: Settings = field(default_factory=dict)
    threads: int = 2
    images: int = 0

    @property
    def build_key(self) -> str:
        """The name of the index; points of the same key share it."""
        return _digest({"recipe": self.recipe, "build": self.build})

    @property
    def label(self) -> str:
        """The name in plots."""
        return " ".join([self.recipe, *(f"{name}={value}" for name, value in {**self.build, **self.query}.items())])

    def loaded(self) -> Recipe:
        """Return the recipe with the settings of this point, named after its build so that several builds can coexist."""
        recipe = load_recipe(self.recipe)
        build, query = asdict(recipe.build), asdict(recipe.query)
        build["settings"] |= self.build
        query["settings"] |= self.query
        return from_mapping(Recipe, {"name": f"{self.recipe}-{self.build_key}", "build": build, "query": query}, self.label)


@dataclass(frozen=True, kw_only=True)
class PeerPoint:
    """What others do with the same features; `peer` is `published`, `rebuilt` or `patchcore`, see `peers`."""

    kind: ClassVar[str] = "peer"
    set: str
    peer: str
    k: int = 5
    normals: int = 0
    settings: Settings = field(default_factory=dict)
    threads: int = 2
    images: int = 0

    @property
    def label(self) -> str:
        """The name in plots."""
        return " ".join([self.peer, *(f"{name}={value}" for name, value in self.settings.items())])


@dataclass(frozen=True, kw_only=True)
class LookPoint:
    """Statistics of the first `n` embeddings of a set, to be compared with those of the real set that it was made from."""

    kind: ClassVar[str] = "look"
    set: str
    n: int
    queries: int = 200

    @property
    def label(self) -> str:
        """The name in plots."""
        return f"look of {self.n}"


Point = ImagePoint | PixelPoint | PeerPoint | LookPoint
KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (ImagePoint, PixelPoint, PeerPoint, LookPoint)}


def load_sweep(path: Path) -> list[Point]:
    """Read the points of a sweep, each once, in the order of the file. A list in an entry stands for each of its values.

    Raises:
        InputError: for a file that is not a sweep.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: expected a list of entries such as {{kind: image, set: elpv, n: 1000, factory: Flat}}")
    points: dict[str, Point] = {}
    for number, entry in enumerate(content):
        for values in expand(entry):
            point = point_of(values, f"{path}: entry {number + 1}")
            points.setdefault(point_id(point), point)
    return list(points.values())


def expand(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the values of lists; mappings inside are expanded, too."""
    choices = []
    for value in entry.values():
        if isinstance(value, Mapping):
            choices.append(list(expand(value)))
        else:
            choices.append(value if isinstance(value, list) else [value])
    for chosen in itertools.product(*choices):
        yield dict(zip(entry, chosen, strict=True))


def point_of(values: Mapping[str, Any], where: str) -> Point:
    """Make a point of a mapping that names its `kind`.

    Raises:
        InputError: for a mapping that is not a point.
    """
    rest = dict(values)
    kind = rest.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"{where}: kind={kind!r} is not one of {', '.join(KINDS)}")
    point: Point = from_mapping(KINDS[kind], rest, where)
    if isinstance(point, PixelPoint) and load_recipe(point.recipe).build.gallery not in gallery_names():
        raise InputError(f"{where}: recipe {point.recipe!r} searches no maps")
    return point


def as_mapping(point: Point) -> dict[str, Any]:
    """Return the mapping from which `point_of` makes this point."""
    return {"kind": point.kind, **asdict(point)}


def point_id(point: Point) -> str:
    """Return the name of a point's file; the same settings, in whatever order, give the same name."""
    return f"{point.kind}-{_digest(as_mapping(point))}"


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps({"version": VERSION, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
