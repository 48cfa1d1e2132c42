"""The commands that make a bank and say what it holds: fit, extract, index, info."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from spade_faiss.cli.options import Commands, add_device, add_max_skipped, add_recipe, add_weights
from spade_faiss.cli.text import Output, format_settings, format_times
from spade_faiss.config import DEFAULT_BACKBONE, DTYPES, FRAMINGS, NORMALIZE, PRECISIONS, Preprocess
from spade_faiss.device import format_bytes

if TYPE_CHECKING:
    from spade_faiss.extract import Fit


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    fit = commands.add(
        "fit",
        _fit,
        "extract normal images into a bank and build its index; what is there already is kept",
        "spade-faiss fit good/ --bank parts.bank --backbone efficientnet_lite0",
    )
    _add_extraction(fit)
    add_recipe(fit)
    extract = commands.add(
        "extract",
        _extract,
        "extract normal images into a bank; run again to go on after an interruption",
        "spade-faiss extract good/ --bank parts.bank",
    )
    _add_extraction(extract)
    index = commands.add(
        "index",
        _index,
        "build a recipe's index over a bank, or bring it up to date; run again to go on after an interruption",
        "spade-faiss index parts.bank --recipe ivf",
    )
    index.add_argument("bank", metavar="BANK", help="the bank's folder")
    add_recipe(index)
    index.add_argument("--rebuild", action="store_true", help="learn and encode everything anew")
    info = commands.add("info", _info, "say what a bank holds", "spade-faiss info parts.bank")
    info.add_argument("bank", metavar="BANK", help="the bank's folder")


def _fit(arguments: argparse.Namespace) -> Output:
    return _describe_fit(_run_fit(arguments, arguments.recipe))


def _extract(arguments: argparse.Namespace) -> Output:
    return _describe_fit(_run_fit(arguments, None))


def _run_fit(arguments: argparse.Namespace, recipe: str | None) -> Fit:
    from spade_faiss.extract import fit

    return fit(
        arguments.images,
        bank=arguments.bank,
        backbone=arguments.backbone,
        weights=arguments.weights,
        precision=arguments.precision,
        preprocess=Preprocess(framing=arguments.framing, resize=arguments.resize, crop=arguments.crop),
        dtype=arguments.dtype,
        normalize=arguments.normalize,
        pool=arguments.pool,
        recipe=recipe,
        device=arguments.device,
        max_skipped=arguments.max_skipped,
        progress=not arguments.quiet,
    )


def _describe_fit(done: Fit) -> Output:
    bank = done.bank
    numbers = {
        "bank": str(bank.path),
        "images": len(bank),
        "added": done.added,
        "present": done.present,
        "skipped": [{"id": item.id, "reason": item.reason} for item in done.skipped],
        "bytes": bank.bytes_on_disk,
        "time": {"total_s": done.total_s, "stage_s": done.stage_s},
        "index": None if done.index is None else {"recipe": done.index.recipe, "bytes": done.index.bytes},
    }
    each = format_bytes(bank.bytes_on_disk / len(bank))
    lines = [
        f"{bank.path}: {len(bank)} normal images, {format_bytes(bank.bytes_on_disk)} ({each} each)",
        f"  added {done.added}, already there {done.present}, skipped {len(done.skipped)}",
        *(f"  skipped {item.id}: {item.reason}" for item in done.skipped),
        *([f"  index {done.index.recipe}: {format_bytes(done.index.bytes)}"] if done.index else []),
        format_times(done.stage_s, done.total_s, done.added),
    ]
    return numbers, "\n".join(lines)


def _index(arguments: argparse.Namespace) -> Output:
    from spade_faiss.bank import Bank
    from spade_faiss.index_build import build_index, built_before
    from spade_faiss.recipe import load_recipe

    bank, recipe = Bank.open(arguments.bank), load_recipe(arguments.recipe)
    before = built_before(bank, recipe)
    built = build_index(bank, recipe, rebuild=arguments.rebuild, progress=not arguments.quiet)
    numbers: dict[str, Any] = {"bank": str(bank.path), "recipe": recipe.name, "built": built is not None}
    if built is None:
        return numbers, f"recipe {recipe.name!r} trains nothing: {bank.path} can be queried as it is"
    numbers |= {
        "images": len(bank),
        "bank_bytes": bank.bytes_on_disk,
        "bytes_before": before,
        "bytes": built.bytes,
        "time": {"total_s": built.total_s},
    }
    lines = [
        f"{bank.path}: index {recipe.name!r} over {len(bank)} images, built in {built.total_s:.2f} s",
        f"  on disk {format_bytes(built.bytes)}, before {format_bytes(before)}; the bank {format_bytes(bank.bytes_on_disk)}",
    ]
    if (image := built.image) is not None:
        lines.append(f"  image    {image.factory}: {format_bytes(image.bytes)}")
    if (gallery := built.gallery) is not None:
        lines.append(f"  gallery  {gallery.gallery} {format_settings(gallery.settings)}: {format_bytes(gallery.bytes)}")
    return numbers, "\n".join(lines)


def _info(arguments: argparse.Namespace) -> Output:
    from spade_faiss.bank import Bank
    from spade_faiss.gallery.store import built_galleries
    from spade_faiss.image_index import built_indexes
    from spade_faiss.results import bank_facts

    bank = Bank.open(arguments.bank)
    indexes, galleries = built_indexes(bank), built_galleries(bank)
    numbers = {
        **bank_facts(bank),
        "indexes": [
            {"recipe": item.recipe, "image": item.factory, "covers": item.count, "bytes": item.bytes} for item in indexes
        ],
        "galleries": [
            {
                "recipe": item.recipe,
                "gallery": item.gallery,
                "settings": item.settings,
                "covers": item.count,
                "bytes": item.bytes,
                "generation": item.generation,
                "build_s": item.build_s,
            }
            for item in galleries
        ],
    }
    source = bank.manifest.source
    lines = [
        f"{bank.path}: {len(bank)} normal images, generation {bank.generation}",
        f"  backbone   {source.backbone if source else 'the features came from another extractor'}",
        *([f"  weights    sha256 {source.weights_sha256}"] if source else []),
        *([f"  images     {_framing(source.preprocess)}, {source.precision}"] if source else []),
        *(
            f"  level      {level.name}: {level.height} x {level.width} locations, {level.channels} channels"
            for level in bank.layout.levels
        ),
        f"  features   {bank.layout.dtype}, normalize {bank.layout.normalize}, pool {bank.layout.pool}",
        f"  disk       {format_bytes(bank.bytes_on_disk)} in {len(bank.manifest.shards)} shards",
        *(
            f"  index      {item.recipe}: {item.factory}, covers {item.count} images, {format_bytes(item.bytes)}"
            for item in indexes
        ),
        *(
            f"  index      {item.recipe}: {item.gallery} {format_settings(item.settings)}, covers {item.count} images, "
            f"{format_bytes(item.bytes)}"
            for item in galleries
        ),
    ]
    return numbers, "\n".join(lines)


def _framing(preprocess: Preprocess) -> str:
    resized = f"shorter side to {preprocess.resize}, " if preprocess.framing == "crop" else ""
    return f"{resized}{preprocess.framing} to {preprocess.crop} x {preprocess.crop}"


def _add_extraction(command: argparse.ArgumentParser) -> None:
    default = Preprocess()
    command.add_argument("images", nargs="+", metavar="IMAGES", help="a folder of normal images, an image, or several")
    command.add_argument("--bank", required=True, help="the bank's folder; made if there is none")
    command.add_argument(
        "--backbone",
        default=DEFAULT_BACKBONE,
        help="a torchvision ResNet, efficientnet_lite0, or timm:NAME (default: %(default)s)",
    )
    add_weights(command)
    add_device(command)
    command.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of the forward pass (default: %(default)s)"
    )
    command.add_argument(
        "--framing",
        choices=FRAMINGS,
        default=default.framing,
        help="the part of an image that is scored: its central square, all of it squeezed into a square, or all of it at its "
        "own aspect ratio (default: %(default)s)",
    )
    command.add_argument(
        "--resize", type=int, default=default.resize, metavar="PIXELS", help="shorter side before a crop (default: %(default)s)"
    )
    command.add_argument(
        "--crop", type=int, default=default.crop, metavar="PIXELS", help="side of the input (default: %(default)s)"
    )
    command.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored maps (default: %(default)s)")
    command.add_argument(
        "--normalize",
        choices=NORMALIZE,
        default="none",
        help="l2: each location's vector to unit length (default: %(default)s)",
    )
    command.add_argument(
        "--pool",
        type=int,
        default=1,
        metavar="CELLS",
        help="average each CELLS x CELLS neighbourhood first (default: %(default)s)",
    )
    add_max_skipped(command)
