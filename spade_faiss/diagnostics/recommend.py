"""Which recipe to take for so many normal images: an answer from the measurements that come with the package, nothing else.

`measured.json` is made by `python -m benchmarks.pages` from the committed results. An image-level row says what an index over
n embeddings cost and lost, a pixel-level row what a way of searching the maps did. Costs are those of the next larger size
that was measured, never a formula's; beyond the largest, there is no answer unless it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import yaml

from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import format_bytes, parse_bytes
from spade_faiss.core.schema import check_at_least, check_choice
from spade_faiss.core.settings import DEFAULT_BACKBONE
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe, recipe_names

SCHEMA = 1
DEVICES = ("cpu", "cuda")
# Of the nearest normals, this share must be found; of AUROC and AUPRO, at most that much may be lost (the lower end of the 95 %
# interval, on every real set).
RECALL, LOSS = 0.99, 0.005
# Exact search is taken where it takes at most so many times as long.
_WORTH = 1.25
# Compares with places near the same one only: another definition, for images that are aligned.
ALIGNED = ("location", "history")
# What stands for a backbone's shapes.
_SHAPES = {"wide_resnet50_2": "wrn50", "efficientnet_lite0": "lite0"}
# What the engine compares again by true distances, beyond k.
SPARE = 8


@dataclass(frozen=True)
class Advice:
    """What to take.

    Args:
        recipe: the recipe; `name` is that of one that comes with the package, or `recommended`.
        image_ms, pixel_ms: milliseconds an image of both searches.
        memory_bytes, disk_bytes: the process at its peak; the bank and its indexes.
        recall: share of the nearest normals that is found.
        loss: the most that any metric of any real set may have lost, see `LOSS`.
        evidence: where the numbers are from, and what was assumed, in sentences.
    """

    recipe: Recipe
    image_ms: float
    pixel_ms: float
    memory_bytes: int
    disk_bytes: int
    recall: float
    loss: float
    evidence: tuple[str, ...]

    @property
    def is_packaged(self) -> bool:
        """Whether the recipe comes with the package."""
        return self.recipe.name in recipe_names()

    def to_yaml(self) -> str:
        """The recipe as a file."""
        text: str = yaml.safe_dump(asdict(self.recipe), sort_keys=False)
        return text


def load_measured() -> dict[str, Any]:
    """The measurements that come with the package.

    Raises:
        InputError: if they are of another schema.
    """
    found: dict[str, Any] = json.loads(files("spade_faiss.diagnostics").joinpath("measured.json").read_bytes())
    if found.get("schema") != SCHEMA:
        raise InputError(f"measured.json is of schema {found.get('schema')}, expected {SCHEMA}; install the package again")
    return found


def recommend(
    images: int,
    k: int,
    *,
    memory: str | int = "8GiB",
    device: str = "cpu",
    backbone: str = DEFAULT_BACKBONE,
    aligned: bool = False,
    extrapolate: bool = False,
    measured: Mapping[str, Any] | None = None,
    simd_level: str | None = None,
) -> Advice:
    """The fastest recipe that fits into memory and loses next to nothing; exact search where little is gained by another.

    Args:
        images: normal images in the bank.
        k: nearest normals whose maps are searched.
        memory: what the process may take.
        device: where it is to run.
        backbone: `wide_resnet50_2` or `efficientnet_lite0`, whose shapes were measured.
        aligned: whether the images show the same things at the same places: recipes that rely on it are considered.
        extrapolate: whether to answer beyond what was measured.
        measured: other measurements than the package's.
        simd_level: the SIMD level that the compiled kernel uses there; None if FAISS searches the maps. Exact search was
            measured with FAISS, and the kernel beside it: the ratio of the two is applied.

    Raises:
        InputError: for a setting out of range, for what was not measured, or if nothing fits into memory.
    """
    check_at_least("images", images, 1)
    check_at_least("k", k, 1)
    check_choice("device", device, DEVICES)
    check_choice("backbone", backbone, tuple(_SHAPES))
    found = load_measured() if measured is None else measured
    budget = parse_bytes(memory)
    if device != found["device"]:
        raise InputError(
            f"nothing was measured on {device}: the committed results are of {found['machine']}; measure there with: "
            f"python -m benchmarks run benchmarks/sweeps/*.yaml --out RESULTS"
        )
    if k > images:
        raise InputError(f"k={k} is larger than images={images}: an image has at most that many nearest normals")
    evidence: list[str] = [f"measured on {found['machine']}"]
    image_rows, times = _at_size(found["image"], images, k, extrapolate, evidence)
    pixel_rows, more = _at_k(found["pixel"], k, _SHAPES[backbone], extrapolate, evidence)
    losses = _losses(found["pixel"], pixel_rows[0]["k"])
    if simd_level is not None:
        pixel_rows = [_by_kernel(row, found.get("kernel", ())) for row in pixel_rows]
    options = [
        _option(image, pixel, images, (times, more))
        for image in image_rows
        for pixel in pixel_rows
        if image["recall"] >= RECALL and losses.get(_name(pixel), 1.0) <= LOSS and (aligned or pixel["recipe"] not in ALIGNED)
    ]
    fitting = [option for option in options if option["memory_bytes"] <= budget]
    if not fitting:
        least = min((option["memory_bytes"] for option in options), default=0)
        raise InputError(
            f"memory={format_bytes(budget)} is too small: the least that loses next to nothing takes {format_bytes(least)}"
        )
    best = min(fitting, key=lambda option: float(option["ms"]))
    close = [option for option in fitting if option["ms"] <= _WORTH * best["ms"]]
    best = min(
        close, key=lambda option: (option["pixel"]["recipe"] != "exact", option["image"]["factory"] != "Flat", option["ms"])
    )
    image, pixel = best["image"], best["pixel"]
    loss = losses[_name(pixel)]
    if pixel["recipe"] != "exact":
        sets = ", ".join(sorted({row["set"] for row in _rows_of_real_sets(found["pixel"]) if _name(row) == _name(pixel)}))
        evidence.append(f"what the pixel search loses was measured with efficientnet_lite0 on {sets}")
    evidence.append(
        f"image search: {_title(image)} at N={image['n']:,}: {image['p50_ms']:.2f} ms, "
        f"recall@{image['k']} {image['recall']:.4f}"
    )
    evidence.append(f"pixel search: {_name(pixel)} at K={pixel['k']}, {pixel['set']}: {pixel['pixel_ms']:.1f} ms")
    if "times" in pixel:
        evidence.append(
            f"that is FAISS's time over {pixel['times']:.1f}, how many times as fast the compiled kernel "
            f"({pixel['simd_level']}) was beside it; here it uses {simd_level}"
        )
    return Advice(
        recipe=_recipe_of(image, pixel),
        image_ms=image["p50_ms"] * times,
        pixel_ms=pixel["pixel_ms"] * more,
        memory_bytes=round(best["memory_bytes"]),
        disk_bytes=round(
            images * (pixel["bank_bytes_per_image"] + pixel["disk_bytes_per_image"] + image["disk_bytes_per_image"])
        ),
        recall=image["recall"],
        loss=loss,
        evidence=tuple(evidence),
    )


def _by_kernel(pixel: Mapping[str, Any], kernel: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A pixel-level row as it would be by the compiled kernel, if it is exact search and both were measured."""
    for row in kernel:
        if pixel["recipe"] == "exact" and (row["set"], row["k"]) == (pixel["set"], pixel["k"]):
            return {
                **pixel,
                "pixel_ms": pixel["pixel_ms"] / row["times"],
                "times": row["times"],
                "simd_level": row["simd_level"],
            }
    return pixel


def _at_size(
    rows: Sequence[Mapping[str, Any]], images: int, k: int, extrapolate: bool, evidence: list[str]
) -> tuple[list[Mapping[str, Any]], float]:
    """The image-level rows of the next larger measured size and k, and by how much their times are to be multiplied."""
    larger = [value for value in sorted({row["k"] for row in rows}) if value >= k]
    at_k = larger[0] if larger else max(row["k"] for row in rows)
    sizes = sorted({row["n"] for row in rows if row["k"] == at_k})
    fits = [n for n in sizes if n >= images]
    if fits:
        if fits[0] != images:
            evidence.append(f"N={images:,} lies between what was measured; taken is what N={fits[0]:,} costs and loses")
        return [row for row in rows if (row["n"], row["k"]) == (fits[0], at_k)], 1.0
    beyond = images / sizes[-1]
    if not extrapolate:
        raise InputError(
            f"images={images:,} is {beyond:.1f} times as many as the most that was measured, N={sizes[-1]:,} at K={at_k}; "
            f"measure more (benchmarks/sweeps/image.yaml), or take the risk with: --extrapolate"
        )
    evidence.append(
        f"EXTRAPOLATED {beyond:.1f} times beyond N={sizes[-1]:,}: times grow in proportion, recall is assumed to stay"
    )
    return [row for row in rows if (row["n"], row["k"]) == (sizes[-1], at_k)], beyond


def _at_k(
    rows: Sequence[Mapping[str, Any]], k: int, shapes: str, extrapolate: bool, evidence: list[str]
) -> tuple[list[Mapping[str, Any]], float]:
    """The pixel-level rows of a backbone's shapes at the next larger measured K, and by how much to multiply their times."""
    of_shapes = [row for row in rows if row["set"] == shapes]
    ks = sorted({row["k"] for row in of_shapes if len({r["recipe"] for r in of_shapes if r["k"] == row["k"]}) > 1})
    fits = [value for value in ks if value >= k]
    if fits:
        if fits[0] != k:
            evidence.append(f"K={k} lies between what was measured; taken is what K={fits[0]} costs and loses")
        return [row for row in of_shapes if row["k"] == fits[0]], 1.0
    beyond = k / ks[-1]
    if not extrapolate:
        raise InputError(
            f"k={k} is {beyond:.1f} times the largest measured, K={ks[-1]}; measure it (benchmarks/sweeps/pixel.yaml), "
            f"or take the risk with: --extrapolate"
        )
    evidence.append(f"EXTRAPOLATED {beyond:.1f} times beyond K={ks[-1]}: times grow in proportion, losses stay as they are")
    return [row for row in of_shapes if row["k"] == ks[-1]], beyond


def _rows_of_real_sets(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of real sets; recipes that compare places are judged where images are aligned, as they are asked for there."""
    return [row for row in rows if row["lost"] is not None and (row["recipe"] not in ALIGNED or row.get("aligned", True))]


def _losses(rows: Sequence[Mapping[str, Any]], k: int) -> dict[str, float]:
    """What each recipe may have lost at most, over the real sets, at the measured K that is nearest."""
    judged = _rows_of_real_sets(rows)
    if not judged:
        return {}
    nearest = min({row["k"] for row in judged}, key=lambda value: abs(value - k))
    worst: dict[str, float] = {}
    for row in judged:
        if row["k"] == nearest:
            worst[_name(row)] = max(worst.get(_name(row), 0.0), row["lost"])
    return worst


def _option(image: Mapping[str, Any], pixel: Mapping[str, Any], images: int, factors: tuple[float, float]) -> dict[str, Any]:
    return {
        "image": image,
        "pixel": pixel,
        "ms": image["p50_ms"] * factors[0] + pixel["pixel_ms"] * factors[1],
        "memory_bytes": image["memory_bytes_per_image"] * images + pixel["peak_bytes"],
    }


def _recipe_of(image: Mapping[str, Any], pixel: Mapping[str, Any]) -> Recipe:
    """One of ours if it is the same, else a new one."""
    like = load_recipe(pixel["recipe"])
    build = Build(image=image["factory"], gallery=like.build.gallery, settings={**like.build.settings, **pixel["build"]})
    query = Query(image=image["query"], settings={**like.query.settings, **pixel["query"]})
    for name in recipe_names():
        packaged = load_recipe(name)
        if (packaged.build, packaged.query) == (build, query):
            return packaged
    return Recipe(name="recommended", description="Made by spade-faiss recommend.", build=build, query=query)


def _name(pixel: Mapping[str, Any]) -> str:
    return " ".join([pixel["recipe"], *(f"{name}={value}" for name, value in {**pixel["build"], **pixel["query"]}.items())])


def _title(image: Mapping[str, Any]) -> str:
    return f"{image['factory']} {image['query']}".strip()
