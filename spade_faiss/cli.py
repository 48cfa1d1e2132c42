"""The command line: parse, one library call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spade_faiss import __version__
from spade_faiss.config import (
    DEFAULT_BACKBONE,
    DISTANCES,
    DTYPES,
    FRAMINGS,
    FUSIONS,
    LOCALIZE,
    MAX_SKIPPED,
    MEMORY,
    NORMALIZE,
    PRECISIONS,
    SHOWN,
    Preprocess,
)
from spade_faiss.errors import SpadeError

if TYPE_CHECKING:
    from spade_faiss.detector import Detector
    from spade_faiss.extract import Fit
    from spade_faiss.results import Results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error we can name, 2 for wrong usage."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("spade_faiss").setLevel(logging.DEBUG if arguments.debug else logging.NOTSET)
    try:
        numbers, text = arguments.run(arguments)
    except (SpadeError, OSError) as error:
        if arguments.debug:
            raise
        print(f"spade-faiss: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("spade-faiss: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(json.dumps(numbers, default=str) if arguments.json else text)
    return 0


Output = tuple[Mapping[str, Any], str]


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
    lines = [
        f"{bank.path}: {len(bank)} normal images, {_size(bank.bytes_on_disk)} ({_size(bank.bytes_on_disk / len(bank))} each)",
        f"  added {done.added}, already there {done.present}, skipped {len(done.skipped)}",
        *(f"  skipped {item.id}: {item.reason}" for item in done.skipped),
        *([f"  index {done.index.recipe}: {_size(done.index.bytes)}"] if done.index else []),
        _times(done.stage_s, done.total_s, done.added),
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
        f"  on disk {_size(built.bytes)}, before {_size(before)}; the bank itself {_size(bank.bytes_on_disk)}",
        *([f"  image    {built.image.factory}: {_size(built.image.bytes)}"] if built.image else []),
        *(
            [f"  gallery  {built.gallery.gallery} {_settings(built.gallery.settings)}: {_size(built.gallery.bytes)}"]
            if built.gallery
            else []
        ),
    ]
    return numbers, "\n".join(lines)


def _score(arguments: argparse.Namespace) -> Output:
    from spade_faiss.evaluation import score_to

    return _describe_results(
        score_to(
            arguments.images,
            bank=_detector(arguments),
            out=arguments.out,
            overlays=arguments.overlays,
            shown=arguments.shown,
            max_skipped=arguments.max_skipped,
            progress=not arguments.quiet,
        )
    )


def _evaluate(arguments: argparse.Namespace) -> Output:
    from spade_faiss.evaluation import evaluate

    return _describe_results(
        evaluate(
            arguments.dataset,
            bank=_detector(arguments),
            out=arguments.out,
            overlays=arguments.overlays,
            shown=arguments.shown,
            max_skipped=arguments.max_skipped,
            progress=not arguments.quiet,
        )
    )


def _detector(arguments: argparse.Namespace) -> Detector:
    from spade_faiss.detector import Detector
    from spade_faiss.recipe import load_recipe

    return Detector.open(
        arguments.bank,
        recipe=load_recipe(arguments.recipe).with_query(dict(arguments.set)),
        k_image=arguments.k_image,
        k_gallery=arguments.k_gallery,
        kappa=arguments.kappa,
        fusion=arguments.fusion,
        distance=arguments.distance,
        sigma=arguments.sigma,
        localize=arguments.localize,
        flag_above=arguments.flag_above,
        memory=arguments.memory,
        backbone=arguments.backbone,
        weights=arguments.weights,
    )


def _describe_results(done: Results) -> Output:
    numbers: dict[str, Any] = {
        "out": str(done.out),
        "images": done.images,
        "skipped": [{"id": item.id, "reason": item.reason} for item in done.skipped],
        "time": {"total_s": done.total_s, "stage_s": done.stage_s},
        "peak_memory_bytes": done.peak_memory_bytes,
    }
    lines = [f"{done.images} images scored, {len(done.skipped)} skipped"]
    lines += [f"  skipped {item.id}: {item.reason}" for item in done.skipped]
    if (metrics := done.metrics) is not None:
        named = {"image, by kNN": metrics.by_knn, "image, by map maximum": metrics.by_map, "pixel": metrics.pixel}
        lines.append(f"{'':24}{'AUROC':>8}{'AP':>8}{'F1-max':>8}{'AUPRO':>8}")
        numbers["metrics"] = {}
        for name, found in named.items():
            if found is None:
                continue
            values = {"auroc": found.auroc, "ap": found.ap, "f1_max": found.f1_max}
            if found is metrics.pixel:
                values["aupro"] = metrics.pixel.aupro
            numbers["metrics"][name] = values
            lines.append(f"{name:24}" + "".join(f"{value:8.3f}" for value in values.values()))
    lines.append(_times(done.stage_s, done.total_s, done.images))
    lines.append(f"peak memory {_size(done.peak_memory_bytes)}")
    lines.append(f"look at {done.out / 'report.html'}; numbers are in report.json, scores.csv and scores.h5 beside it")
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
        f"  disk       {_size(bank.bytes_on_disk)} in {len(bank.manifest.shards)} shards",
        *(f"  index      {item.recipe}: {item.factory}, covers {item.count} images, {_size(item.bytes)}" for item in indexes),
        *(
            f"  index      {item.recipe}: {item.gallery} {_settings(item.settings)}, covers {item.count} images, "
            f"{_size(item.bytes)}"
            for item in galleries
        ),
    ]
    return numbers, "\n".join(lines)


def _framing(preprocess: Preprocess) -> str:
    resized = f"shorter side to {preprocess.resize}, " if preprocess.framing == "crop" else ""
    return f"{resized}{preprocess.framing} to {preprocess.crop} x {preprocess.crop}"


def _settings(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _times(stage_s: Mapping[str, float], total_s: float, images: int) -> str:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stage_s.items())
    each = f", {1000 * total_s / images:.1f} ms an image" if images else ""
    return f"time {total_s:.2f} s{each} (seconds by stage, decoding runs beside the rest: {parts})"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--quiet", action="store_true", help="show no progress")
    common.add_argument("--debug", action="store_true", help="log more, and show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="spade-faiss",
        description="Find what is wrong in an image by searching in images where nothing is wrong.",
        epilog="example: spade-faiss fit good/ --bank parts.bank && spade-faiss score new/ --bank parts.bank --out results/",
    )
    parser.add_argument("--version", action="version", version=f"spade-faiss {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, parents=[common], help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: {example}"
        )
        command.set_defaults(run=run)
        return command

    fit = add(
        "fit",
        _fit,
        "extract normal images into a bank and build its index; what is there already is kept",
        "spade-faiss fit good/ --bank parts.bank --backbone efficientnet_lite0",
    )
    _add_extraction(fit)
    _add_recipe(fit)
    extract = add(
        "extract",
        _extract,
        "extract normal images into a bank; run again to go on after an interruption",
        "spade-faiss extract good/ --bank parts.bank",
    )
    _add_extraction(extract)
    index = add(
        "index",
        _index,
        "build a recipe's index over a bank, or bring it up to date; run again to go on after an interruption",
        "spade-faiss index parts.bank --recipe ivf",
    )
    index.add_argument("bank", metavar="BANK", help="the bank's folder")
    _add_recipe(index)
    index.add_argument("--rebuild", action="store_true", help="learn and encode everything anew")
    score = add(
        "score",
        _score,
        "score images and write scores, maps and a report",
        "spade-faiss score new/ --bank parts.bank --out results/ --overlays",
    )
    score.add_argument("images", nargs="+", metavar="IMAGES", help="a folder, an image, or several")
    _add_scoring(score)
    evaluate = add(
        "evaluate",
        _evaluate,
        "score a labelled set (test/<kind>, ground_truth/<kind>) and measure",
        "spade-faiss evaluate bottle/ --bank bottle.bank --out results/",
    )
    evaluate.add_argument("dataset", metavar="DATASET", help="a folder laid out as MVTec AD")
    _add_scoring(evaluate)
    info = add("info", _info, "say what a bank holds", "spade-faiss info parts.bank")
    info.add_argument("bank", metavar="BANK", help="the bank's folder")
    return parser


def _add_extraction(command: argparse.ArgumentParser) -> None:
    default = Preprocess()
    command.add_argument("images", nargs="+", metavar="IMAGES", help="a folder of normal images, an image, or several")
    command.add_argument("--bank", required=True, help="the bank's folder; made if there is none")
    command.add_argument(
        "--backbone",
        default=DEFAULT_BACKBONE,
        help="a torchvision ResNet, efficientnet_lite0, or timm:NAME (default: %(default)s)",
    )
    _add_weights(command)
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
    _add_max_skipped(command)


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bank", required=True, help="the bank's folder")
    command.add_argument("--out", required=True, help="the folder to write results to")
    _add_recipe(command)
    for name, default, text in (
        ("--k-image", 5, "nearest normals that the image score averages"),
        ("--k-gallery", 5, "nearest normals whose maps are searched"),
        ("--kappa", 1, "nearest vectors that a pixel score averages"),
    ):
        command.add_argument(name, type=int, default=default, metavar="K", help=f"{text} (default: %(default)s)")
    command.add_argument("--fusion", choices=FUSIONS, default="mean", help="of the pyramid levels (default: %(default)s)")
    command.add_argument("--distance", choices=DISTANCES, default="l2", help="of every score (default: %(default)s)")
    command.add_argument(
        "--sigma", type=float, default=4.0, metavar="PIXELS", help="of the Gaussian over the map (default: %(default)s)"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="a query setting of the recipe, for instance nprobe=8; may be repeated",
    )
    command.add_argument("--localize", choices=LOCALIZE, default="all", help="which images get a map (default: %(default)s)")
    command.add_argument("--flag-above", type=float, metavar="SCORE", help="the image score above which 'flagged' looks")
    command.add_argument(
        "--memory",
        default=MEMORY,
        metavar="SIZE",
        help="that scoring may take, such as 500MB; batches and caches follow from it (default: %(default)s)",
    )
    command.add_argument("--backbone", help="must be the bank's, which is used anyway")
    _add_weights(command)
    command.add_argument("--overlays", action="store_true", help="write a PNG of each image under its heat map")
    command.add_argument(
        "--shown", type=int, default=SHOWN, metavar="N", help="images that the report shows in full (default: %(default)s)"
    )
    _add_max_skipped(command)


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", default="exact", help="a recipe's name, or a YAML file (default: %(default)s)")


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument("--weights", metavar="FILE", help="a state dict (.safetensors or saved by torch) for the backbone")


def _add_max_skipped(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-skipped",
        type=int,
        default=MAX_SKIPPED,
        metavar="N",
        help="unreadable images to leave out before giving up (default: %(default)s)",
    )
