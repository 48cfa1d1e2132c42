"""The commands that make a bank and show what it holds: fit, extract, index, info."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from spade_faiss.cli.options import Commands, add_cluster, add_recipe, add_run, add_settings, read_run, read_settings
from spade_faiss.cli.text import Output, describe_calibration, describe_products, format_settings, format_times, names
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction, Preprocess, Source
from spade_faiss.core.hints import index_command
from spade_faiss.core.memory import format_bytes
from spade_faiss.core.settings import Indexing, Run

if TYPE_CHECKING:
    from spade_faiss.bank.bank import Bank
    from spade_faiss.bank.codes import CodesEntry
    from spade_faiss.core.presets import Preset
    from spade_faiss.index.build import Built
    from spade_faiss.index.gallery_manifest import GalleryIndexManifest
    from spade_faiss.workflows.extract import Added
    from spade_faiss.workflows.info import BankInfo


# How many entries of its history `info` shows, the last ones.
_EVENTS = 10


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    fit = commands.add(
        "fit",
        _fit,
        "extract normal images into a bank, build its indexes and calibrate it; what is there already is kept",
        "spade-faiss fit good/ --bank parts.bank --backbone efficientnet_lite0",
    )
    _add_extraction(fit)
    fit.add_argument(
        "--recipe", metavar="NAME", help="the recipe that the bank will be searched by (default: that of the preset)"
    )
    fit.add_argument(
        "--no-calibrate",
        dest="calibrate",
        action="store_false",
        help="do not calibrate; results then have no p-values",
    )
    fit.add_argument(
        "--tune",
        action="store_true",
        help="choose how features are stored and searched by spoilt copies of the images, see `tune`; for a new bank",
    )
    extract = commands.add(
        "extract",
        _extract,
        "extract normal images into a bank; after an interruption, run it again to go on",
        "spade-faiss extract good/ --bank parts.bank",
    )
    _add_extraction(extract)
    index = commands.add(
        "index",
        _index,
        "build a recipe's indexes, or bring them up to date; after an interruption, run it again to go on",
        "spade-faiss index parts.bank --recipe ivf",
    )
    index.add_argument("bank", metavar="BANK", help="the bank's folder")
    which = index.add_mutually_exclusive_group()
    add_recipe(which)
    add_settings(index, Indexing)
    which.add_argument("--update", action="store_true", help="bring all indexes that were built before up to date")
    index.add_argument("--rebuild", action="store_true", help="train and encode everything anew")
    add_cluster(index)
    info = commands.add(
        "info", _info, "show what a bank holds, and how its indexes compare to it", "spade-faiss info parts.bank"
    )
    info.add_argument("bank", metavar="BANK", help="the bank's folder")


def _fit(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.fit import fit

    if arguments.tune:
        return _fit_tuned(arguments)
    done = fit(
        arguments.images,
        bank=arguments.bank,
        preset=_preset(arguments),
        calibrate=arguments.calibrate,
        run=_read_run(arguments),
    )
    calibrated = None if done.calibration is None else describe_calibration(done.bank, done.calibration)
    numbers, added = describe_added(done)
    numbers = {
        **numbers,
        "index": None if done.index is None else {"recipe": done.index.recipe, "bytes": done.index.bytes},
        "calibration": None if calibrated is None else calibrated[0],
        "notice": done.notice or None,
    }
    of_products, told = describe_products(done.bank, done.products)
    numbers |= {"products": of_products} if of_products else {}
    lines = [
        *added,
        *([f"  index {done.index.recipe}: {format_bytes(done.index.bytes)}"] if done.index else []),
        *([f"  {calibrated[1]}"] if calibrated else []),
        *([f"  {done.notice}"] if done.notice else []),
        *told,
    ]
    return numbers, lines


def _fit_tuned(arguments: argparse.Namespace) -> Output:
    from spade_faiss.cli.tuning import describe_tuned
    from spade_faiss.workflows.tune import tune

    if arguments.preset is not None or arguments.recipe is not None or not arguments.calibrate:
        raise InputError(
            "--tune chooses the preset and its recipe, and calibrates; leave --preset, --recipe, --no-calibrate out"
        )
    return describe_tuned(
        tune(
            arguments.images,
            bank=arguments.bank,
            extraction=read_settings(arguments, Extraction),
            run=_read_run(arguments),
        ),
        None,
    )


def _extract(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.extract import extract

    return describe_added(
        extract(
            arguments.images,
            bank=arguments.bank,
            preset=_preset(arguments),
            run=_read_run(arguments),
        )
    )


def _preset(arguments: argparse.Namespace) -> Preset:
    """The preset that is asked for, or that of the bank, with the settings that were given in place of its own."""
    from spade_faiss.workflows.extract import choose_preset

    preset = choose_preset(arguments.bank, arguments.preset)
    recipe = getattr(arguments, "recipe", None) or preset.recipe
    return replace(preset, recipe=recipe, extraction=read_settings(arguments, Extraction, preset.extraction))


def _read_run(arguments: argparse.Namespace) -> Run:
    """The run that makes a bank, where `--roi`, `--group-by` and `--products` are settings of the bank."""
    return dataclasses.replace(read_run(arguments), roi=None, group_by=None, products=None)


def _describe_network(bank: Bank, source: Source) -> str:
    """Say what ran the forward pass, and what else may."""
    network = bank.manifest.network
    if network is None:
        return f"made by {source.engine}; it carries no network"
    apart = ", ".join(f"{engine} {number:.1e}" for engine, number in network.differences.items())
    return f"made by {source.engine}; it carries its network, {format_bytes(network.bytes)}; beside torch: {apart}"


def describe_added(done: Added) -> Output:
    """Describe what was extracted into a bank."""
    bank = done.bank
    numbers = {
        "bank": str(bank.path),
        "images": len(bank.pictures),
        "entries": len(bank),
        "added": done.added,
        "present": done.present,
        "removed": list(done.removed),
        "duplicates": [{"id": item.id, "of": item.of} for item in done.duplicates],
        "skipped": [{"id": item.id, "reason": item.reason} for item in done.skipped],
        "left_out": done.left_out.numbers(),
        "visible": vars(done.visible),
        "few_images": bank.few_images_notice or None,
        "bytes": bank.bytes_on_disk,
        "time": {"total_s": done.total_s, "timing_s": done.timing_s},
    }
    each = format_bytes(bank.bytes_on_disk / max(1, len(bank.pictures)))
    lines = [
        f"{bank.path}: {bank.size_text}, {format_bytes(bank.bytes_on_disk)} ({each} each)",
        f"  added {done.added}, already there {done.present}, skipped {len(done.skipped)}",
        *(f"  left out {item.id}: it is the same image as {item.of}" for item in done.duplicates),
        *(f"  skipped {item.id}: {item.reason}" for item in done.skipped),
        *(f"  {notice}" for notice in (*done.left_out.notices(), *done.visible.notices())),
    ]
    if (source := bank.manifest.source) is not None and (depth := source.preprocess.bit_depth) is not None:
        lines.append(f"  of 16 bits, {depth} are used (if the camera gives another number, make a new bank with --bit-depth)")
    if (source := bank.manifest.source) is not None:
        numbers["engine"] = source.engine
        lines.append(f"  {_describe_network(bank, source)}")
    if done.no_network:
        numbers["no_network"] = done.no_network
        lines.append(f"  {done.no_network}")
    if done.removed:
        lines.append(f"  left out {len(done.removed)} that were removed from the bank before: {names(done.removed)}")
    lines += [f"  {notice}"] if (notice := bank.few_images_notice) else []
    lines.append(format_times(done.timing_s, done.total_s, done.added))
    return numbers, lines


def _index(arguments: argparse.Namespace) -> Output:
    from spade_faiss.bank.bank import Bank
    from spade_faiss.index.build import build_index, update_indexes
    from spade_faiss.search.recipe import load_recipe
    from spade_faiss.workflows.index_pieces import encode_by

    bank, progress, levels = Bank.open(arguments.bank), not arguments.quiet, read_settings(arguments, Indexing).levels
    encode = encode_by(read_settings(arguments, Run), bank)
    if arguments.update:
        if levels:
            raise InputError("--update keeps the levels of all indexes; name the --recipe whose --levels are to change")
        built = update_indexes(bank, rebuild=arguments.rebuild, progress=progress, encode=encode)
        nothing = f"no index was built beside {bank.path}: there is nothing to update"
    else:
        recipe = load_recipe(arguments.recipe or bank.usual.recipe).with_levels(levels)
        one = build_index(bank, recipe, rebuild=arguments.rebuild, progress=progress, encode=encode)
        built = [] if one is None else [one]
        nothing = f"recipe {recipe.name!r} needs no index: {bank.path} can be searched as it is"
    numbers = {
        "bank": str(bank.path),
        "images": len(bank.pictures),
        "bank_bytes": bank.bytes_on_disk,
        "built": [
            {
                "recipe": item.recipe,
                "done": item.done,
                "bytes_before": item.bytes_before,
                "bytes": item.bytes,
                "time": {"total_s": item.total_s},
                **({"products": {name: part.done for name, part in item.products.items()}} if item.products else {}),
            }
            for item in built
        ],
    }
    return numbers, [line for item in built for line in _describe_built(item, bank)] or [nothing]


def _describe_built(built: Built, bank: Bank) -> list[str]:
    sizes = (
        f"{format_bytes(built.bytes)}, before {format_bytes(built.bytes_before)}; the bank {format_bytes(bank.bytes_on_disk)}"
    )
    of = f"{len(bank)} {'images' if bank.pictures.are_rows else 'entries'}"
    lines = [f"{bank.path}: index {built.recipe!r} over {of}, {built.total_s:.2f} s", f"  on disk {sizes}"]
    if (image := built.image) is not None:
        lines.append(f"  image    {image.factory}: {format_bytes(image.bytes)}, {built.done['image']}")
    if (gallery := built.gallery) is not None:
        how = f"{gallery.gallery} {format_settings(gallery.settings)}{_of_levels(gallery)}"
        lines.append(f"  gallery  {how}: {format_bytes(gallery.bytes)}, {built.done['gallery']}")
    for name, part in built.products.items():
        lines.append(f"  product {name}: {format_bytes(part.bytes)}, {', '.join(part.done.values())}")
    return lines


def _of_levels(gallery: GalleryIndexManifest) -> str:
    return f" of {', '.join(gallery.levels)}" if gallery.levels else ""


def _info(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.info import info

    found = info(arguments.bank)
    calibrations = [describe_calibration(found.bank, item) for item in found.calibrations]
    return _info_numbers(found, calibrations), list(_info_lines(found, calibrations))


def _info_numbers(found: BankInfo, calibrations: list[tuple[dict[str, object], str]]) -> dict[str, object]:
    from spade_faiss.bank.facts import facts_of

    bank = found.bank
    return {
        **facts_of(bank),
        "removed": sorted(bank.removed),
        "history": [vars(event) for event in bank.manifest.history],
        "readers": bank.readers(),
        "indexes": [
            {
                "recipe": item.recipe,
                "image": item.factory,
                "bytes": item.bytes,
                "generation": item.generation,
                **vars(stale),
            }
            for item, stale in found.images
        ],
        "galleries": [
            {
                "recipe": item.recipe,
                "gallery": item.gallery,
                "settings": item.settings,
                "levels": list(item.levels) or [level.name for level in bank.layout.levels],
                "bytes": item.bytes,
                "generation": item.generation,
                "build_s": item.build_s,
                **vars(stale),
            }
            for item, stale in found.galleries
        ],
        "calibrations": [numbers for numbers, _ in calibrations],
        **({"products": {part.bank.product: _product_numbers(part) for part in found.products}} if found.products else {}),
    }


def _product_numbers(part: BankInfo) -> dict[str, object]:
    return {
        "images": len(part.bank.pictures),
        "removed": sorted(part.bank.removed),
        "bytes": part.bank.bytes_on_disk,
        "galleries": [{"recipe": item.recipe, "bytes": item.bytes, **vars(stale)} for item, stale in part.galleries],
        "calibrations": [describe_calibration(part.bank, item)[0] for item in part.calibrations],
    }


def _product_lines(found: BankInfo) -> Iterator[str]:
    from spade_faiss.decisions.rules import few_images_notice

    for part in found.products:
        bank = part.bank
        removed = f", {len(bank.removed)} removed ones" if bank.removed else ""
        yield f"  product    {bank.product}: {bank.size_text}{removed}, {format_bytes(bank.bytes_on_disk)}"
        for gallery, stale in part.galleries:
            yield f"    index    {gallery.recipe}: {gallery.gallery}, {stale}, {format_bytes(gallery.bytes)}"
        if not part.calibrations:
            yield "    not calibrated: there are no verdicts on its pictures"
        for item in part.calibrations:
            few = few_images_notice(item, bank.usual.method.image_scores)
            yield f"    {describe_calibration(bank, item)[1]}" + (f"; {few}" if few else "")


def _info_lines(found: BankInfo, calibrations: list[tuple[dict[str, object], str]]) -> Iterator[str]:
    bank, manifest, layout = found.bank, found.bank.manifest, found.bank.layout
    removed = f", {len(bank.removed)} removed ones until it is compacted" if bank.removed else ""
    yield f"{bank.path}: {bank.size_text}{removed}, generation {bank.generation}"
    if (source := manifest.source) is None:
        yield "  backbone   the features came from another extractor"
    else:
        yield f"  backbone   {source.backbone}"
        yield f"  weights    sha256 {source.weights_sha256}"
        yield f"  images     {_resizing(source.preprocess)}, {source.precision}"
    if (roi := layout.roi) is not None:
        yield f"  inspected  {100 * roi.share:.1f} % of the input: its region of interest"
    if layout.own_rois:
        yield "  inspected  a region of interest of each picture's own"
    pool = ",".join(map(str, layout.pool)) if isinstance(layout.pool, tuple) else layout.pool
    for level in layout.levels:
        part = "" if level.roi is None else f"{level.locations} of "
        coded = "" if level.extracted is None else f", stored as {level.channels} numbers"
        yield f"  level      {level.name}: {part}{level.height} x {level.width} locations, {level.shape[-1]} channels{coded}"
    yield f"  features   {layout.store}, normalize {layout.normalize}, pool {pool}"
    if manifest.codes is not None:
        yield from describe_losses(manifest.codes)
    usual, k_gallery = bank.usual, bank.usual.method.k_gallery
    of_preset = f"preset {usual.preset}: " if usual.preset else ""
    searched = ",".join(map(str, k_gallery)) if isinstance(k_gallery, tuple) else k_gallery
    at = f" at {', '.join(usual.method.levels)}" if usual.method.levels else ""
    yield f"  searched   {of_preset}recipe {usual.recipe}, k_gallery {searched}{at}; score {usual.method.score}"
    if notice := bank.few_images_notice:
        yield f"  few images {notice}"
    if (augment := manifest.augment) is not None:
        yield f"  views      {augment}: {augment.views} entries of each image"
    if (grouping := manifest.grouping) is not None:
        yield f"  groups     {grouping}: {len(bank.siblings)} groups; the largest has {bank.siblings.largest} entries"
    if (products := manifest.products) is not None:
        yield f"  products   {len(found.products)} by {products}; each is searched and calibrated by itself"
    yield f"  disk       {format_bytes(bank.bytes_on_disk)} in {len(manifest.shards)} shards"
    for image, stale in found.images:
        yield f"  index      {image.recipe}: {image.factory}, {stale}, {format_bytes(image.bytes)}"
    for gallery, stale in found.galleries:
        settings = f"{gallery.gallery} {format_settings(gallery.settings)}{_of_levels(gallery)}"
        yield f"  index      {gallery.recipe}: {settings}, {stale}, {format_bytes(gallery.bytes)}"
    for _, text in calibrations:
        yield f"  {text}"
    yield from _product_lines(found)
    for event in manifest.history[-_EVENTS:]:
        yield f"  history    {event.time}  {event.action} {event.images} images, generation {event.generation}"
    if found.unindexed:
        yield f"  add the images that are not indexed yet: {index_command(bank.path, update=True)}"


def describe_losses(codes: CodesEntry) -> Iterator[str]:
    """Say what codes lose at each level, as it was measured when the bank was made."""
    if not codes.losses:
        yield "  codes      learned from 1 picture: what they lose cannot be measured"
    for loss in codes.losses:
        yield (
            f"  codes      {loss.level}: distances correlate by {loss.correlation:.4f} with those of float32; "
            f"{100 * loss.found:.1f} % of the vectors that are found are as near, or nearly so"
        )


def _resizing(preprocess: Preprocess) -> str:
    height, width = preprocess.input_size
    to = "shorter side" if height == width else f"to cover {height} x {width} with its shorter side"
    resized = f"{to} to {preprocess.resize}, " if preprocess.resize_mode == "crop" else ""
    depth = "" if preprocess.bit_depth is None else f"{preprocess.bit_depth} of 16 bits, "
    if preprocess.tile is not None:
        resized = "" if preprocess.resize is None else resized
        return f"{depth}{resized}tiles of {height} x {width} that share {preprocess.overlap} pixels or more"
    return f"{depth}{resized}{preprocess.resize_mode} to {height} x {width}"


def _add_extraction(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", metavar="IMAGES", help="a folder of normal images, an image, or several")
    command.add_argument("--bank", required=True, help="the bank's folder; made if there is none")
    command.add_argument(
        "--preset",
        metavar="NAME",
        help="settings that go together, what is stored and how it is searched: default, spade (the method's paper), rad (for "
        "transformers), or a YAML file; options beside it change single settings (default: that of the bank, or default)",
    )
    add_settings(command, Extraction, usual="that of the preset, or ")
    add_run(command, masks=False)
    add_cluster(command)
