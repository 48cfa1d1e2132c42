"""Spoils: the same to the byte for a seed, with masks of exactly what was changed, on the object, of different kinds."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.spoil.foreground import Picture, find_object
from spade_faiss.spoil.kinds import KINDS
from spade_faiss.spoil.spoiling import EDGES, LEAST_CHANGE, SIZES, STRENGTHS, Spoil, plan_spoils, spoil

SIDE = 160


def disc(*, gray: bool = False, seed: int = 0) -> Picture:
    """A textured disc on a plain background."""
    y, x = np.mgrid[:SIDE, :SIDE]
    weave = 90 + 25 * np.sin(x / 3) + 20 * np.sin(y / 4) + np.random.default_rng(seed).normal(0, 6, (SIDE, SIDE))
    inside = np.hypot(y - SIDE / 2, x - SIDE / 2) < 60
    gains = (1.0, 1.0, 1.0) if gray else (1.2, 0.9, 0.6)
    colors = np.stack([np.where(inside, weave * gain, 235) for gain in gains], axis=-1)
    found: Picture = np.clip(colors, 0, 255).astype(np.uint8)
    return found


def texture() -> Picture:
    """A texture that fills the picture."""
    noise = np.random.default_rng(1).normal(0, 40, (SIDE, SIDE, 1))
    return np.clip(120 + noise + np.zeros(3), 0, 255).astype(np.uint8)


def of(kind: str, **changes: float) -> Spoil:
    return Spoil(**{"kind": kind, "size": 0.02, "strength": 0.8, "edge": 0.0, "seed": 5, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", EDGES)
def test_a_seed_decides_every_byte_and_the_mask_is_what_changed(kind: str, edge: float) -> None:
    picture, other = disc(), disc(seed=1)
    before = picture.copy()
    first, again = (spoil(picture, of(kind, edge=edge), other=other) for _ in range(2))
    assert first is not None
    assert again is not None
    assert first.picture.tobytes() == again.picture.tobytes()
    assert first.mask.tobytes() == again.mask.tobytes()
    np.testing.assert_array_equal(picture, before)
    change = np.abs(first.picture.astype(int) - picture).max(axis=2)
    np.testing.assert_array_equal(first.mask, change > 0)
    assert change[first.mask].min() >= LEAST_CHANGE
    seeds = [spoil(picture, of(kind, edge=edge, seed=seed), other=other) for seed in (6, 7)]
    assert any(found is not None and found.picture.tobytes() != first.picture.tobytes() for found in seeds)


def test_kinds_differ_and_none_is_what_it_was_not() -> None:
    """The bytes of one seed, so that a changed kind is noticed; by another NumPy or SciPy, rounding may be another."""
    found = {kind: spoil(disc(), of(kind), other=disc(seed=1)) for kind in KINDS}
    digests = {kind: hashlib.sha256(each.picture.tobytes()).hexdigest() for kind, each in found.items() if each is not None}
    assert set(digests) == set(KINDS)
    assert len(set(digests.values())) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_is_about_as_large_as_asked_for(kind: str) -> None:
    for size in (0.004, 0.03):
        areas = [spoil(texture(), of(kind, size=size, seed=seed)) for seed in range(8)]
        shares = [float(found.mask.mean()) for found in areas if found is not None]
        assert len(shares) >= 4
        assert size / 6 < np.median(shares) < 2.5 * size


@pytest.mark.parametrize("kind", ["blob", "color", "noise", "texture", "scratch"])
def test_a_stronger_defect_changes_more(kind: str) -> None:
    def change(strength: float) -> float:
        found = [spoil(texture(), of(kind, strength=strength, seed=seed)) for seed in range(6)]
        return float(np.mean([np.abs(each.picture.astype(float) - texture())[each.mask].mean() for each in found if each]))

    assert change(1.0) > 1.5 * change(0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_defects_stay_on_the_object(kind: str) -> None:
    picture = disc()
    on = find_object(picture)
    assert 0.35 < on.mean() < 0.55  # a disc of 60 pixels: 44 %
    for seed in range(4):
        found = spoil(picture, of(kind, seed=seed, edge=0.3), other=disc(seed=1))
        assert found is None or not (found.mask & ~on).any()
    corner = np.zeros((SIDE, SIDE), np.bool_)
    corner[60:100, 60:100] = True
    found = spoil(picture, of(kind), on=corner, other=disc(seed=1))
    assert found is None or not (found.mask & ~corner).any()


def test_a_texture_has_no_background() -> None:
    assert find_object(texture()).all()
    assert find_object(np.full((40, 60, 3), 7, np.uint8)).all()
    ramp = np.repeat(np.linspace(60, 100, SIDE).astype(np.uint8)[None, :, None], SIDE, axis=0).repeat(3, axis=2)
    assert find_object(ramp).all()  # how a surface is lit is no object


@pytest.mark.parametrize("kind", KINDS)
def test_a_gray_picture_gets_no_color(kind: str) -> None:
    for seed in range(3):
        found = spoil(disc(gray=True), of(kind, seed=seed), other=disc(gray=True, seed=1))
        assert found is None or (found.picture == found.picture[..., :1]).all()


def test_what_shows_nothing_is_not_made() -> None:
    plain = np.full((SIDE, SIDE, 3), 90, np.uint8)
    assert spoil(plain, of("blur")) is None
    assert spoil(plain, of("moved")) is None
    assert spoil(plain, of("blob")) is not None
    assert spoil(plain, of("blob"), on=np.zeros((SIDE, SIDE), np.bool_)) is None


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="kind="):
        of("rust")
    with pytest.raises(InputError, match="size="):
        of("blob", size=0.0)
    with pytest.raises(InputError, match="strength="):
        of("blob", strength=1.5)
    with pytest.raises(InputError, match="must be"):
        spoil(np.zeros((4, 4), np.uint8), of("blob"))
    with pytest.raises(InputError, match="expected bool"):
        spoil(disc(), of("blob"), on=np.ones((3, 3), np.bool_))


def test_a_plan_shares_kinds_sizes_strengths_and_edges_out() -> None:
    plans = plan_spoils(20, 13, seed=4)
    assert [len(each) for each in plans] == [13] * 20
    spoils = [each for plan in plans for each in plan]
    assert set(Counter(each.kind for each in spoils).values()) == {20}
    for low, high in SIZES:
        assert sum(low <= each.size < high for each in spoils) == 65
    for low, high in STRENGTHS:
        assert abs(sum(low <= each.strength < high for each in spoils) - 260 / 3) < 1
    assert Counter(each.edge for each in spoils) == dict.fromkeys(EDGES, 130)
    assert len({each.seed for each in spoils}) == 260
    assert plan_spoils(20, 13, seed=4) == plans != plan_spoils(20, 13, seed=5)
