"""Options that several commands have, and how a command is declared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from spade_faiss.cli.text import Finding, Output
from spade_faiss.core.settings import DEVICE, DISTANCES, FUSIONS, LOCALIZE, MAX_SKIPPED, MEMORY

if TYPE_CHECKING:
    from spade_faiss.scoring.detector import Detector


class Commands:
    """Declares the commands of a parser; all of them have `--json`, `--quiet` and `--debug`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        self._common.add_argument("--quiet", action="store_true", help="show no progress")
        self._common.add_argument("--debug", action="store_true", help="log more, and show the traceback of an error")
        self._parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        self, name: str, run: Callable[[argparse.Namespace], Output | Finding], text: str, example: str
    ) -> argparse.ArgumentParser:
        """Declare a command: what it runs, its help, a line to copy."""
        command = self._parsers.add_parser(
            name,
            parents=[self._common],
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
        )
        command.set_defaults(run=run)
        return command


def add_method(command: argparse.ArgumentParser) -> None:
    """The options of how images are scored, and which of them get a map, see `open_detector`."""
    add_way(command)
    command.add_argument("--localize", choices=LOCALIZE, default="all", help="which images get a map (default: %(default)s)")
    command.add_argument("--flag-above", type=float, metavar="SCORE", help="the image score above which 'flagged' looks")
    command.add_argument(
        "--flag-below-p", type=float, metavar="P", help="the p-value of the image score up to which 'flagged' looks"
    )


def add_way(command: argparse.ArgumentParser) -> None:
    """The options of how images are scored."""
    add_recipe(command)
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
    command.add_argument(
        "--memory",
        default=MEMORY,
        metavar="SIZE",
        help="that scoring may take, such as 500MB; batches and caches follow from it (default: %(default)s)",
    )
    add_device(command)
    command.add_argument("--backbone", help="must be the bank's, which is used anyway")
    add_weights(command)


def open_detector(arguments: argparse.Namespace) -> Detector:
    """The detector that the options of `add_method` ask for, over the bank of `--bank`."""
    from spade_faiss.scoring.detector import Detector
    from spade_faiss.search.recipe import load_recipe

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
        flag_below_p=arguments.flag_below_p,
        memory=arguments.memory,
        device=arguments.device,
        backbone=arguments.backbone,
        weights=arguments.weights,
    )


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def add_recipe(command: argparse._ActionsContainer) -> None:
    """--recipe."""
    command.add_argument("--recipe", default="exact", help="a recipe's name, or a YAML file (default: %(default)s)")


def add_device(command: argparse.ArgumentParser) -> None:
    """--device."""
    command.add_argument(
        "--device", default=DEVICE, help="where to compute: cpu, cuda, cuda:NUMBER, cuda:all, or auto (default: %(default)s)"
    )


def add_weights(command: argparse.ArgumentParser) -> None:
    """--weights."""
    command.add_argument("--weights", metavar="FILE", help="a state dict (.safetensors or saved by torch) for the backbone")


def add_max_skipped(command: argparse.ArgumentParser) -> None:
    """--max-skipped."""
    command.add_argument(
        "--max-skipped",
        type=int,
        default=MAX_SKIPPED,
        metavar="N",
        help="unreadable images to leave out before giving up (default: %(default)s)",
    )
