"""Settings: unknown keys, wrong types and values out of range are refused, and the message names the place."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.core.declaring import pixels
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import LARGEST_SIDE, PRECISIONS, RESIZE_MODES, Extraction, Preprocess, Source
from spade_faiss.core.schema import from_mapping
from spade_faiss.core.settings import DISTANCES, FUSIONS, LOCALIZE, Method


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    ratio: float = 0.5
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    pair: tuple[int, int] = (1, 2)
    many: tuple[str, ...] = ()
    several: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    table: dict[str, int] = field(default_factory=dict)


def build(**values: Any) -> Outer:
    return from_mapping(Outer, {"name": "n", **values}, "file.yaml")


def test_everything_given_and_everything_left_out() -> None:
    full = build(
        ratio=2,
        flag=True,
        inner={"size": 3},
        pair=[4, 5],
        many=["a", "b"],
        several=[{"size": 6}, {}],
        maybe={"size": 7},
        table={"x": 8},
    )
    assert full == Outer(
        name="n",
        ratio=2,
        flag=True,
        inner=Inner(size=3),
        pair=(4, 5),
        many=("a", "b"),
        several=(Inner(size=6), Inner()),
        maybe=Inner(size=7),
        table={"x": 8},
    )
    # A field whose default is made by a factory is no more needed than one with a plain default.
    assert build() == Outer(name="n")
    assert build(maybe=None).maybe is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": 1}, "file.yaml: unknown key 'nmae'; known are name, ratio"),
        ({1: 2}, "file.yaml: unknown key '1'"),
        ({"name": 5}, "file.yaml: name=5 is of type int, expected str"),
        ({"name": None}, "file.yaml: name=None is of type NoneType, expected str"),
        ({"ratio": "0.5"}, "file.yaml: ratio='0.5' is of type str, expected float"),
        ({"ratio": True}, "file.yaml: ratio=True is of type bool, expected float"),
        ({"flag": 1}, "file.yaml: flag=1 is of type int, expected bool"),
        ({"inner": 3}, "file.yaml: inner: expected a mapping, got int"),
        ({"inner": None}, "file.yaml: inner: expected a mapping, got NoneType"),
        ({"inner": {"sise": 3}}, "file.yaml: inner: unknown key 'sise'"),
        ({"inner": {"size": True}}, "file.yaml: inner: size=True is of type bool, expected int"),
        ({"inner": {"size": 2.0}}, "file.yaml: inner: size=2.0 is of type float, expected int"),
        ({"maybe": {"size": "x"}}, "file.yaml: maybe: size='x' is of type str"),
        ({"pair": 3}, "file.yaml: pair=3 is of type int, expected a list"),
        ({"pair": [1]}, "file.yaml: pair=[1] has 1 values, expected 2"),
        ({"pair": [1, "b"]}, "file.yaml: pair[1]='b' is of type str, expected int"),
        ({"many": "ab"}, "file.yaml: many='ab' is of type str, expected a list"),
        ({"many": ["a", 2]}, "file.yaml: many[1]=2 is of type int, expected str"),
        ({"several": [{}, {"size": None}]}, "file.yaml: several[1]: size=None is of type NoneType"),
        ({"table": [1]}, "file.yaml: table=[1] is of type list, expected a mapping"),
        ({"table": {"x": "y"}}, "file.yaml: table: x='y' is of type str, expected int"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_mapping(Outer, {"name": "n", **values}, "file.yaml")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("content", [None, 3, "name", ["name"]])
def test_what_is_no_mapping_is_refused(content: object) -> None:
    with pytest.raises(InputError, match=r"^file\.yaml: expected a mapping, got "):
        from_mapping(Outer, content, "file.yaml")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match=r"^file\.yaml: missing key 'name'$"):
        from_mapping(Outer, {"ratio": 1.0}, "file.yaml")


def test_a_value_out_of_range_is_named_with_its_place() -> None:
    with pytest.raises(InputError, match=r"^settings: k_image=0 must be an integer of at least 1$"):
        from_mapping(Method, {"k_image": 0}, "settings")
    source = {"backbone": "b", "weights_sha256": "w", "preprocess": {"resize": 100, "crop": 224}}
    with pytest.raises(InputError, match=r"^m\.json: preprocess: resize=100 is smaller than size=224"):
        from_mapping(Source, source, "m.json")


numbers = st.floats(-1e6, 1e6)
positive = st.floats(1e-6, 1e6)


@given(
    preprocess=st.builds(
        lambda resize_mode, size, more, mean, std: Preprocess(
            resize_mode=resize_mode, resize=min(size) + more, size=size, mean=mean, std=std
        ),
        st.sampled_from(RESIZE_MODES),
        st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
        st.integers(0, 1000),
        st.tuples(numbers, numbers, numbers),
        st.tuples(positive, positive, positive),
    ),
    names=st.tuples(st.text(), st.text()),
    precision=st.sampled_from(PRECISIONS),
)
def test_a_round_trip_through_json_is_the_identity(preprocess: Preprocess, names: tuple[str, str], precision: str) -> None:
    source = Source(backbone=names[0], weights_sha256=names[1], preprocess=preprocess, precision=precision)
    assert from_mapping(Source, json.loads(json.dumps(asdict(source))), "x") == source


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize_mode": "squash"}, "resize_mode='squash' is not one of crop, stretch, letterbox"),
        ({"size": 0}, "size=0 must be an integer of at least 1"),
        ({"size": 64.0, "resize": 72}, "size=64.0 must be an integer"),
        ({"size": True}, "size=True must be an integer"),
        ({"size": (64,)}, "size=(64,) must be the side of a square, or (height, width)"),
        ({"size": (64, 0)}, "size=0 must be an integer of at least 1"),
        ({"size": (64, 10_001)}, "size=10001 is too large: at most 10000 pixels"),
        ({"size": (320, 640), "resize": 300}, "resize=300 is smaller than size=320"),
        ({"resize": 223}, "resize=223 is smaller than size=224"),
        ({"resize": "256"}, "resize='256' must be an integer"),
        ({"resize_mode": "stretch", "resize": -1}, "resize=-1 must be an integer of at least 1"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"std": (1.0, -1.0, 1.0)}, "std must be positive"),
        ({"std": (float("nan"), 1.0, 1.0)}, "std=(nan, 1.0, 1.0) must be a tuple of three finite numbers"),
        ({"std": (float("inf"), 1.0, 1.0)}, "std=(inf, 1.0, 1.0) must be a tuple of three finite numbers"),
        ({"mean": (float("nan"), 1.0, 1.0)}, "mean=(nan, 1.0, 1.0) must be a tuple of three finite numbers"),
        ({"mean": (0.5, 0.5)}, "mean=(0.5, 0.5) must be a tuple of three"),
        ({"mean": ("a", 0.5, 0.5)}, "mean=('a', 0.5, 0.5) must be a tuple of three finite numbers"),
        # A list would be equal to no tuple that was read back from a bank.
        ({"mean": [0.5, 0.5, 0.5]}, "mean=[0.5, 0.5, 0.5] must be a tuple of three"),
        ({"tile": 0}, "tile=0 must be an integer of at least 8"),
        ({"tile": 10_001}, "tile=10001 is too large"),
        ({"tile": 448, "size": 320}, "size=320 and tile=448 are two sizes for one input; give tile alone"),
        ({"tile": 448, "resize_mode": "letterbox"}, "resize_mode='letterbox' is of whole images"),
        ({"tile": 448, "resize": 0}, "resize=0 must be an integer of at least 1"),
        ({"tile": 448, "overlap": -1}, "overlap=-1 must be an integer of at least 0"),
        ({"tile": 448, "overlap": 225}, "overlap=225 is more than half of tile=448"),
        ({"overlap": 64}, "overlap=64 is of tiles; give the side of a tile, too"),
    ],
)
def test_preprocess_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Preprocess(**values)
    assert str(caught.value).startswith(message)


def test_a_resize_mode_without_a_crop_does_not_need_room_for_one() -> None:
    assert Preprocess(resize_mode="letterbox", resize=1, size=320).size == 320
    assert Preprocess(resize=224, size=224).resize_mode == "crop"


def test_the_size_of_the_input() -> None:
    assert (Preprocess().input_size, Preprocess().resize) == ((224, 224), 256)  # the paper's
    assert Preprocess(size=(320, 640)).input_size == (320, 640)
    assert (Preprocess(size=448).resize, Preprocess(size=(320, 640)).resize) == (512, 366)
    assert Preprocess(size=(64, 64)) == Preprocess(size=64)
    assert Preprocess(resize_mode="stretch", size=LARGEST_SIDE).resize == LARGEST_SIDE


def test_the_tiles_of_an_image() -> None:
    tiled = Preprocess(tile=448)
    assert (tiled.size, tiled.input_size, tiled.overlap, tiled.resize) == (448, (448, 448), 64, None)
    assert (Preprocess(tile=224).overlap, Preprocess(tile=224, overlap=0).overlap) == (32, 0)
    assert replace(tiled, mean=(0.5, 0.5, 0.5)).tile == 448
    assert from_mapping(Preprocess, asdict(Preprocess(tile=448, resize=1000)), "m.json") == Preprocess(tile=448, resize=1000)
    assert (Preprocess().tile, Preprocess().overlap) == (None, None)
    assert (tiled.input_mode, Preprocess(resize_mode="stretch").input_mode) == ("tiles", "stretch")


def test_a_bank_that_calls_the_size_crop_is_read_with_its_meaning() -> None:
    """Banks from before inputs of any size."""
    old = {"resize_mode": "stretch", "resize": 300, "crop": 96}
    assert from_mapping(Preprocess, old, "m.json") == Preprocess(resize_mode="stretch", resize=300, size=96)
    with pytest.raises(InputError, match=r"^m\.json: unknown key 'crop'"):
        from_mapping(Preprocess, {**old, "size": 96}, "m.json")
    with pytest.raises(InputError, match=r"^m\.json: size='96' is of type str"):
        from_mapping(Preprocess, {"crop": "96"}, "m.json")


@pytest.mark.parametrize("text", ["448", "320x640"])
def test_sizes_are_read_from_texts(text: str) -> None:
    assert pixels(text) == {"448": 448, "320x640": (320, 640)}[text]
    for wrong in ("", "x", "320x", "x640", "320x640x3", "a", "3.5"):
        with pytest.raises(ValueError, match="invalid literal"):
            pixels(wrong)


def test_source_precision() -> None:
    with pytest.raises(InputError, match="precision='float16' is not one of float32, bfloat16"):
        Source(backbone="b", weights_sha256="w", preprocess=Preprocess(), precision="float16")


@pytest.mark.parametrize("name", ["k_image", "k_gallery", "kappa"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "5", None])
def test_neighbor_counts_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name}={value!r} must be an integer of at least 1"):
        Method(**{name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "4", None, True])
def test_sigma_is_a_number_of_zero_or_more(value: Any) -> None:
    with pytest.raises(InputError, match=f"^sigma={value!r} must be a number of 0 or more"):
        Method(sigma=value)


def test_method_choices() -> None:
    for fusion in FUSIONS:
        for distance in DISTANCES:
            assert Method(fusion=fusion, distance=distance, sigma=0).sigma == 0
    with pytest.raises(InputError, match="fusion='max' is not one of mean, concat"):
        Method(fusion="max")
    with pytest.raises(InputError, match="distance='L2' is not one of l2, squared_l2"):
        Method(distance="L2")


def test_which_images_get_a_map() -> None:
    assert (Method().localize, Method().flag_above) == ("all", None)
    assert LOCALIZE == ("all", "flagged", "none")
    assert Method(localize="none").flag_above is None
    for above in (0, 12.5, -1.0):  # a score's scale is the backbone's
        assert Method(localize="flagged", flag_above=above).flag_above == above
    with pytest.raises(InputError, match=r"^localize='some' is not one of all, flagged, none$"):
        Method(localize="some")


@pytest.mark.parametrize("above", [None, float("nan"), float("inf"), -float("inf"), "12", True])
def test_flagged_needs_a_threshold(above: Any) -> None:
    with pytest.raises(InputError, match=r"^localize='flagged' needs flag_above, the image score .*; got ") as caught:
        Method(localize="flagged", flag_above=above)
    assert str(caught.value).endswith(f"got {above!r}")


@pytest.mark.parametrize("localize", ["all", "none"])
@pytest.mark.parametrize("above", [0, 12.5, float("nan")])
def test_a_threshold_that_would_do_nothing_is_refused(localize: str, above: float) -> None:
    message = f"^flag_above={above!r} does nothing with localize='{localize}'; use localize='flagged'"
    with pytest.raises(InputError, match=message):
        Method(localize=localize, flag_above=above)


def test_views_and_a_region_of_interest_exclude_each_other() -> None:
    with pytest.raises(InputError, match="augment and roi exclude each other"):
        Extraction(augment="flip", roi="mask.png")


def test_tiles_and_a_region_of_interest_exclude_each_other() -> None:
    with pytest.raises(InputError, match="tile and roi exclude each other"):
        Extraction(preprocess=Preprocess(tile=64), roi="mask.png")
    with pytest.raises(InputError, match="tile and roi exclude each other"):
        Preprocess(tile=64, own_rois=True)
