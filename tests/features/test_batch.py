"""Preparing features: pooling and normalizing by hand-computed numbers, and everything that must be refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess, Source
from spade_faiss.features.batch import FeatureBatch, Level, concatenate
from spade_faiss.features.layout import Layout, prepare

FINE = Level("fine", channels=2, stride=4, height=3, width=4)
COARSE = Level("coarse", channels=3, stride=8, height=2, width=2)


def layout(*, dtype: str = "float32", normalize: str = "none", pool: int = 1) -> Layout:
    return Layout(levels=(FINE, COARSE), embedding_dim=5, input_size=(12, 16), dtype=dtype, normalize=normalize, pool=pool)


def batch(n: int = 2, seed: int = 0, /, **changes: Any) -> FeatureBatch:
    rng = np.random.default_rng(seed)
    made = FeatureBatch(
        [f"image {row}" for row in range(n)],
        rng.standard_normal((n, 5), np.float32),
        {level.name: rng.standard_normal((n, *level.shape), np.float32) for level in (FINE, COARSE)},
    )
    return replace(made, **changes)


def one_level(values: npt.NDArray[Any], **settings: Any) -> npt.NDArray[Any]:
    """Prepare a single map (H, W, C) and return it."""
    height, width, channels = values.shape
    level = Level("x", channels=channels, stride=1, height=height, width=width)
    made = Layout(levels=(level,), embedding_dim=1, input_size=(height, width), **{"dtype": "float32", **settings})
    prepared = prepare(FeatureBatch(["i"], np.zeros((1, 1), np.float32), {"x": values[np.newaxis]}), made)
    return np.asarray(prepared.levels["x"][0])


def test_pooling_averages_the_neighbors_that_exist() -> None:
    values = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], np.float32)
    pooled = one_level(np.stack([values, -10 * values], axis=-1), pool=3)
    # (1 + 2 + 5 + 6) / 4 in the corner, (1 + 2 + 3 + 5 + 6 + 7) / 6 at the edge, the mean of nine inside.
    expected = np.array([[3.5, 4, 5, 5.5], [5.5, 6, 7, 7.5], [7.5, 8, 9, 9.5]], np.float32)
    np.testing.assert_allclose(pooled[..., 0], expected, rtol=1e-6)
    np.testing.assert_allclose(pooled[..., 1], -10 * expected, rtol=1e-6)


def test_a_neighborhood_larger_than_the_map_averages_all_of_it() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    np.testing.assert_allclose(one_level(values, pool=7), np.full((2, 3, 1), 2.5), rtol=1e-6)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)),
        elements=st.floats(-100, 100, width=32),
    ),
    st.sampled_from([1, 3, 5]),
)
def test_pooling_is_the_mean_over_the_window(values: npt.NDArray[np.float32], pool: int) -> None:
    assume(pool <= 2 * max(values.shape[:2]) + 1)  # larger ones are refused
    reach = pool // 2
    expected = np.empty(values.shape)
    for y, x in np.ndindex(values.shape[:2]):
        window = values[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].astype(np.float64)
        expected[y, x] = window.mean(axis=(0, 1))
    np.testing.assert_allclose(one_level(values, pool=pool), expected, rtol=1e-5, atol=1e-5)


def test_l2_scales_each_location_to_unit_length_and_leaves_zero_vectors() -> None:
    values = np.array([[[3, 4], [0, 0]], [[-5, 12], [1e-3, 0]]], np.float32)
    scaled = one_level(values, normalize="l2")
    expected = np.array([[[0.6, 0.8], [0, 0]], [[-5 / 13, 12 / 13], [1, 0]]])
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


@given(
    direction=hnp.arrays(np.float32, 4, elements=st.floats(-1, 1, width=32)),
    exponent=st.integers(-30, 16),
)
def test_l2_takes_vectors_of_any_length(direction: npt.NDArray[np.float32], exponent: int) -> None:
    # Squares of values below 1e-22 leave float32: norms must not be computed in it.
    direction = np.round(direction, 3)
    values = (direction * np.float32(10.0**exponent)).reshape(1, 1, 4)
    length = float(np.linalg.norm(one_level(values, normalize="l2").astype(np.float64)))
    assert length == pytest.approx(1.0 if direction.any() else 0.0, abs=1e-5)


def test_pooling_comes_before_normalizing() -> None:
    values = np.array([[[1, 0], [0, 3]]], np.float32)
    expected = np.array([0.5, 1.5]) / np.hypot(0.5, 1.5)
    np.testing.assert_allclose(one_level(values, pool=3, normalize="l2"), np.array([[expected, expected]]), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("given", ["float16", "float32", "float64", ">f4"])
def test_what_is_stored_is_the_given_value_rounded_to_the_layouts_dtype(dtype: str, given: str) -> None:
    source = batch()
    levels = {name: maps.astype(given) for name, maps in source.levels.items()}
    prepared = prepare(replace(source, levels=levels, embedding=source.embedding.astype(given)), layout(dtype=dtype))
    assert prepared.embedding.dtype == np.float32
    np.testing.assert_array_equal(prepared.embedding, source.embedding.astype(given).astype(np.float32))
    for name, maps in levels.items():
        assert prepared.levels[name].dtype == dtype
        np.testing.assert_array_equal(prepared.levels[name], maps.astype(np.float32).astype(dtype))


def test_prepared_arrays_are_contiguous_whatever_came() -> None:
    """FAISS takes (H * W, C) blocks as they are: channels-first views and strided slices must come out channels last."""
    source = batch()
    levels = {
        "fine": np.ascontiguousarray(source.levels["fine"].transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
        "coarse": np.repeat(source.levels["coarse"], 2, axis=3)[..., ::2],
    }
    embedding = np.asfortranarray(source.embedding)
    for dtype in ("float16", "float32"):
        prepared = prepare(replace(source, levels=levels, embedding=embedding), layout(dtype=dtype))
        assert prepared.embedding.flags.c_contiguous
        np.testing.assert_array_equal(prepared.embedding, source.embedding)
        for name in levels:
            assert prepared.levels[name].flags.c_contiguous
            np.testing.assert_array_equal(prepared.levels[name], source.levels[name].astype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("pool", [1, 3])
def test_the_callers_arrays_stay_as_they_are(dtype: str, normalize: str, pool: int) -> None:
    source = batch(3)
    before = copy.deepcopy(source)
    for array in (source.embedding, *source.levels.values()):
        array.flags.writeable = False
    prepare(source, layout(dtype=dtype, normalize=normalize, pool=pool))
    np.testing.assert_array_equal(source.embedding, before.embedding)
    for name in before.levels:
        np.testing.assert_array_equal(source.levels[name], before.levels[name])


@given(st.integers(1, 5), st.integers(0, 4), st.sampled_from(["none", "l2"]), st.sampled_from([1, 3]))
def test_an_images_features_do_not_depend_on_the_rest_of_its_batch(n: int, row: int, normalize: str, pool: int) -> None:
    row %= n
    source = batch(n)
    alone = FeatureBatch(
        [source.ids[row]], source.embedding[row : row + 1], {k: v[row : row + 1] for k, v in source.levels.items()}
    )
    wanted = layout(normalize=normalize, pool=pool, dtype="float16")
    together, single = prepare(source, wanted), prepare(alone, wanted)
    for name in ("fine", "coarse"):
        np.testing.assert_array_equal(together.levels[name][row], single.levels[name][0])


def test_what_a_batch_says_beside_its_features_is_kept() -> None:
    made = Source(backbone="b", weights_sha256="w", preprocess=Preprocess())
    valid = np.ones((2, 12, 16), np.bool_)
    full = batch(valid=valid, paths=["a", "b"], sha256=["1", "2"], root="/r", source=made)
    prepared = prepare(full, layout())
    assert (prepared.paths, prepared.sha256, prepared.root, prepared.source) == (["a", "b"], ["1", "2"], "/r", made)
    assert prepared.valid is valid


def refused(changed: FeatureBatch, message: str, *, dtype: str = "float32") -> None:
    with pytest.raises(InputError, match=message):
        prepare(changed, layout(dtype=dtype))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", ""], "an image id is empty"),
        (["a", "a"], "image id 'a' appears more than once"),
        (["a", "b\0c"], r"image id 'b\\x00c' must be a string without NUL"),
        (["a", 5], "image id 5 must be a string"),
        (["a", "\udc80"], r"image id '\\udc80' is not valid Unicode"),
        (["a"], r"embedding has shape \(2, 5\), expected \(1, 5\)"),
        ([], "a feature batch needs at least one image"),
    ],
)
def test_bad_ids_are_refused(ids: list[Any], message: str) -> None:
    refused(batch(ids=ids), message)


@pytest.mark.parametrize("name", ["paths", "sha256"])
def test_bad_paths_and_checksums_are_refused(name: str) -> None:
    refused(batch(**{name: ["only one"]}), f"a batch of 2 images has 1 {name}")
    refused(batch(**{name: ["a", "b\0"]}), f"{name} 'b.x00' must be a string without NUL")
    refused(batch(**{name: ["a", "\udcff"]}), f"{name} '.udcff' is not valid Unicode")
    refused(batch(root="\udcff"), "root '.udcff' is not valid Unicode")


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    good = batch()
    refused(batch(embedding=np.zeros((2, 4), np.float32)), r"embedding has shape \(2, 4\), expected \(2, 5\)")
    refused(batch(embedding=np.zeros(10, np.float32)), r"embedding has shape \(10,\), expected \(2, 5\)")
    refused(batch(embedding=np.zeros((2, 5), np.int64)), "embedding is of dtype int64, expected floating point")
    channels_first = good.levels["fine"].transpose(0, 3, 1, 2)
    refused(
        batch(levels={**good.levels, "fine": channels_first}), r"level 'fine' has shape \(2, 2, 3, 4\), expected \(2, 3, 4, 2\)"
    )
    refused(batch(levels={**good.levels, "fine": np.zeros((2, 3, 4, 2), np.uint8)}), "level 'fine' is of dtype uint8")
    refused(batch(levels={"fine": good.levels["fine"]}), r"the batch has levels \['fine'\], the bank has \['fine', 'coarse'\]")
    refused(batch(levels={**good.levels, "other": good.levels["fine"]}), r"the batch has levels \['coarse', 'fine', 'other'\]")


def test_a_valid_mask_of_wrong_shape_or_dtype_is_refused() -> None:
    refused(
        batch(valid=np.ones((2, 16, 12), np.bool_)),
        r"valid is bool of shape \(2, 16, 12\), expected bool of shape \(2, 12, 16\)",
    )
    refused(batch(valid=np.ones((2, 12, 16), np.uint8)), "valid is uint8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["embedding", "fine", "coarse"])
def test_values_that_are_not_finite_are_refused(value: float, place: str) -> None:
    broken = batch()
    array = broken.embedding if place == "embedding" else broken.levels[place]
    array.reshape(-1)[3] = value
    refused(broken, f"{place}.* holds NaN or infinite values")


def test_values_beyond_float16_are_refused_where_maps_are_stored_so() -> None:
    large = batch()
    large.levels["coarse"][1, 0, 0, 0] = -70000
    refused(large, "level 'coarse' holds 7e.04, beyond float16; create the bank with dtype float32", dtype="float16")
    assert prepare(large, layout()).levels["coarse"][1, 0, 0, 0] == -70000
    # Only what is stored counts: unit vectors fit. And the embedding is always float32.
    prepare(large, layout(dtype="float16", normalize="l2"))
    prepare(batch(embedding=np.full((2, 5), 1e6)), layout(dtype="float16"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_whose_squares_leave_float32_are_refused(dtype: str) -> None:
    refused(batch(embedding=np.full((2, 5), -1e300)), r"embedding holds 1e\+300; the squares", dtype=dtype)
    levels = {**batch().levels, "fine": np.full((2, 3, 4, 2), 1e17, np.float32)}
    refused(batch(levels=levels), r"level 'fine' holds 1e\+17; the squares", dtype=dtype)


def test_concatenated_batches_keep_everything_in_order() -> None:
    def part(n: int, seed: int) -> FeatureBatch:
        ids = [f"{seed}-{row}" for row in range(n)]
        valid = np.random.default_rng(seed).random((n, 12, 16)) > 0.5
        return batch(n, seed, ids=ids, valid=valid, paths=[f"p{i}" for i in ids], sha256=[f"s{i}" for i in ids], root="/r")

    parts = [part(2, 1), part(1, 2), part(3, 3)]
    whole = concatenate(parts)
    assert list(whole.ids) == ["1-0", "1-1", "2-0", "3-0", "3-1", "3-2"]
    assert [*whole.paths] == [f"p{i}" for i in whole.ids]
    assert [*whole.sha256] == [f"s{i}" for i in whole.ids]
    assert whole.root == "/r"
    np.testing.assert_array_equal(whole.embedding[3:], parts[2].embedding)
    np.testing.assert_array_equal(whole.levels["coarse"][2], parts[1].levels["coarse"][0])
    assert whole.valid is not None
    assert parts[2].valid is not None
    np.testing.assert_array_equal(whole.valid[3:], parts[2].valid)
    # What comes out is a batch like any other.
    assert len(prepare(whole, layout())) == 6
    assert concatenate([batch(1, ids=["a"]), batch(1, ids=["b"])]).valid is None


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a\0", "a\nb", "\udc80", 5, None])
def test_level_names_that_hdf5_could_not_hold_are_refused(name: Any) -> None:
    with pytest.raises(InputError, match=r"^level name .* must be non-empty and printable"):
        Level(name, channels=1, stride=1, height=1, width=1)


@pytest.mark.parametrize("field", ["channels", "stride", "height", "width"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_level_sizes_are_positive_integers(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^level blocks.4: {field}={value!r} must be an integer of at least 1"):
        Level(**{"name": "blocks.4", "channels": 1, "stride": 1, "height": 1, "width": 1, field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "a bank needs at least one level"),
        ({"levels": (FINE, FINE)}, r"level names must be distinct, got \['fine', 'fine'\]"),
        ({"embedding_dim": 0}, "embedding_dim=0 must be an integer of at least 1"),
        ({"input_size": [12, 16]}, r"input_size=\[12, 16\] must be a tuple"),
        ({"input_size": (12,)}, r"input_size=\(12,\) must be a tuple"),
        ({"input_size": (12, 0)}, "input_size=0 must be an integer of at least 1"),
        ({"dtype": "float64"}, "dtype='float64' is not one of float16, float32, int8"),
        ({"normalize": "l1"}, "normalize='l1' is not one of none, l2"),
        ({"pool": 0}, "pool=0 must be an integer of at least 1"),
        ({"pool": 2}, "pool=2 must be odd"),
    ],
)
def test_layout_ranges(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(layout(), **changes)
