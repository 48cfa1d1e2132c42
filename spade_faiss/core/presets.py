"""Presets: settings that go together, from how features are stored to how they are searched and ranked, see `presets/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from spade_faiss.core.declaring import ALL, changed
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.named_files import packaged_names, read_named
from spade_faiss.core.schema import from_mapping, shorten
from spade_faiss.core.settings import Method

T = TypeVar("T")

_FOLDER = "presets"
# What a new bank is made and searched by unless something else is asked for.
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A preset.

    Attributes:
        name: its name.
        description: a sentence that says what it is for.
        recipe: the name of the recipe of the package whose indexes are built and searched.
        extraction: how features are stored.
        method: the parameters of SPADE. Levels may be given by their numbers, counted from the finest: `#2+#3`.
    """

    name: str
    description: str = ""
    recipe: str = "exact"
    extraction: Extraction = field(default_factory=Extraction)
    method: Method = field(default_factory=Method)

    def __post_init__(self) -> None:
        _check(self.recipe, self.method)

    def with_extraction(self, extraction: Extraction) -> Preset:
        """The preset with those settings of `extraction` that are not at their defaults."""
        return replace(self, extraction=_changed(extraction, self.extraction))

    def usual(self, levels: Sequence[str]) -> Usual:
        """How a bank of this preset is searched, whose levels have these names, finest first."""
        return Usual(preset=self.name, recipe=self.recipe, method=_with_names(self.method, levels))


@dataclass(frozen=True, kw_only=True)
class Usual:
    """How a bank is searched unless something else is asked for; `preset` names what it came from, empty for none."""

    preset: str = ""
    recipe: str = "exact"
    method: Method = field(default_factory=Method)

    def __post_init__(self) -> None:
        _check(self.recipe, self.method)


class BankSize(NamedTuple):
    """How many entries a bank has, and how many of them are left out with one of them, at most: see `Snapshot.siblings`."""

    entries: int
    siblings: int = 1


def of_few(method: Method, entries: int, siblings: int = 1) -> Method:
    """The method for a bank that may have too few images for it: where it asks for more than there are, it takes all.

    As many are left where one of the bank's own images is compared with the others; a bank of one image has no others, and is
    searched as a whole.

    Args:
        method: what is asked for.
        entries: how many entries the bank has.
        siblings: the most of them that are left out with one of them.
    """
    others = entries - siblings if entries > siblings else entries
    k_gallery = method.k_gallery
    several = k_gallery if isinstance(k_gallery, tuple) else (k_gallery,)
    found = tuple(ALL if k == ALL or int(k) > others else k for k in several)
    return replace(
        method,
        k_image=min(method.k_image, max(1, others)),
        k_gallery=found if isinstance(k_gallery, tuple) else found[0],
    )


def load_preset(preset: str | Path | Preset) -> Preset:
    """Load a preset of the package by its name, or any other from a YAML file.

    Raises:
        NotFoundError: for a name that is neither one of the package's presets nor a file.
        InputError: for a file that holds no preset.
    """
    if isinstance(preset, Preset):
        return preset
    content, where = read_named("preset", _FOLDER, preset)
    return from_mapping(Preset, content, where)


def _check(recipe: str, method: Method) -> None:
    """Raise InputError for what no bank can remember: a bank may come from anybody, and calibrations need all maps."""
    if not recipe.replace("-", "").replace("_", "").isalnum():
        raise InputError(
            f"recipe={shorten(recipe)} is not the name of a recipe of the package, such as exact; build that of a file "
            f"with: spade-faiss index BANK --recipe FILE, and name it when you score"
        )
    if method.localize != "all":
        raise InputError(f"localize={method.localize!r} is no setting of a preset: give it when you score")


def preset_names() -> list[str]:
    """The names of the presets that come with the package."""
    return packaged_names(_FOLDER)


def _changed(asked: T, base: T) -> T:
    """`base` with those fields of `asked` that are not at their defaults."""
    usual, values = type(asked)(), {}
    for each in fields(cast(Any, asked)):
        value, default = getattr(asked, each.name), getattr(usual, each.name)
        if value == default or each.name in getattr(asked, "derived", ()):
            continue
        values[each.name] = _changed(value, getattr(base, each.name)) if is_dataclass(value) else value
    return changed(base, values)


def _with_names(method: Method, levels: Sequence[str]) -> Method:
    """The method with the names of levels in place of their numbers; a level that the network does not have is left out."""

    def named(part: str) -> str | None:
        if not part.startswith("#"):
            return part
        if not part[1:].isdecimal() or int(part[1:]) < 1:
            raise InputError(f"levels: {shorten(part)} is no number of a level; they are counted from the finest, #1")
        number = int(part[1:])
        return levels[number - 1] if number <= len(levels) else None

    several = isinstance(method.k_gallery, tuple) and len(method.k_gallery) == len(method.levels)
    weighted = len(method.level_weights) == len(method.levels)
    found, k_gallery, weights = [], [], []
    for place, name in enumerate(method.levels):
        if parts := [kept for part in name.split("+") if (kept := named(part)) is not None]:
            found.append("+".join(parts))
            k_gallery += [cast(tuple[int | str, ...], method.k_gallery)[place]] if several else []
            weights += [method.level_weights[place]] if weighted else []
    kept_k = tuple(k_gallery) if several and found else method.k_gallery
    kept_weights = tuple(weights) if weighted and found else method.level_weights
    return replace(method, levels=tuple(found), k_gallery=kept_k, level_weights=kept_weights)
