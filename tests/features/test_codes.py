"""Codes of maps: what they keep of distances, what they are rounded to, and what a bank's codes must be like."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.roi import Roi
from spade_faiss.core.store import MOST_TURNED, Store
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.code_losses import LevelLoss, measure_losses
from spade_faiss.features.codes import LevelCodes, check_codes, learn_codes, learning_bytes
from spade_faiss.features.layout import Layout, prepare
from tests.support.oracle import sq_distances
from tests.support.vectors import brute

FINE, COARSE = Level("fine", 12, 4, 6, 5), Level("coarse", 5, 8, 3, 3)
LAYOUT = Layout(levels=(FINE, COARSE), embedding_dim=4, input_size=(24, 20), dtype="int8", numbers=6)
Doubles = npt.NDArray[np.float64]


def pictures(count: int, seed: int = 0) -> FeatureBatch:
    """Maps that vary in a few directions, as those of a network do, and a little in all others."""
    rng, levels = np.random.default_rng(seed), {}
    for level in (FINE, COARSE):
        mixing = np.random.default_rng(level.channels).standard_normal((4, level.channels))
        latent = rng.standard_normal((count, level.height, level.width, 4)) * [8, 4, 2, 1]
        levels[level.name] = (3 + latent @ mixing + 0.1 * rng.standard_normal((count, *level.shape))).astype(np.float32)
    return FeatureBatch([f"{seed}-{n}" for n in range(count)], rng.standard_normal((count, 4), np.float32), levels)


def learned(count: int = 6) -> tuple[FeatureBatch, dict[str, LevelCodes]]:
    batch = prepare(pictures(count), LAYOUT)
    return batch, dict(learn_codes(batch, LAYOUT).levels)


@pytest.mark.parametrize(
    "name", ["float16", "float32", "int8", "pca2-int8", "pca1024-int8", "pca7,40,56-int8", "int2", "int6", "pca64-int4"]
)
def test_a_store_is_named_as_it_is_asked_for(name: str) -> None:
    assert str(Store.parse(name)) == name
    assert Extraction(store=name).store == name


@pytest.mark.parametrize(
    "name",
    [
        "float64",
        "pca-int8",
        "pca1-int8",
        "pca1025-int8",
        "pca64",
        "pca6.4-int8",
        "PCA64-int8",
        "pca8,-int8",
        "pca8,1-int8",
        "",
        "int7",
        "int1",
        "int16",
        "pca8-int7",
    ],
)
def test_another_name_of_a_store_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not one of float16, float32, int8, int2 to int6, or one of the codes after pcaN-"):
        Extraction(store=name)


def test_levels_have_as_many_numbers_as_codes_store() -> None:
    assert [(level.channels, level.extracted) for level in LAYOUT.levels] == [(6, 12), (5, None)]
    assert LAYOUT.whole_levels == (FINE, COARSE)
    assert [level.shape for level in LAYOUT.levels] == [FINE.shape, COARSE.shape]
    assert [level.stored_shape for level in LAYOUT.levels] == [(6, 5, 6), (3, 3, 5)]
    assert LAYOUT.image_bytes == 4 * 4 + 6 * 5 * 6 + 3 * 3 * 5
    # What is given with codes already is the same, and can be changed back.
    assert replace(LAYOUT, levels=LAYOUT.levels) == LAYOUT
    assert replace(LAYOUT, dtype="float16", numbers=None).levels == (FINE, COARSE)
    # One for all, or one for each.
    assert str(LAYOUT.store) == "pca6-int8"
    each = replace(LAYOUT, numbers=(3, 4))
    assert [level.channels for level in each.levels] == [3, 4]
    assert str(each.store) == "pca3,4-int8"
    assert replace(LAYOUT, numbers=Store.parse("pca6-int8").numbers) == LAYOUT
    with pytest.raises(InputError, match=r"numbers=\(3, 4, 5\) has 3 values for 2 levels; give one for each, or one for all"):
        replace(LAYOUT, numbers=(3, 4, 5))


def test_packed_codes_take_the_bytes_that_their_bits_fill() -> None:
    packed = replace(LAYOUT, numbers=None, bits=3)
    assert [(level.channels, level.packed_bytes) for level in packed.levels] == [(12, 5), (5, 2)]  # 36 and 15 bits
    assert [level.stored_shape for level in packed.levels] == [(6, 5, 5), (3, 3, 2)]
    assert (packed.stored_dtype, LAYOUT.stored_dtype, str(packed.store)) == ("uint8", "int8", "int3")
    assert packed.image_bytes == 4 * 4 + 6 * 5 * 5 + 3 * 3 * 2
    assert packed.whole_levels == (FINE, COARSE)
    assert replace(packed, bits=None, dtype="float16").levels == (FINE, COARSE)
    both = replace(LAYOUT, bits=3)
    assert [(level.channels, level.extracted, level.packed_bytes) for level in both.levels] == [(6, 12, 3), (5, None, 2)]


@pytest.mark.parametrize(
    ("channels", "side", "store"),
    [(64, 28, "int4"), (64, 28, "int8"), (64, 28, "pca16-int4"), (256, 14, "int4"), (384, 7, "int4")],
)
def test_learning_takes_as_much_memory_as_is_planned(channels: int, side: int, store: str) -> None:
    level, n = Level("level", channels, 4, side, side), 20
    layout = Layout(levels=(level,), embedding_dim=4, input_size=(4 * side, 4 * side), **vars(Store.parse(store)))
    maps = np.random.default_rng(0).standard_normal((n, side, side, channels), np.float32)
    batch = FeatureBatch([str(number) for number in range(n)], np.zeros((n, 4), np.float32), {"level": maps})
    tracemalloc.start()
    measure_losses(batch, learn_codes(batch, layout))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    planned = learning_bytes(layout, n)
    assert 0.5 * planned < most < 1.02 * planned


def test_levels_of_very_many_channels_are_not_turned_whole() -> None:
    """The basis would take their square; where directions are left out, or nothing is turned, there may be more of them."""
    wide = Layout(levels=(replace(FINE, channels=MOST_TURNED + 1),), embedding_dim=4, input_size=(24, 20), dtype="int8")
    with pytest.raises(InputError, match=r"has 2049 channels, .* at most 2048 .*: --store pca1024-int4, or fewer"):
        replace(wide, bits=4)
    assert replace(wide, bits=4, numbers=1024).levels[0].packed_bytes == 512
    assert replace(wide, bits=4, levels=(replace(FINE, channels=MOST_TURNED),)).levels[0].packed_bytes == MOST_TURNED // 2


def test_numbers_without_codes_and_beyond_their_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"numbers=\(6, 6\) is of codes, and dtype='float16' stores none"):
        replace(LAYOUT, dtype="float16")
    with pytest.raises(InputError, match="numbers=1 must be an integer of at least 2"):
        replace(LAYOUT, numbers=1)
    with pytest.raises(InputError, match="numbers=1025 is more than a code has, 1024"):
        replace(LAYOUT, numbers=1025)
    for changes, message in (
        ({"dtype": "float32", "numbers": None, "bits": 4}, "bits=4 is of codes, and dtype='float32' stores none"),
        ({"bits": 1}, "bits=1 must be an integer of at least 2"),
        ({"bits": 7}, "bits=7 is more than a packed number takes on average, 6"),
    ):
        with pytest.raises(InputError, match=message):
            replace(LAYOUT, **changes)
    with pytest.raises(InputError, match="extracted=12 must be an integer of at least 13"):
        replace(FINE, extracted=12)


def test_a_level_of_few_channels_is_not_shortened() -> None:
    batch, codes = learned()
    assert codes["coarse"].basis is None
    assert codes["fine"].basis is not None
    assert codes["fine"].basis.shape == (5, 12)
    found = codes["coarse"].decode(codes["coarse"].encode(batch.levels["coarse"])) + codes["coarse"].center
    # Half a step of each channel at most, which is a 200th of the largest number.
    assert (np.abs(found - batch.levels["coarse"]) <= 0.5001 * codes["coarse"].scale).all()


def test_the_same_pictures_give_the_same_codes_whatever_else_is_in_a_batch() -> None:
    batch, codes = learned()
    for name, again in learn_codes(batch, LAYOUT).levels.items():
        for part, array in vars(again).items():
            np.testing.assert_array_equal(getattr(codes[name], part), array)
        maps = batch.levels[name]
        together, alone = codes[name].query(maps), [codes[name].query(maps[place : place + 1]) for place in range(len(maps))]
        np.testing.assert_array_equal(np.concatenate(alone), together)
        np.testing.assert_array_equal(codes[name].query(maps.reshape(len(maps), -1, maps.shape[-1])).ravel(), together.ravel())


def test_shortening_makes_no_distance_larger_and_keeps_what_varies() -> None:
    batch, codes = learned()
    x = batch.levels["fine"].reshape(-1, 12)
    true, short = (
        brute(x[:40], x),
        brute(codes["fine"].numbers(x[:40]).astype(np.float32), codes["fine"].numbers(x).astype(np.float32)),
    )
    assert (short <= true * (1 + 1e-4) + 1e-3).all()
    # Four directions hold nearly all that varies, and the lengths of the rests some of what they do not.
    assert short.sum() > 0.98 * true.sum()
    parts = codes["fine"].numbers(x)[:, :-1].astype(np.float32)
    assert (brute(parts[:40], parts) <= short * (1 + 1e-4) + 1e-3).all()


def test_what_was_stored_is_what_is_asked_unless_it_was_cut_off() -> None:
    batch, codes = learned()
    for name, of in codes.items():
        stored = of.encode(batch.levels[name])
        assert stored.dtype == np.int8
        assert np.abs(stored.astype(int)).max() <= 127
        assert of.cut_off(batch.levels[name]) == 0
        np.testing.assert_array_equal(of.decode(stored), of.query(batch.levels[name]))


@given(st.floats(2, 1e3))
def test_a_query_is_not_cut_off(factor: float) -> None:
    """However far a vector lies from all that was learned from, its distances say so."""
    batch, codes = learned()
    far = (batch.levels["coarse"][:1] * np.float32(factor * 10)).astype(np.float32)
    of = codes["coarse"]
    assert of.cut_off(far) > 0
    np.testing.assert_allclose(of.query(far) + of.center, far, atol=float(of.scale.max()), rtol=1e-4)
    assert np.abs(of.encode(far).astype(int)).max() == 127


@pytest.mark.parametrize(("bits", "numbers"), [(2, None), (4, None), (6, None), (3, 6)])
def test_packed_codes_keep_what_their_bits_hold(bits: int, numbers: int | None) -> None:
    """A vector is off by half a step in each number, those that are cut off aside; more bits leave less of an error."""
    layout = replace(LAYOUT, bits=bits, numbers=numbers)
    batch = prepare(pictures(6), layout)
    errors = {}
    for level in layout.levels:
        codes, maps = learn_codes(batch, layout).levels[level.name], batch.levels[level.name]
        check_codes(codes, level)
        assert codes.bits is not None
        stored = codes.encode(maps)
        assert (stored.dtype, stored.shape) == (np.dtype(np.uint8), (6, level.height, level.width, level.packed_bytes))
        numbers_of, found = codes.numbers(maps), codes.decode(stored)
        inside = np.abs(numbers_of) <= codes.scale * (1 << codes.bits.astype(int))
        assert inside.mean() > 0.999
        assert (np.abs(found - numbers_of) <= 1.0001 * codes.scale)[inside].all()
        # A query is rounded to the same numbers, and not cut off.
        query = codes.query(maps)
        np.testing.assert_array_equal(query[inside], found[inside])
        assert (np.abs(query - numbers_of) <= 1.0001 * codes.scale).all()
        assert codes.cut_off(maps) == pytest.approx(np.mean(query != found))
        # Numbers that vary more have more bits.
        spread = numbers_of.reshape(-1, len(codes.bits)).std(axis=0)
        assert (np.diff(codes.bits[np.argsort(spread)].astype(int)) >= -1).all()
        errors[level.name] = np.square(found - numbers_of).sum() / np.square(numbers_of).sum()
    assert all(error < {2: 0.25, 3: 0.1, 4: 0.02, 6: 0.001}[bits] for error in errors.values()), errors


def test_margins_of_a_letterbox_are_not_learned_from() -> None:
    """Their vectors are alike, and far from all others: they would take directions and bits that tell nothing."""
    layout = replace(LAYOUT, bits=4, numbers=None)
    plain = prepare(pictures(6), layout)
    valid = np.zeros((6, 24, 20), np.bool_)
    valid[:, :, 4:] = True  # of the fine level, the first column of cells is margin
    maps = {name: of.copy() for name, of in plain.levels.items()}
    for of in maps.values():
        of[:, :, 0] = 1000
    shown = replace(plain, levels={name: of[:, :, 1:] for name, of in maps.items()})
    narrow = tuple(replace(level, width=level.width - 1) for level in layout.levels)
    expected = learn_codes(shown, replace(layout, levels=narrow))
    found = learn_codes(replace(plain, levels=maps, valid=valid), layout).levels["fine"]
    for part, array in vars(expected.levels["fine"]).items():
        np.testing.assert_array_equal(getattr(found, part), array)
    # An image that shows nothing is left out; where none shows anything, all are learned from.
    valid[0] = False
    learn_codes(replace(plain, levels=maps, valid=valid), layout)
    nothing = learn_codes(replace(plain, valid=np.zeros_like(valid)), layout)
    np.testing.assert_array_equal(nothing.levels["fine"].center, learn_codes(plain, layout).levels["fine"].center)


def test_margins_inside_of_a_region_of_interest_are_not_learned_from() -> None:
    mask = np.ones((24, 20), np.bool_)
    mask[20:] = False  # of the fine level, the last row of cells is not inspected
    layout = replace(LAYOUT, bits=4, numbers=None, roi=Roi.of(mask))
    valid = np.zeros((6, 24, 20), np.bool_)
    valid[:, :, 4:] = True  # and the first column is margin
    batch = pictures(6)
    with_margins = {name: maps.copy() for name, maps in batch.levels.items()}
    for maps in with_margins.values():
        maps[:, :, 0] = 1000
    found = learn_codes(prepare(replace(batch, levels=with_margins, valid=valid), layout), layout).levels["fine"]
    level = Level("fine", 12, 4, 5, 4)
    shown = replace(batch, levels={"fine": batch.levels["fine"][:, :5, 1:]})
    expected = learn_codes(shown, Layout(levels=(level,), embedding_dim=4, input_size=(20, 16), dtype="int8", bits=4))
    for part, array in vars(expected.levels["fine"]).items():
        np.testing.assert_array_equal(getattr(found, part), array)


def test_a_full_basis_keeps_distances() -> None:
    layout = replace(LAYOUT, bits=4, numbers=None)
    batch = prepare(pictures(6), layout)
    codes, x = learn_codes(batch, layout).levels["fine"], batch.levels["fine"].reshape(-1, 12)
    turned = codes.numbers(x).astype(np.float32)
    assert turned.shape == x.shape
    np.testing.assert_allclose(brute(turned[:40], turned), brute(x[:40], x), rtol=1e-4, atol=1e-3)


def test_vectors_that_do_not_vary_have_codes() -> None:
    batch = pictures(3)
    for value in (0.0, 5.0):
        flat = replace(batch, levels={name: np.full_like(maps, value) for name, maps in batch.levels.items()})
        codes = learn_codes(prepare(flat, LAYOUT), LAYOUT)
        for level in LAYOUT.levels:
            check_codes(codes.levels[level.name], level)
            assert not codes.levels[level.name].encode(flat.levels[level.name]).any()
            assert np.isfinite(codes.levels[level.name].query(batch.levels[level.name])).all()


def test_numbers_that_do_not_vary_take_no_bits_from_others() -> None:
    layout = replace(LAYOUT, numbers=None, bits=4)
    batch = pictures(6)
    for shared in ([], [0, 1, 2, 3]):
        maps = np.zeros_like(batch.levels["fine"])
        maps[..., shared] = batch.levels["fine"][..., shared]
        part = replace(batch, levels={"fine": maps, "coarse": batch.levels["coarse"]})
        of, level = learn_codes(prepare(part, layout), layout).levels["fine"], layout.levels[0]
        check_codes(of, level)
        assert of.bits is not None
        # Steps are never so short that what lies elsewhere would be more of them than float32 holds.
        assert of.scale.min() > 1e-10
        varies = np.abs(of.numbers(maps)).max(axis=(0, 1, 2)) > 1e-3
        assert varies.sum() == len(shared)
        if shared:
            assert of.bits[varies].min() > of.bits[~varies].max()
        np.testing.assert_array_equal(of.decode(of.encode(maps)), of.query(maps))
        far = replace(batch, levels={"fine": maps + 7, "coarse": batch.levels["coarse"]}).levels["fine"]
        assert np.linalg.norm(of.query(far) - of.query(maps), axis=-1).max() == pytest.approx(7 * np.sqrt(12), rel=5e-2)


@pytest.mark.parametrize("bits", [2, 6])
@pytest.mark.parametrize("size", [1e-30, 1e14])
def test_packed_codes_of_very_small_and_very_large_numbers(size: float, bits: int) -> None:
    """They lose as much as those of usual numbers, of their size."""
    layout, lost = replace(LAYOUT, numbers=None, bits=bits), []
    for factor in (1.0, size):
        batch = pictures(4)
        sized = replace(batch, levels={name: (maps * factor).astype(np.float32) for name, maps in batch.levels.items()})
        of = learn_codes(prepare(sized, layout), layout).levels["fine"]
        check_codes(of, layout.levels[0])
        maps = sized.levels["fine"]
        assert of.cut_off(maps) <= 1e-3
        lost.append(np.abs(of.decode(of.encode(maps)) - of.numbers(maps)).max() / factor)
    assert lost[1] == pytest.approx(lost[0], rel=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e14])
def test_codes_of_very_small_and_very_large_numbers(size: float) -> None:
    batch = pictures(4)
    sized = replace(batch, levels={name: (maps * size).astype(np.float32) for name, maps in batch.levels.items()})
    codes = learn_codes(prepare(sized, LAYOUT), LAYOUT)
    for level in LAYOUT.levels:
        of, maps = codes.levels[level.name], sized.levels[level.name]
        check_codes(of, level)
        # As exact, to its own scale, as those of usual numbers are.
        assert np.abs(of.decode(of.encode(maps)) - of.numbers(maps)).max() <= 0.5001 * of.scale.max()
        assert of.scale.max() < size


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"center": np.zeros(11, np.float32)}, "center of level 'fine' is"),
    ({"center": np.zeros(12)}, "center of level 'fine' is"),
    ({"center": np.full(12, np.nan, np.float32)}, "not finite"),
    ({"center": np.full(12, 1e17, np.float32)}, "beyond"),
    ({"basis": None}, "basis of level 'fine' is None"),
    ({"basis": np.zeros((5, 12), np.float32)}, "orthonormal"),
    ({"basis": np.full((5, 12), np.nan, np.float32)}, "orthonormal"),
    ({"basis": np.ones((5, 12), np.float32)}, "orthonormal"),
    ({"basis": np.eye(6, 12, dtype=np.float32)}, "basis of level 'fine' is"),
    ({"scale": np.ones(5, np.float32)}, "scale of level 'fine' is"),
    ({"scale": np.zeros(6, np.float32)}, "must be above 0"),
    ({"scale": np.full(6, np.inf, np.float32)}, "must be above 0"),
    ({"scale": np.full(6, np.nan, np.float32)}, "must be above 0"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_codes_that_no_bank_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    _, codes = learned()
    check_codes(codes["fine"], LAYOUT.levels[0])
    with pytest.raises(InputError, match=message):
        check_codes(replace(codes["fine"], **changes), LAYOUT.levels[0])


def test_losses_say_what_brute_force_says() -> None:
    batch, _ = learned()
    codes = learn_codes(batch, LAYOUT)
    fine, coarse = measure_losses(batch, codes)
    assert (fine.level, coarse.level) == ("fine", "coarse")
    assert (fine.cut_off, coarse.cut_off, coarse.kept) == (0, 0, 1)
    of, maps = codes.levels["coarse"], batch.levels["coarse"].reshape(6, 9, 5)
    coded, right = of.query(maps), []
    for one in range(6):
        others = np.arange(6) != one
        for place in range(9):
            true = sq_distances(maps[others].reshape(-1, 5), maps[one, place])
            found = sq_distances(coded[others].reshape(-1, 5), coded[one, place]).argmin()
            right.append(true[found] ** 0.5 <= 1.05 * true.min() ** 0.5)
    assert coarse.found == pytest.approx(np.mean(right))
    assert 0.99 < coarse.correlation <= 1
    x = batch.levels["fine"].reshape(-1, 12) - codes.levels["fine"].center
    basis = codes.levels["fine"].basis
    assert basis is not None
    assert fine.kept == pytest.approx(np.square(x @ basis.T).sum() / np.square(x).sum(), abs=1e-5)


def test_a_loss_needs_two_pictures() -> None:
    batch, _ = learned()
    codes = learn_codes(batch, LAYOUT)
    assert measure_losses(batch[:1], codes) == ()
    views = replace(batch, pictures=["one"] * 6)
    assert measure_losses(views, codes) == ()
    assert len(measure_losses(replace(batch, pictures=["one"] * 3 + ["two"] * 3), codes)) == 2


@pytest.mark.parametrize("changes", [{"found": 1.5}, {"correlation": float("nan")}, {"kept": -2.0}])
def test_a_loss_that_is_no_share_is_refused(changes: dict[str, float]) -> None:
    loss = LevelLoss(level="fine", kept=0.9, cut_off=0, found=0.9, correlation=0.9)
    with pytest.raises(InputError, match="the loss of level 'fine' holds"):
        replace(loss, **changes)  # type: ignore[arg-type]
