"""Spoils copies of normal pictures: deterministic for a seed, with masks of exactly what was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least, check_choice
from spade_faiss.spoil.foreground import Mask, Picture, find_object
from spade_faiss.spoil.kinds import KINDS, Box, Scene
from spade_faiss.spoil.shapes import soften

# Sizes as shares of the picture's area: from a cell of a network's second level, 8 x 8 of 224 x 224 pixels, to a part of the
# object. Each stratum spans a factor of about three, so that neither small nor large defects decide alone.
SIZES = ((0.001, 0.004), (0.004, 0.012), (0.012, 0.035), (0.035, 0.1))
STRENGTHS = ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0))
# The width of the edge as a share of the diameter: sharp, and soft.
EDGES = (0.0, 0.3)
# A change of fewer gray levels is not seen, and is not made.
LEAST_CHANGE = 4
_TRIES = 12
_LEAST_SHARE = 0.2  # of the area that was asked for: a spoil of which less is visible is drawn elsewhere
_LEAST_PIXELS = 6
_LEAST_MEAN = 9.0  # gray levels that the changed pixels differ by, on average


@dataclass(frozen=True, kw_only=True)
class Spoil:
    """How a picture is spoilt.

    Args:
        kind: one of `KINDS`.
        size: the share of the picture's pixels that the defect takes, about.
        strength: from 0, just visible, to 1, plain.
        edge: the width of its edge as a share of its diameter; 0 is sharp.
        seed: decides all else.
    """

    kind: str
    size: float
    strength: float
    edge: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(KINDS))
        check_at_least("seed", self.seed, 0)
        for name, value, most in (("size", self.size, 0.5), ("strength", self.strength, 1.0), ("edge", self.edge, 1.0)):
            if not 0 <= value <= most or (name == "size" and value == 0):
                raise InputError(f"{name}={value!r} must be a number from 0 to {most:g}")


@dataclass(frozen=True, eq=False)
class Spoilt:
    """A spoilt copy: (H, W, 3) uint8, and (H, W), True where it differs from the picture that it was made of."""

    picture: Picture
    mask: Mask


def spoil(picture: Picture, how: Spoil, *, on: Mask | None = None, other: Picture | None = None) -> Spoilt | None:
    """Spoil a copy of a picture, on its object.

    Args:
        picture: (H, W, 3) uint8; it is left as it is.
        how: what is done.
        on: (H, W), where a defect may lie; None for the object, see `find_object`.
        other: another normal picture, which pieces are cut from; None for the same one.

    Returns:
        The copy; None where a dozen places show no visible change, such as a blur of what has no structure.

    Raises:
        InputError: for a picture or a mask of another shape or type.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise InputError(f"a picture must be (height, width, 3) of uint8, got {picture.shape} of {picture.dtype}")
    if on is None:
        on = find_object(picture)
    if on.dtype != np.bool_ or on.shape != picture.shape[:2]:
        raise InputError(f"on is {on.dtype} of shape {on.shape}, expected bool of shape {picture.shape[:2]}")
    places = np.flatnonzero(on)
    if not len(places):
        return None
    rng = np.random.default_rng([how.seed, sorted(KINDS).index(how.kind)])
    is_gray = bool((picture[..., :1] == picture).all())
    for _ in range(_TRIES):
        y, x = divmod(int(places[rng.integers(len(places))]), picture.shape[1])
        found = _draw(rng, _Ground(picture, picture if other is None else other, on, is_gray), how, (y, x))
        if found is not None:
            return found
    return None


@dataclass(frozen=True, eq=False)
class _Ground:
    """What is spoilt: the picture, another one, where defects may lie, and whether it has no colors."""

    picture: Picture
    other: Picture
    on: Mask
    is_gray: bool


def _draw(rng: np.random.Generator, ground: _Ground, how: Spoil, at: tuple[int, int]) -> Spoilt | None:
    """Spoil at a pixel; None where too little of it shows."""
    picture, on = ground.picture, ground.on
    kind, area = KINDS[how.kind], how.size * picture.shape[0] * picture.shape[1]
    shape = kind.shape(rng, area)
    alpha = soften(shape, how.edge * 2 * math.sqrt(area / math.pi))
    box, part = _placed(alpha.shape, at, picture.shape)
    scene = Scene(box=box, strength=how.strength, **vars(ground))
    colors, opacity = kind.draw(rng, scene)
    before = scene.window
    blend = before + (colors - before) * (alpha[part] * on[box] * np.float32(opacity))[..., None]
    after = np.clip(np.rint(blend), 0, 255).astype(np.uint8)
    change = np.abs(after.astype(np.int16) - picture[box]).max(axis=2)
    changed = change >= LEAST_CHANGE
    count = int(changed.sum())
    if count < max(_LEAST_PIXELS, _LEAST_SHARE * min(area, float(shape.sum()))) or float(change[changed].mean()) < _LEAST_MEAN:
        return None
    spoilt, mask = picture.copy(), np.zeros(picture.shape[:2], np.bool_)
    spoilt[box][changed] = after[changed]
    mask[box] = changed
    return Spoilt(spoilt, mask)


def _placed(size: tuple[int, ...], at: tuple[int, int], whole: tuple[int, ...]) -> tuple[Box, Box]:
    """Where a window lies in the picture whose center is at a pixel, and which part of the window that is."""
    inside, part = [], []
    for side, center, most in zip(size, at, whole, strict=False):
        start = center - side // 2
        inside.append(slice(max(0, start), min(most, start + side)))
        part.append(slice(inside[-1].start - start, inside[-1].stop - start))
    return (inside[0], inside[1]), (part[0], part[1])


def plan_spoils(pictures: int, each: int, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> list[list[Spoil]]:
    """Plan `each` spoils of every one of some pictures: kinds, sizes, strengths and edges are shared out evenly.

    Args:
        pictures: the number of pictures.
        each: the number of spoils of each.
        seed: decides the draw.
        kinds: the kinds to choose among.
    """
    check_at_least("pictures", pictures, 0)
    check_at_least("each", each, 1)
    rng, total = np.random.default_rng([seed, 0x5B01]), pictures * each

    def deck(count: int) -> list[int]:
        """Every value as often as any other, give or take one, in random order."""
        return [int(value) for value in rng.permutation(np.arange(total) % count)]

    drawn = zip(deck(len(kinds)), deck(len(SIZES)), deck(len(STRENGTHS)), deck(len(EDGES)), strict=True)
    found = []
    for number, (kind, size, strength, edge) in enumerate(drawn):
        low, high = SIZES[size]
        found.append(
            Spoil(
                kind=kinds[kind],
                size=float(low * (high / low) ** rng.random()),
                strength=float(rng.uniform(*STRENGTHS[strength])),
                edge=EDGES[edge],
                seed=seed * 1_000_003 + number,
            )
        )
    return [found[start : start + each] for start in range(0, total, each)]
