"""Recommends a recipe for a workload: the answer follows from the measurements that come with the package, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from spade_faiss.core.declaring import ALL
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.memory import format_bytes, parse_bytes
from spade_faiss.diagnostics.measurements import (
    ALIGNED,
    Row,
    Selection,
    by_kernel,
    load_measured,
    name_of,
    select_image_rows,
    select_pixel_rows,
    select_whole_rows,
    sets_of,
    worst_losses,
    worst_losses_of_whole,
)
from spade_faiss.diagnostics.workload import SHAPES, Workload
from spade_faiss.search.recipe import Build, Query, Recipe, load_recipe, recipe_names

# At least this share of the nearest normals must be found.
RECALL = 0.99
# At most this much of AUROC and AUPRO may be lost: by the lower end of the 95 % interval, on every real set.
LOSS = 0.005
# What the image score averages over where the gallery is the whole bank.
_K_IMAGE = 5
# Exact search is taken if it takes at most so many times as long as the fastest.
_WORTH = 1.25


@dataclass(frozen=True)
class Advice:
    """A recipe, what it costs, and why it is recommended.

    Args:
        recipe: the recipe; `name` is that of one that comes with the package, or `recommended`.
        image_ms: milliseconds that the image search takes for an image.
        pixel_ms: milliseconds that the pixel search takes for an image.
        memory_bytes: what the process takes at its peak.
        disk_bytes: what the bank and its indexes take.
        recall: the share of the nearest normals that is found.
        loss: the most that any metric of any real set may have lost, see `LOSS`.
        store: how the bank stores maps, see `Extraction`.
        evidence: where the numbers are from, and what was assumed, in sentences.
    """

    recipe: Recipe
    image_ms: float
    pixel_ms: float
    memory_bytes: int
    disk_bytes: int
    recall: float
    loss: float
    store: str
    evidence: tuple[str, ...]

    @property
    def is_packaged(self) -> bool:
        """Whether the recipe comes with the package."""
        return self.recipe.name in recipe_names()

    def to_yaml(self) -> str:
        """Return the recipe as the text of a file."""
        text: str = yaml.safe_dump(asdict(self.recipe), sort_keys=False)
        return text


@dataclass(frozen=True, kw_only=True)
class _Option:
    """An image index and a search of the maps that may go together, and what they cost for a workload."""

    image: Row
    pixel: Row
    image_ms: float
    pixel_ms: float
    memory_bytes: float

    @property
    def ms(self) -> float:
        return self.image_ms + self.pixel_ms

    @property
    def preference(self) -> tuple[bool, bool, float]:
        """Exact search first, then what is fast."""
        return self.pixel["recipe"] != "exact", self.image["factory"] != "Flat", self.ms


def recommend(
    workload: Workload,
    *,
    extrapolate: bool = False,
    measured: Mapping[str, Any] | None = None,
    simd_level: str | None = None,
) -> Advice:
    """Recommend the fastest recipe that fits into memory and loses next to nothing, or exact search if it is nearly as fast.

    Args:
        workload: how many images are searched, on what machine.
        extrapolate: whether to answer beyond what was measured.
        measured: other measurements than those of the package.
        simd_level: the SIMD level that the compiled kernel uses there; None if FAISS searches the maps. Exact search was
            measured by FAISS, and by both side by side: their ratio is applied.

    Raises:
        InputError: if the workload is beyond what was measured, or if nothing fits into memory, or no store into `max_bytes`.
    """
    measured = load_measured() if measured is None else measured
    if workload.device != measured["device"]:
        raise InputError(
            f"nothing was measured on {workload.device}: the committed results are of {measured['machine']}; measure there "
            f"with: python -m benchmarks run benchmarks/sweeps/*.yaml --out RESULTS"
        )
    shapes = SHAPES[workload.backbone]
    if workload.k == ALL:
        images = select_image_rows(measured["image"], workload.images, _K_IMAGE, extrapolate=extrapolate)
        whole = measured.get("whole", ())
        pixels = select_whole_rows(whole, workload.images, shapes, extrapolate=extrapolate)
        losses, searched = worst_losses_of_whole(whole), whole
    else:
        k = int(workload.k)
        images = select_image_rows(measured["image"], workload.images, k, extrapolate=extrapolate)
        pixels = select_pixel_rows(measured["pixel"], k, shapes, extrapolate=extrapolate)
        losses, searched = worst_losses(measured["pixel"], pixels.rows[0]["k"]), measured["pixel"]
        if simd_level is not None:
            by_this = [by_kernel(row, measured.get("kernel", ())) for row in pixels.rows]
            pixels = Selection(by_this, pixels.factor, pixels.note)
    best = _choose(_options(workload, images, pixels, losses), parse_bytes(workload.memory))
    image, pixel = best.image, best.pixel
    index_bytes = pixel["disk_bytes_per_image"] + image["disk_bytes_per_image"]
    store, stored_bytes, why = _store(workload, measured.get("stores", ()), pixel["bank_bytes_per_image"], index_bytes)
    evidence = [f"measured on {measured['machine']}", images.note, pixels.note, *_evidence(best, searched)]
    if "times" in pixel:
        evidence.append(
            f"that is FAISS's time over {pixel['times']:.1f}, how many times as fast the compiled kernel "
            f"({pixel['simd_level']}) was beside it; here it uses {simd_level}"
        )
    evidence.append(why)
    return Advice(
        recipe=_recipe_of(image, pixel),
        image_ms=best.image_ms,
        pixel_ms=best.pixel_ms,
        memory_bytes=round(best.memory_bytes),
        disk_bytes=round(workload.images * (stored_bytes + index_bytes)),
        recall=image["recall"],
        loss=losses[name_of(pixel)],
        store=store,
        evidence=tuple(filter(None, evidence)),
    )


def _store(workload: Workload, stores: Sequence[Row], usual_bytes: float, index_bytes: float) -> tuple[str, float, str]:
    """The store, the bytes that an image takes by it, and why; `usual_bytes` are those of the usual store."""
    usual = Extraction().store
    if workload.max_bytes is None:
        return usual, usual_bytes, ""
    if usual_bytes + index_bytes <= workload.max_bytes:
        return usual, usual_bytes, f"{usual} takes {usual_bytes + index_bytes:,.0f} bytes an image with its index, which fits"
    found = sorted((row for row in stores if row["set"] == SHAPES[workload.backbone]), key=lambda row: -row["bytes"])
    good = [row for row in found if row["lost"] is None or row["lost"] <= LOSS]
    for row in good:
        if row["bytes"] + index_bytes <= workload.max_bytes:
            lost = "was not measured with this backbone: look at what `info` says of the bank's codes"
            if row["lost"] is not None:
                lost = f"was measured with efficientnet_lite0, at most {row['lost']:.4f} of AUROC and AUPRO against float32"
            taken = f"takes {row['bytes']:,.0f} bytes an image, and {index_bytes:,.0f} in its index"
            return row["store"], row["bytes"], f"{row['store']} {taken}; what it loses {lost}"
    least = min((row["bytes"] for row in good), default=usual_bytes) + index_bytes
    raise InputError(
        f"max_bytes={workload.max_bytes:g} is too small: the smallest store that loses next to nothing takes {least:,.0f} "
        f"bytes an image with the index of this recipe; raise it"
    )


def _options(workload: Workload, images: Selection, pixels: Selection, losses: Mapping[str, float]) -> list[_Option]:
    """Everything that finds and loses as asked for, whatever it costs."""
    return [
        _Option(
            image=image,
            pixel=pixel,
            image_ms=image["p50_ms"] * images.factor,
            pixel_ms=pixel["pixel_ms"] * pixels.factor,
            memory_bytes=image["memory_bytes_per_image"] * workload.images + pixel["peak_bytes"] * _memory_factor(pixels),
        )
        for image in images.rows
        for pixel in pixels.rows
        if image["recall"] >= RECALL
        and losses.get(name_of(pixel), 1.0) <= LOSS
        and (workload.aligned or pixel["recipe"] not in ALIGNED)
    ]


def _memory_factor(pixels: Selection) -> float:
    """By how much the memory of the search exceeds what was measured: a search of all normals holds something of each."""
    return pixels.factor if "n" in pixels.rows[0] else 1.0


def _choose(options: Sequence[_Option], budget_bytes: int) -> _Option:
    fitting = [option for option in options if option.memory_bytes <= budget_bytes]
    if not fitting:
        least = min((option.memory_bytes for option in options), default=0)
        raise InputError(
            f"memory={format_bytes(budget_bytes)} is too small: "
            f"the least that loses next to nothing takes {format_bytes(least)}"
        )
    fastest_ms = min(option.ms for option in fitting)
    return min((option for option in fitting if option.ms <= _WORTH * fastest_ms), key=lambda option: option.preference)


def _evidence(best: _Option, pixel_rows: Sequence[Row]) -> list[str]:
    image, pixel, evidence = best.image, best.pixel, []
    if pixel["recipe"] != "exact":
        sets = ", ".join(sets_of(pixel_rows, name_of(pixel)))
        evidence.append(f"what the pixel search loses was measured with efficientnet_lite0 on {sets}")
    title = f"{image['factory']} {image['query']}".strip()
    evidence.append(
        f"image search: {title} at N={image['n']:,}: {image['p50_ms']:.2f} ms, recall@{image['k']} {image['recall']:.4f}"
    )
    searched = f"in all of N={pixel['n']:,}" if "n" in pixel else f"at K={pixel['k']}"
    evidence.append(f"pixel search: {name_of(pixel)} {searched}, {pixel['set']}: {pixel['pixel_ms']:.1f} ms")
    return evidence


def _recipe_of(image: Row, pixel: Row) -> Recipe:
    """The packaged recipe with these settings if there is one, and a new one otherwise."""
    like = load_recipe(pixel["recipe"])
    build = Build(image=image["factory"], gallery=like.build.gallery, settings={**like.build.settings, **pixel["build"]})
    query = Query(image=image["query"], settings={**like.query.settings, **pixel["query"]})
    for name in recipe_names():
        packaged = load_recipe(name)
        if (packaged.build, packaged.query) == (build, query):
            return packaged
    return Recipe(name="recommended", description="Made by spade-faiss recommend.", build=build, query=query)
