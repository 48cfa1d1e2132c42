"""Declaring commands, and making their options from the dataclasses that declare settings, see `core/settings.py`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from spade_faiss.cli.text import Finding, Output
from spade_faiss.core.declaring import changed
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Caching, Method, Run

if TYPE_CHECKING:
    from spade_faiss.bank.snapshot import Snapshot
    from spade_faiss.scoring.detector import Detector

T = TypeVar("T")


class Commands:
    """Adds commands to a parser; all of them have `--json`, `--quiet`, `--debug`, `--cache` and `--cache-bytes`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        self._common.add_argument("--quiet", action="store_true", help="show no progress bars")
        self._common.add_argument("--debug", action="store_true", help="log more, and show the traceback of an error")
        add_settings(self._common, Caching)
        self._parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        self, name: str, run: Callable[[argparse.Namespace], Output | Finding], text: str, example: str
    ) -> argparse.ArgumentParser:
        """Add a command.

        Args:
            name: the word that calls it.
            run: the function that runs it; it returns what is printed.
            text: what it does, as the list of commands shows it; its own help makes a sentence of it.
            example: a command line that its help ends with.
        """
        command = self._parsers.add_parser(
            name,
            parents=[self._common],
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
        )
        command.set_defaults(run=run, command=name)
        return command


def add_settings(command: argparse._ActionsContainer, cls: type, *, only: tuple[str, ...] = (), usual: str = "") -> None:
    """Add an option for each setting of a dataclass, those of nested dataclasses included. What is not given, no option sets.

    Args:
        command: the parser, or a group of its options.
        cls: the dataclass; fields that are not declared by `core.declaring.setting` have no option.
        only: the names of the fields that get an option; all if it is empty.
        usual: where a value comes from that is not given, if not from the dataclass.
    """
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if only and field.name not in only:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            add_settings(command, hints[field.name], usual=usual)
        elif "help" in field.metadata:
            _add_setting(command, field, field.metadata["kind"] or _plain_type(hints[field.name]), usual)


def read_settings(arguments: argparse.Namespace, cls: type[T], base: T | None = None) -> T:
    """Make the dataclass from the options of `add_settings` that were given; the rest is as in `base`, or at its defaults."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[field.name]):
            inner = None if base is None else getattr(base, field.name)
            values[field.name] = read_settings(arguments, hints[field.name], inner)
        elif "help" in field.metadata and field.name in arguments:
            values[field.name] = getattr(arguments, field.name)
    return cls(**values) if base is None else changed(base, values)


def _add_setting(
    command: argparse._ActionsContainer, field: dataclasses.Field[Any], kind: Callable[[str], Any], usual: str
) -> None:
    declared, name = field.metadata, "--" + field.name.replace("_", "-")
    required = field.default is dataclasses.MISSING
    shown = "" if required or field.default in (None, ()) or kind is bool else f" (default: {usual}{_as_text(field.default)})"
    if kind is bool and field.default:
        command.add_argument(
            f"--no-{name[2:]}", dest=field.name, action="store_false", default=argparse.SUPPRESS, help=declared["help"]
        )
    elif kind is bool:
        command.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=declared["help"])
    else:
        command.add_argument(
            name,
            type=kind,
            required=required,
            default=argparse.SUPPRESS,
            choices=declared["choices"] or None,
            metavar=declared["metavar"],
            help=declared["help"] + shown,
        )


def _plain_type(hint: Any) -> type:
    """Return `X` for the types `X` and `X | None`."""
    found: type = next(kind for kind in get_args(hint) if kind is not type(None)) if isinstance(hint, UnionType) else hint
    return found


def add_run(
    command: argparse.ArgumentParser,
    *,
    scores: bool = False,
    images: bool = True,
    masks: bool = True,
    groups: bool = False,
    products: bool = False,
) -> None:
    """Add the options that `read_run` reads.

    Args:
        command: the parser.
        scores: whether the command scores images, which takes a memory budget.
        images: whether the command reads images, some of which may be unreadable.
        masks: whether these images may come with masks of their own.
        groups: whether they are normal images, which may belong together.
        products: whether they may be of several products, or of a new one.
    """
    names = ("device", *(["engine"] if images else []), "weights", *(["memory"] if scores else []))
    names += ("every", "max_skipped") if images else ()
    names += ("roi",) if images and masks else ()
    names += ("group_by",) if groups else ()
    names += ("products", "product") if products else ()
    add_settings(command, Run, only=names)


def add_cluster(command: argparse.ArgumentParser, *, searches: bool = False) -> None:
    """Add the options of a command that can work on a cluster, which `read_run` reads, too.

    Args:
        command: the parser.
        searches: whether it searches a bank, whose shards may have owners.
    """
    add_settings(command, Run, only=("cluster", *(["replicas"] if searches else [])))


def read_run(arguments: argparse.Namespace) -> Run:
    """Make the `Run` that the options of `add_run` ask for; it shows progress bars unless `--quiet` is given."""
    return dataclasses.replace(read_settings(arguments, Run), progress=not arguments.quiet)


def add_recipe(command: argparse._ActionsContainer) -> None:
    """Add `--recipe`, which is None unless given."""
    command.add_argument("--recipe", help="the name of a recipe, or a YAML file (default: that of the bank)")


def add_product(command: argparse.ArgumentParser) -> None:
    """Add `--product`, which `open_detector` reads."""
    command.add_argument(
        "--product",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="of a bank of several products, the one that all images show (default: each image's nearest normals name it)",
    )


def add_method(command: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """Add the options of the scoring method, which `open_detector` reads.

    Args:
        command: the parser.
        without: the settings of `Method` that the command has no use for.
    """
    add_recipe(command)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="change a query setting of the recipe, such as nprobe=8; may be repeated",
    )
    names = tuple(field.name for field in dataclasses.fields(Method) if field.name not in without)
    add_settings(command, Method, only=names, usual="that of the bank, or ")
    if "localize" in names:
        command.add_argument(
            "--flag-below-p",
            type=float,
            metavar="P",
            help="with --localize flagged, an image gets a map if the p-value of its image score is at most P",
        )


def open_detector(arguments: argparse.Namespace) -> Detector:
    """Open the detector that the options of `add_method`, `add_run` and the bank's folder ask for."""
    from spade_faiss.bank.bank import Bank
    from spade_faiss.scoring.detector import Detector
    from spade_faiss.search.recipe import load_recipe

    whole, product = Bank.open(arguments.bank), getattr(arguments, "product", None)
    bank: Snapshot = whole if product is None else whole.part(product)
    recipe = load_recipe(arguments.recipe or bank.usual.recipe).with_query(dict(arguments.set))
    p = getattr(arguments, "flag_below_p", None)
    if p is not None:
        if getattr(arguments, "localize", None) != "flagged" or "flag_above" in arguments:
            raise InputError("--flag-below-p needs --localize flagged, and excludes --flag-above")
        arguments.localize = "all"
    method = read_settings(arguments, Method, bank.usual.method)
    if p is not None:
        from spade_faiss.decisions.calibration import flag_below_p

        method = flag_below_p(bank, recipe, method, p)
    return Detector.open(whole, recipe=recipe, method=method, run=read_run(arguments), product=product)


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _as_text(value: object) -> str:
    """A default as it would be given."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
