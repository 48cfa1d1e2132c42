"""The commands that maintain a bank: add, remove, restore, compact, convert, verify, suspects."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spade_faiss.cli.banks import describe_added, describe_losses
from spade_faiss.cli.options import (
    Commands,
    add_cluster,
    add_method,
    add_product,
    add_run,
    add_settings,
    open_detector,
    read_run,
    read_settings,
)
from spade_faiss.cli.text import Finding, Output, describe_calibration, describe_products, names
from spade_faiss.core.errors import InputError
from spade_faiss.core.hints import compact_command, index_command, remove_command, restore_command
from spade_faiss.core.memory import format_bytes
from spade_faiss.core.settings import ReportOptions
from spade_faiss.core.store import STORES

if TYPE_CHECKING:
    from spade_faiss.bank.bank import Bank


# How many suspects the terminal lists; the files hold all.
_LISTED = 10


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    add = commands.add(
        "add",
        _add,
        "add normal images to a bank, with its own backbone and settings; images that it holds are left out",
        "spade-faiss add newly-good/ --bank parts.bank",
    )
    add.add_argument("images", nargs="+", metavar="IMAGES", help="a folder of normal images, an image, or several")
    _add_bank(add)
    add_run(add, groups=True, products=True)
    add_cluster(add)
    for name, run, text in (
        ("remove", _remove, "remove normal images from a bank; `restore` brings them back until the bank is compacted"),
        ("restore", _restore, "restore images that were removed"),
    ):
        command = commands.add(name, run, text, f"spade-faiss {name} line3/0017.png --bank parts.bank")
        command.add_argument("ids", nargs="*", metavar="ID", help="image ids, as reports and `suspects` name them")
        command.add_argument("--list", metavar="FILE", help="a file of ids, one a line")
        command.add_argument("--product", metavar="NAME", help="all images of one product, in a bank of several")
        _add_bank(command)
    compact = commands.add(
        "compact",
        _compact,
        "drop removed images for good, and join small shards",
        "spade-faiss compact parts.bank",
    )
    compact.add_argument("bank", metavar="BANK", help="the bank's folder")
    convert = commands.add(
        "convert",
        _convert,
        "make another bank of the same pictures that stores them in another way, such as as codes; run it again to go on",
        "spade-faiss convert parts.bank small.bank --store int4",
    )
    convert.add_argument("bank", metavar="BANK", help="the bank's folder")
    convert.add_argument("out", metavar="OUT", help="the folder of the new bank")
    convert.add_argument("--store", required=True, help=f"how it stores feature maps: {STORES}")
    convert.add_argument(
        "--no-calibrate", dest="calibrate", action="store_false", help="do not calibrate; results then have no p-values"
    )
    add_run(convert, scores=True, images=False)
    verify = commands.add(
        "verify",
        _verify,
        "read every file of a bank and its indexes, and compare its checksum",
        "spade-faiss verify parts.bank --deep",
    )
    verify.add_argument("bank", metavar="BANK", help="the bank's folder")
    verify.add_argument("--deep", action="store_true", help="check every feature, too")
    suspects = commands.add(
        "suspects",
        _suspects,
        "show the normal images that look least normal compared to the others",
        "spade-faiss suspects parts.bank --out suspects/",
    )
    suspects.add_argument("bank", metavar="BANK", help="the bank's folder")
    suspects.add_argument("--out", required=True, help="the folder to write the report to")
    add_settings(suspects, ReportOptions, only=("shown",))
    add_product(suspects)
    add_method(suspects, without=("localize", "flag_above", "score", "image_scores"))
    add_run(suspects, scores=True, images=False)


def _add(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.extract import add

    return describe_added(add(arguments.images, bank=arguments.bank, run=read_run(arguments)))


def _remove(arguments: argparse.Namespace) -> Output:
    bank, ids = _open(arguments)
    count = bank.remove(ids)
    return {**_counts(bank), "done": count}, [
        f"{bank.path}: removed {count} of {names(ids)}; {bank.size_text} are left",
        f"  bring them back: {restore_command(bank.path)}; drop them for good: {compact_command(bank.path)}",
    ]


def _restore(arguments: argparse.Namespace) -> Output:
    bank, ids = _open(arguments)
    count = bank.restore(ids)
    return {**_counts(bank), "done": count}, [f"{bank.path}: restored {count} of {names(ids)}; {bank.size_text}"]


def _compact(arguments: argparse.Namespace) -> Output:
    from spade_faiss.bank.bank import Bank

    bank = Bank.open(arguments.bank)
    done = bank.compact()
    numbers = {
        **_counts(bank),
        "dropped": done.dropped,
        "bytes_before": done.bytes_before,
        "bytes": done.bytes_after,
        "bytes_written": done.bytes_written,
    }
    lines = [
        f"{bank.path}: dropped {done.dropped} removed images; {format_bytes(done.bytes_after)}, "
        f"before {format_bytes(done.bytes_before)}, written {format_bytes(done.bytes_written)}"
    ]
    if done.bytes_written and any((bank.path / name).is_dir() for name in ("indexes", "products")):
        lines.append(f"  its indexes do not hold the shards that were written: {index_command(bank.path, update=True)}")
    return numbers, lines


def _convert(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.convert import convert

    done = convert(arguments.bank, arguments.out, store=arguments.store, calibrate=arguments.calibrate, run=read_run(arguments))
    bank, codes = done.bank, done.bank.manifest.codes
    before, after = (size / max(1, len(bank.pictures)) for size in (done.bytes_before, bank.bytes_on_disk))
    calibrated = None if done.calibration is None else describe_calibration(bank, done.calibration)
    numbers = {
        "bank": str(bank.path),
        "images": len(bank.pictures),
        "store": str(bank.layout.store),
        "bytes_before": done.bytes_before,
        "bytes": bank.bytes_on_disk,
        "losses": [vars(loss) for loss in codes.losses] if codes else [],
        "index": None if done.index is None else {"recipe": done.index.recipe, "bytes": done.index.bytes},
        "calibration": None if calibrated is None else calibrated[0],
        "notice": done.notice or None,
        "time": {"total_s": done.total_s},
    }
    of_products, told = describe_products(bank, done.products)
    numbers |= {"products": of_products} if of_products else {}
    return numbers, [
        f"{bank.path}: {bank.size_text} as {bank.layout.store}, {format_bytes(after)} each, before {format_bytes(before)}",
        *(describe_losses(codes) if codes else ()),
        *([f"  index {done.index.recipe}: {format_bytes(done.index.bytes)}"] if done.index else []),
        *([f"  {calibrated[1]}"] if calibrated else []),
        *([f"  {done.notice}"] if done.notice else []),
        *told,
    ]


def _verify(arguments: argparse.Namespace) -> Finding:
    from spade_faiss.workflows.verify import verify

    found = verify(arguments.bank, deep=arguments.deep, progress=not arguments.quiet)
    state = f"{len(found.problems)} problems" if found.problems else "nothing is wrong"
    text = f"{arguments.bank}: {found.images} images in {found.shards} shards, {found.indexes} indexes: {state}"
    return Finding(vars(found), [text, *(f"  {problem}" for problem in found.problems)], failed=bool(found.problems))


def _suspects(arguments: argparse.Namespace) -> Output:
    from spade_faiss.workflows.suspects import suspects

    report = read_settings(arguments, ReportOptions)
    found = suspects(open_detector(arguments), out=arguments.out, report=report)
    numbers = {
        "out": str(found.out),
        "images": len(found.ids),
        "suspects": [
            {"id": name, "image_score": float(score)}
            for name, score in zip(found.ids[: report.shown], found.image_score, strict=False)
        ],
        **({"left_out": found.left_out} if found.left_out else {}),
    }
    others = "the others of its product, whose median ranks it" if found.products else "the others"
    lines = [f"{len(found.ids)} normal images, each scored against {others}; the least normal:"]
    lines += [f"  {score:10.4g}  {name}" for name, score in zip(found.ids[:_LISTED], found.image_score, strict=False)]
    lines += [f"  product {name} is left out: {why}" for name, why in found.left_out.items()]
    lines.append(f"look at {found.out / 'report.html'}; all scores are in {found.out / 'suspects.csv'}")
    lines.append(f"remove one with: {remove_command(arguments.bank)}")
    return numbers, lines


def _open(arguments: argparse.Namespace) -> tuple[Bank, list[str]]:
    """Open the bank, and gather the ids that were given."""
    from spade_faiss.bank.bank import Bank

    ids = list(arguments.ids)
    if arguments.list:
        # Invalid UTF-8 cannot be part of an id: it is not found, and named. A byte order mark is not part of the first id.
        text = Path(arguments.list).read_text(encoding="utf-8-sig", errors="replace")
        ids += [line.removesuffix("\r") for line in text.split("\n") if line.strip("\r")]
    bank = Bank.open(arguments.bank)
    if arguments.product is not None:  # removed ones, too: they may be restored
        ids += bank.with_removed().part(arguments.product).pictures.ids
    if not ids:
        raise InputError("no image was named; give ids, --list FILE with one a line, or --product NAME in a bank of several")
    return bank, list(dict.fromkeys(ids))


def _counts(bank: Bank) -> dict[str, object]:
    return {"bank": str(bank.path), "images": len(bank.pictures), "removed": len(bank.removed), "generation": bank.generation}


def _add_bank(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bank", required=True, help="the bank's folder")
