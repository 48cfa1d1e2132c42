"""What is chosen among: how features are stored, how they are searched, and which score ranks images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spade_faiss.core.declaring import ALL
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.presets import Preset, Usual, load_preset, of_few
from spade_faiss.core.settings import Method
from spade_faiss.features.layout import Layout

# The neighbors of a window's gallery: more gained nothing where it was tried.
_MANY = 100
# Image scores that are made of a map, so that one map has several.
MAP_SCORES = ("top", "max")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How the maps of a bank are stored, as far as it is chosen: see `Extraction`."""

    pool: int | tuple[int, ...] = 1
    pool_border: str = "valid"
    normalize: str = "none"

    @staticmethod
    def of(settings: Extraction | Layout) -> Stored:
        """That of an extraction, or of a bank."""
        return Stored(pool=settings.pool, pool_border=settings.pool_border, normalize=settings.normalize)

    def comparable(self) -> Stored:
        """The same with one border where nothing is averaged, as it makes no difference there."""
        pool = 1 if isinstance(self.pool, tuple) and set(self.pool) == {1} else self.pool
        return replace(self, pool=pool, pool_border=self.pool_border if pool != 1 else Stored.pool_border)

    def __str__(self) -> str:
        pool = "x".join(map(str, self.pool)) if isinstance(self.pool, tuple) else str(self.pool)
        return f"pool {pool}" + (", unit vectors" if self.normalize == "l2" else "")


@dataclass(frozen=True, kw_only=True)
class MapOption:
    """One way to make maps: what is stored and how it is searched. Levels have the names of the network's."""

    stored: Stored
    recipe: str
    method: Method

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        levels = " ".join(self.method.levels) or "all levels"
        k = self.method.k_gallery
        gallery = "/".join(map(str, k)) if isinstance(k, tuple) else str(k)
        others = "" if self.recipe in ("exact", "global", "clusters") else f", {self.recipe}"
        weights = ", weights " + "/".join(f"{each:g}" for each in self.method.level_weights)
        return f"{self.stored}; {levels}; K={gallery}{others}{weights if self.method.level_weights else ''}"

    def weighted_by(self, weights: tuple[float, ...]) -> MapOption:
        """The same with other weights of levels."""
        return replace(self, method=replace(self.method, level_weights=weights))

    def ranked_by(self, score: str) -> Option:
        """The option that ranks images by a score."""
        return Option(map=replace(self, method=replace(self.method, score=score, image_scores=(score,))))


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice: how maps are made, and which score ranks images."""

    map: MapOption

    @property
    def score(self) -> str:
        """The image score."""
        return self.map.method.score

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return f"{self.map.name}; by {self.score}"

    @property
    def usual(self) -> Usual:
        """What a bank remembers of it."""
        return Usual(preset="tuned", recipe=self.map.recipe, method=self.map.method)

    def preset(self, extraction: Extraction) -> Preset:
        """The preset that a new bank is made by; the rest of the extraction is as given."""
        stored = self.map.stored
        changed = replace(extraction, pool=stored.pool, pool_border=stored.pool_border, normalize=stored.normalize)
        return Preset(
            name="tuned",
            description="Chosen by spade-faiss tune.",
            recipe=self.map.recipe,
            extraction=changed,
            method=self.map.method,
        )


def default_option(levels: Sequence[str]) -> Option:
    """The preset `default`, for a network whose levels have these names, finest first."""
    preset = load_preset("default")
    usual = preset.usual(levels)
    return Option(map=MapOption(stored=Stored.of(preset.extraction), recipe=usual.recipe, method=usual.method))


def option_of(usual: Usual, layout: Layout) -> Option:
    """How a bank is made and searched."""
    return Option(map=MapOption(stored=Stored.of(layout), recipe=usual.recipe, method=usual.method))


def map_options(levels: Sequence[str], method: Method) -> list[MapOption]:
    """All ways to make maps that are tried, for a network whose levels have these names, finest first.

    Those that share what is stored follow each other, as they share a bank; what differs most from the default comes first, so
    that a small budget compares what matters most.

    Args:
        levels: the names of the network's levels.
        method: the settings that are not chosen.
    """
    plain, unit = Stored(), Stored(normalize="l2")
    pooled, pooled_unit = Stored(pool=3, pool_border="zero"), Stored(pool=3, pool_border="zero", normalize="l2")
    coarse = tuple(levels[1:3]) or tuple(levels)
    joined = ("+".join(coarse),)

    def searched(stored: Stored, recipe: str, chosen: tuple[str, ...], k: int | str) -> MapOption:
        return MapOption(stored=stored, recipe=recipe, method=replace(method, levels=chosen, k_gallery=k, k_image=5))

    found = [
        searched(pooled, "location", (), _MANY),
        searched(pooled, "global", joined, ALL),
        searched(pooled, "exact", (), 5),
        searched(pooled, "global", coarse, ALL),
        searched(plain, "exact", (), 5),
        searched(plain, "global", joined, ALL),
        searched(unit, "exact", (), 5),
        searched(unit, "location", (), _MANY),
        searched(unit, "global", joined, ALL),
        searched(pooled_unit, "exact", (), 5),
        searched(pooled_unit, "location", (), _MANY),
        searched(pooled_unit, "global", joined, ALL),
        searched(plain, "location", (), _MANY),
        searched(plain, "exact", (levels[0],), 5),
    ]
    return list(dict.fromkeys(found))


def within_few(option: MapOption, others: int) -> MapOption:
    """The option for pictures that have so many others: what asks for more neighbors searches them all."""
    return replace(option, method=of_few(option.method, others + 1))


def with_scores(maps: Sequence[MapOption]) -> list[Option]:
    """Each map with each image score that is made of it, and one option that ranks by the distance to the nearest normals."""
    found = [option.ranked_by(score) for option in maps for score in MAP_SCORES]
    nearest = next((option for option in maps if option.recipe == "exact" and option.stored.pool == 1), maps[0])
    return [*found, nearest.ranked_by("knn")]
