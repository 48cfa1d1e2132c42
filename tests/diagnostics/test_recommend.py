"""The advice: it follows from the measurements, and does not go beyond them unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.cli import main
from spade_faiss.core.errors import InputError
from spade_faiss.diagnostics.measurements import load_measured
from spade_faiss.diagnostics.recommend import LOSS, RECALL, Advice, recommend
from spade_faiss.diagnostics.workload import Workload
from spade_faiss.search.recipe import load_recipe

GIB = 1 << 30


def image(n: int, factory: str, query: str, ms: float, recall: float, *, k: int = 5, each: int = 8000) -> dict[str, Any]:
    row = {"n": n, "k": k, "factory": factory, "query": query, "p50_ms": ms, "recall": recall}
    return {**row, "memory_bytes_per_image": each, "disk_bytes_per_image": each}


def pixel(set: str, recipe: str, k: int, ms: float, lost: float | None, **query: int) -> dict[str, Any]:
    row = {"set": set, "recipe": recipe, "build": {}, "query": query, "k": k, "pixel_ms": ms, "lost": lost}
    return {**row, "peak_bytes": GIB, "bank_bytes_per_image": 1000, "disk_bytes_per_image": 0 if recipe == "exact" else 100}


KERNEL = [{"set": "wrn50", "k": 5, "times": 5.0, "simd_level": "avx2"}]
MEASURED: dict[str, Any] = {
    "schema": 1,
    "device": "cpu",
    "machine": "a machine",
    "image": [
        image(1000, "Flat", "", 0.5, 1.0),
        image(100_000, "Flat", "", 60, 1.0),
        image(100_000, "HNSW32", "efSearch=128", 0.5, 0.999),
        image(100_000, "IVF512,SQ8", "nprobe=4", 0.1, 0.9, each=2000),
        image(1_000_000, "Flat", "", 600, 1.0),
        image(1_000_000, "IVF1024,SQ8", "nprobe=64", 20, 0.995, each=1000),
    ],
    "pixel": [
        pixel("wrn50", "exact", 5, 100, None),
        pixel("wrn50", "ivf", 5, 40, None),
        pixel("wrn50", "compact", 5, 30, None),
        pixel("wrn50", "location", 5, 10, None),
        pixel("lite0", "exact", 5, 17, None),
        pixel("lite0", "ivf", 5, 16, None),
        pixel("wrn50", "exact", 50, 1000, None),
        pixel("wrn50", "ivf", 50, 300, None),
        pixel("mvtec_bottle", "exact", 5, 17, 0.0),
        pixel("mvtec_bottle", "ivf", 5, 16, 0.001),
        pixel("mvtec_bottle", "compact", 5, 16, 0.0),
        pixel("magnetic_tile", "compact", 5, 16, 0.02),
        pixel("mvtec_bottle", "location", 5, 9, 0.0),
        pixel("mvtec_bottle", "exact", 50, 170, 0.0),
        pixel("mvtec_bottle", "ivf", 50, 160, 0.001),
    ],
}


def advise(images: int, k: int = 5, *, extrapolate: bool = False, simd_level: str | None = None, **changes: Any) -> Advice:
    measured = changes.pop("measured", MEASURED)
    workload = Workload(images=images, k=k, **changes)
    return recommend(workload, extrapolate=extrapolate, measured=measured, simd_level=simd_level)


STORES: list[dict[str, Any]] = [
    {"set": "lite0", "store": "float16", "bytes": 1000, "lost": 0.0},
    {"set": "lite0", "store": "int8", "bytes": 500, "lost": 0.0002},
    {"set": "lite0", "store": "pca12-int8", "bytes": 100, "lost": 0.04},
    {"set": "lite0", "store": "pca16-int8", "bytes": 200, "lost": 0.001},
    {"set": "wrn50", "store": "pca64-int8", "bytes": 150, "lost": None},
]


@pytest.mark.parametrize(
    ("backbone", "most", "store", "why"),
    [
        ("efficientnet_lite0", None, "float16", ""),
        ("efficientnet_lite0", 9500, "float16", "float16 takes 9,000 bytes an image with its index, which fits"),
        ("efficientnet_lite0", 8999, "int8", "at most 0.0002 of AUROC and AUPRO against float32"),
        ("efficientnet_lite0", 8499, "pca16-int8", "pca16-int8 takes 200 bytes an image, and 8,000 in its index"),
        ("wide_resnet50_2", 8499, "pca64-int8", "was not measured with this backbone"),
    ],
)
def test_the_largest_store_that_fits(backbone: str, most: float | None, store: str, why: str) -> None:
    advice = advise(1000, measured={**MEASURED, "stores": STORES}, backbone=backbone, max_bytes=most)
    assert advice.store == store
    assert any(why in line for line in advice.evidence) or not why
    each = next(int(str(row["bytes"])) for row in STORES if row["store"] == store)
    assert advice.disk_bytes == pytest.approx(1000 * (each + 8000), rel=0.02)


def test_no_store_is_small_enough() -> None:
    with pytest.raises(InputError, match=r"max_bytes=8150 is too small: .* takes 8,200 bytes an image with the index"):
        advise(1000, measured={**MEASURED, "stores": STORES}, backbone="efficientnet_lite0", max_bytes=8150)
    with pytest.raises(InputError, match=r"max_bytes=0\.0 must be a number above 0"):
        Workload(images=1, max_bytes=0.0)


def test_the_fastest_that_loses_next_to_nothing_on_every_set() -> None:
    advice = advise(100_000)
    assert (advice.recipe.build.image, advice.recipe.build.gallery) == ("HNSW32", "ivf")
    assert advice.recipe.query.image == "efSearch=128"
    assert (advice.image_ms, advice.pixel_ms) == (0.5, 40)
    assert advice.recall >= RECALL
    assert advice.loss == 0.001 <= LOSS
    assert not advice.is_packaged
    assert advice.memory_bytes == 100_000 * 8000 + GIB
    assert advice.disk_bytes == 100_000 * (8000 + 1000 + 100)
    assert any("mvtec_bottle" in line for line in advice.evidence)


def test_exact_where_nothing_is_gained() -> None:
    advice = advise(1000, backbone="efficientnet_lite0")
    assert advice.recipe == load_recipe("exact")
    assert advice.is_packaged


def test_places_only_where_images_are_aligned() -> None:
    assert advise(1000).recipe.build.gallery == "ivf"
    assert advise(1000, aligned=True).recipe.build.gallery == "location"


def test_between_two_sizes_the_larger_counts_and_it_says_so() -> None:
    advice = advise(1500, 7, measured=MEASURED | {"image": [*MEASURED["image"], image(100_000, "Flat", "", 61, 1.0, k=50)]})
    assert advice.image_ms == 61
    assert advice.pixel_ms == 300
    assert any("N=1,500 lies between" in line and "N=100,000" in line for line in advice.evidence)
    assert any("K=7 lies between" in line and "K=50" in line for line in advice.evidence)


@pytest.mark.parametrize(("images", "k", "times"), [(3_000_000, 5, "3.0 times"), (1000, 100, "2.0 times")])
def test_no_silent_extrapolation(images: int, k: int, times: str) -> None:
    with pytest.raises(InputError, match=f"{times}.*--extrapolate"):
        advise(images, k, memory="100GiB")
    advice = advise(images, k, memory="100GiB", extrapolate=True)
    assert any(line.startswith(f"EXTRAPOLATED {times}") for line in advice.evidence)
    if images == 3_000_000:
        assert advice.image_ms == 60


def test_memory_is_kept_to() -> None:
    assert advise(1_000_000, memory="4GiB").recipe.build.image == "IVF1024,SQ8"
    with pytest.raises(InputError, match=r"too small: the least that loses next to nothing takes 1\.94 GiB"):
        advise(1_000_000, memory="1GiB")


def test_what_was_not_measured_is_not_known() -> None:
    with pytest.raises(InputError, match="nothing was measured on cuda: the committed results are of a machine"):
        advise(1000, device="cuda")
    wrong: list[dict[str, Any]] = [{"images": 0}, {"k": 0}, {"backbone": "resnet18"}, {"device": "tpu"}, {"k": 2000}]
    for settings in (*wrong, {"memory": "much"}):
        with pytest.raises(InputError):
            Workload(**{"images": 1000, **settings})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    largest = max(row["n"] for row in load_measured()["image"])
    out = tmp_path / "mine.yaml"
    assert main(["recommend", "--images", str(largest), "--memory", "64GiB", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert load_recipe(out).build.image == found["recipe"]["build"]["image"]
    assert found["evidence"]
    assert main(["recommend", "--images", str(largest), "--memory", "64GiB"]) == 0
    text = capsys.readouterr().out
    assert "ms an image" in text
    assert "measured on" in text
    assert main(["recommend", "--images", str(10 * largest), "--memory", "640GiB"]) == 1
    assert "10.0 times" in capsys.readouterr().err
    assert main(["recommend", "--images", "1000", "--device", "cuda"]) == 1
    assert main(["recommend", "--images", "3", "--k", "5"]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["recommend"])
    assert "required: --images" in capsys.readouterr().err


def test_exact_search_by_the_kernel_counts_where_it_runs() -> None:
    """By FAISS it takes 100 ms and ivf 40; by the kernel, five times as fast side by side, 20."""
    measured = {**MEASURED, "kernel": KERNEL}
    assert advise(1000, measured=measured).recipe.build.gallery == "ivf"
    advice = advise(1000, measured=measured, simd_level="avx512vnni")
    assert advice.recipe == load_recipe("exact")
    assert advice.pixel_ms == pytest.approx(20)
    assert any(
        "over 5.0, how many times as fast the compiled kernel (avx2)" in said and "avx512vnni" in said
        for said in advice.evidence
    )
    # Nothing is said of a K that was not measured side by side.
    assert advise(1000, 50, measured=measured, simd_level="avx2") == advise(1000, 50, measured=measured)


# The whole bank as the gallery


def whole(set: str, recipe: str, n: int, ms: float, lost: float | None = None, *, peak: int = GIB) -> dict[str, Any]:
    row = {"set": set, "recipe": recipe, "build": {}, "query": {}, "n": n, "pixel_ms": ms, "lost": lost}
    return {**row, "peak_bytes": peak, "bank_bytes_per_image": 1000, "disk_bytes_per_image": 0 if recipe == "exact" else 10}


WHOLE = {
    **MEASURED,
    "whole": [
        whole("lite0", "exact", 200, 40),
        whole("lite0", "clusters", 200, 35),
        whole("lite0", "exact", 1000, 200),
        whole("lite0", "clusters", 1000, 30),
        whole("lite0", "global", 1000, 10),
        whole("mvtec_bottle", "exact", 209, 30, 0.0),
        whole("mvtec_bottle", "clusters", 209, 10, 0.0),
        whole("mvtec_bottle", "global", 209, 5, 0.02),
    ],
}


def advise_all(images: int, *, measured: dict[str, Any] = WHOLE, **more: Any) -> Advice:
    extrapolate = more.pop("extrapolate", False)
    workload = Workload(images=images, k="all", backbone="efficientnet_lite0", **more)
    return recommend(workload, measured=measured, extrapolate=extrapolate)


def test_the_whole_bank_is_searched_by_the_fastest_recipe_that_loses_nothing() -> None:
    advice = advise_all(1000)
    assert (advice.recipe.name, advice.pixel_ms) == ("clusters", 30)
    assert any("in all of N=1,000" in line for line in advice.evidence)
    lossless = [row if row["lost"] != 0.02 else {**row, "lost": 0.0} for row in WHOLE["whole"]]
    assert advise_all(1000, measured={**WHOLE, "whole": lossless}).recipe.name == "global"


def test_a_scan_of_a_small_bank_is_nearly_as_fast() -> None:
    assert advise_all(150).recipe.name == "exact"


def test_a_whole_bank_costs_what_the_next_larger_one_does() -> None:
    advice = advise_all(600)
    assert (advice.recipe.name, advice.pixel_ms) == ("clusters", 30)
    assert any("N=600 lies between" in line for line in advice.evidence)


def test_a_larger_whole_bank_is_not_guessed_unasked() -> None:
    with pytest.raises(
        InputError, match=r"images=5,000 is 5.0 times as many as the most whose maps were all searched, N=1,000"
    ):
        advise_all(5000)
    advice = advise_all(5000, extrapolate=True, memory="12GiB")
    assert advice.pixel_ms == 150
    assert advice.memory_bytes >= 5 * GIB  # it holds something of every image
    with pytest.raises(InputError, match="is too small"):
        advise_all(5000, extrapolate=True, memory="4GiB")


def test_a_backbone_whose_whole_bank_was_not_measured_is_named() -> None:
    with pytest.raises(InputError, match="k=all was not measured for wrn50, only for lite0, mvtec_bottle"):
        recommend(Workload(images=100, k="all"), measured=WHOLE)
