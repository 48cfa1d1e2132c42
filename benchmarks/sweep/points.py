"""What is measured: sweeps in YAML, and the points that they expand to."""

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
from spade_faiss.search.recipe import GALLERIES, Recipe, Settings, load_recipe

# Part of every hash: raise it when points measured before cannot be compared with new ones.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ImagePoint:
    """Finding the `k` nearest of `n` embeddings by an index.

    `set`: see `embeddings`. `factory`, `query`: FAISS's strings. `rerank`: how many candidates are compared again by their true
    distances, read from the file of the base; 0 takes the index at its word. `queries`: test images, at most.
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
        """Points of the same key share an index."""
        return _digest({"set": self.set, "n": self.n, "factory": self.factory, "threads": self.threads})

    @property
    def label(self) -> str:
        """What a plot calls it."""
        return " ".join(filter(None, (self.factory, self.query, f"rerank={self.rerank}" if self.rerank else "")))


@dataclass(frozen=True, kw_only=True)
class PixelPoint:
    """Finding the nearest gallery vectors of every location, by a recipe.

    `set`: see `sets`; `normals`, `side`: of generated ones. `build`, `query`: settings that differ from the recipe's. `images`:
    test images, at most; 0 means all.
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
        """Points of the same key share an index."""
        return _digest({"recipe": self.recipe, "build": self.build})

    @property
    def label(self) -> str:
        """What a plot calls it."""
        return " ".join([self.recipe, *(f"{name}={value}" for name, value in {**self.build, **self.query}.items())])

    def loaded(self) -> Recipe:
        """The recipe with the settings of this point; its name is that of its build, so that builds stand side by side."""
        recipe = load_recipe(self.recipe)
        build, query = asdict(recipe.build), asdict(recipe.query)
        build["settings"] |= self.build
        query["settings"] |= self.query
        return from_mapping(Recipe, {"name": f"{self.recipe}-{self.build_key}", "build": build, "query": query}, self.label)


@dataclass(frozen=True, kw_only=True)
class PeerPoint:
    """What others do with the same features: `published`, `rebuilt` or `patchcore`, see `peers`."""

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
        """What a plot calls it."""
        return " ".join([self.peer, *(f"{name}={value}" for name, value in self.settings.items())])


@dataclass(frozen=True, kw_only=True)
class LookPoint:
    """What the first `n` embeddings of a set look like, beside those of the real set that it was made from."""

    kind: ClassVar[str] = "look"
    set: str
    n: int
    queries: int = 200

    @property
    def label(self) -> str:
        """What a plot calls it."""
        return f"look of {self.n}"


Point = ImagePoint | PixelPoint | PeerPoint | LookPoint
KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (ImagePoint, PixelPoint, PeerPoint, LookPoint)}


def load_sweep(path: Path) -> list[Point]:
    """The points of a sweep, each once, in the order of the file: every list in an entry stands for each of its values.

    Raises:
        InputError: for a file that is no sweep.
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
    """Every combination of the lists' values; mappings within are expanded, too."""
    choices = []
    for value in entry.values():
        if isinstance(value, Mapping):
            choices.append(list(expand(value)))
        else:
            choices.append(value if isinstance(value, list) else [value])
    for chosen in itertools.product(*choices):
        yield dict(zip(entry, chosen, strict=True))


def point_of(values: Mapping[str, Any], where: str) -> Point:
    """The point that a mapping says, with its `kind`.

    Raises:
        InputError: for what is no point.
    """
    rest = dict(values)
    kind = rest.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"{where}: kind={kind!r} is not one of {', '.join(KINDS)}")
    point: Point = from_mapping(KINDS[kind], rest, where)
    if isinstance(point, PixelPoint) and load_recipe(point.recipe).build.gallery not in GALLERIES:
        raise InputError(f"{where}: recipe {point.recipe!r} searches no maps")
    return point


def as_mapping(point: Point) -> dict[str, Any]:
    """What `point_of` reads."""
    return {"kind": point.kind, **asdict(point)}


def point_id(point: Point) -> str:
    """Names a point's file: the same settings, whatever their order, give the same name."""
    return f"{point.kind}-{_digest(as_mapping(point))}"


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps({"version": VERSION, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
