"""The command that chooses settings: tune."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spade_faiss.cli.options import Commands, add_run, add_settings, read_run, read_settings
from spade_faiss.cli.text import Output
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Tuning

if TYPE_CHECKING:
    from spade_faiss.tuning.record import Record, Tried
    from spade_faiss.workflows.tune import Tuned


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    tune = commands.add(
        "tune",
        _tune,
        "choose the settings of a bank by normal images and spoilt copies of them; if interrupted, run it again to go on",
        "spade-faiss tune good/ --bank parts.bank --out tuning/",
    )
    tune.add_argument("images", nargs="*", metavar="IMAGES", help="a folder of normal images, an image, or several")
    tune.add_argument("--bank", required=True, help="the bank's folder; made by what is chosen if there is none")
    tune.add_argument("--out", help="a folder for a page with the spoilt pictures and their maps (default: none is written)")
    tune.add_argument("--undo", action="store_true", help="search the bank again as before it was tuned; takes no images")
    add_settings(tune, Tuning)
    add_settings(tune, Extraction, usual="for a new bank, that of the choice, or ")
    add_run(tune, scores=True, masks=False)


def _tune(arguments: argparse.Namespace) -> Output:
    from spade_faiss.bank.facts import facts_of
    from spade_faiss.workflows.tune import tune, undo_tuning

    # `--roi` is a setting of a new bank here.
    run = replace(read_run(arguments), roi=None)
    if arguments.undo:
        if arguments.images:
            raise InputError("--undo takes no images; it goes back to how the bank was searched before")
        bank = undo_tuning(arguments.bank, run=run)
        return {"bank": str(bank.path), "usual": facts_of(bank)["usual"]}, [f"{bank.path}: searched as before it was tuned"]
    if not arguments.images:
        raise InputError("no image was named; give a folder of normal images, or --undo")
    done = tune(
        arguments.images,
        bank=arguments.bank,
        extraction=read_settings(arguments, Extraction),
        tuning=read_settings(arguments, Tuning),
        out=arguments.out,
        run=run,
    )
    return describe_tuned(done, arguments.out)


def describe_tuned(done: Tuned, out: str | None) -> Output:
    """Describe a choice, in numbers and as a table."""
    from dataclasses import asdict

    numbers: dict[str, Any] = {
        "bank": str(done.bank.path),
        "out": out,
        "tuning": None if done.record is None else asdict(done.record),
        "notice": done.notice or None,
        "time": done.timing_s,
    }
    lines = [] if done.record is None else _table(done.record)
    lines += [f"  {done.notice}"] if done.notice else []
    lines += [f"look at {out}/tuning.html"] if out is not None and done.record is not None else []
    return numbers, lines


def _table(record: Record) -> list[str]:
    """The options that were tried, the best first, with their differences to the default; `*` marks what was chosen."""
    lines, choice = [], record.input
    if choice is not None:
        lines += _rows(choice.tried, (choice.chosen, choice.default))
        lines.append(f"  {choice.reason}; {choice.found} of {choice.defects} defects count, wherever a picture shows them")
        lines += [f"  the budget left out {choice.left_out} inputs"] if choice.left_out else []
        lines += ["", f"  by {choice.chosen}:"]
    lines += _rows(record.options, (record.chosen, record.default))
    lines.append(f"  differences to the default (d), with 95 % intervals; ! is surely better; of {record.defects} defects")
    lines.append(f"  {record.found} are found by most options, and count: {record.reason}")
    if record.left_out:
        lines.append(f"  the budget left out {record.left_out} ways to make maps")
    return lines


def _rows(options: Sequence[Tried], names: tuple[str, str]) -> list[str]:
    """A table of options; `names` are those of the choice and of the default."""
    width, (chosen, default) = max(len(tried.name) for tried in options), names
    lines = [f"  {'':{width}}  pictures                  maps                      ms an image  kB an image  MiB of memory"]
    for tried in sorted(options, key=lambda each: -each.image.difference):
        mark = "*" if tried.name == chosen else "d" if tried.name == default else " "
        cells = [
            f"{each.difference:+.3f} ({each.low:+.3f} {each.high:+.3f}){'!' if each.sure else ' '}"
            for each in (tried.image, tried.maps)
        ]
        costs = f"{tried.total_ms:11.1f}  {tried.bytes / 1000:11.1f}  {(tried.memory or 0) / 2**20:13.0f}"
        lines.append(f"{mark} {tried.name:{width}}  {cells[0]:24}  {cells[1]:24}  {costs}")
    return lines
