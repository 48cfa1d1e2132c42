"""A choice of settings as a page: the options beside each other, and maps of spoilt pictures by the default and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from spade_faiss.report.model import Card, CardGroup, Headline, ImageRow, Report, Table
from spade_faiss.report.pictures import shrink, shrink_factor, shrink_map, shrink_mask
from spade_faiss.tuning.options import Option
from spade_faiss.tuning.record import ChosenInput, Compared, Record, Tried
from spade_faiss.tuning.search import Found

# How many pictures are shown by each setting.
_SHOWN = 8


def tuning_page(found: Found, record: Record) -> Report:
    """Lay out a choice."""
    changed = found.chosen.option != found.default
    settings = [("the default", found.options[found.default])] + ([("what was chosen", found.option)] if changed else [])
    groups = tuple(_group(found, *setting) for setting in settings)
    spoilt = "real defects" if not found.samples.spoils else "spoilt copies"
    return Report(
        title="Tuning",
        subtitle=record.reason[0].upper() + record.reason[1:] + ".",
        notices=_notices(record),
        headlines=(
            Headline(label="Choice", value="changed" if changed else "the default", note=record.chosen),
            Headline(label="Pictures", value=record.pictures, note="normal ones that were scored"),
            Headline(label="Defects", value=record.defects, note=f"{spoilt}, of which options find {record.found}"),
        ),
        summary=(
            *_input_tables(record.input),
            _table(record.options, (record.chosen, record.default), "image", "Pictures", _IMAGE_NOTE),
            _table(record.options, (record.chosen, record.default), "maps", "Maps", _MAP_NOTE),
        ),
        groups=groups,
        colors=(1.0, 2.0),
        images=tuple({card.image.id: card.image for group in groups for card in group.cards}.values()),
        score=found.option.score,
        details=(_costs("Costs", record.options),),
    )


_IMAGE_NOTE = (
    "The chance that a defective picture scores above a normal one; differences to the default are paired by picture, with "
    "95 % intervals. Sure: better, allowed for that so many options were tried."
)
_MAP_NOTE = "How much of a defect is found at false positive rates of up to 0.3 (AUPRO), likewise."


def _notices(record: Record) -> tuple[str, ...]:
    found = [f"The budget left out {record.left_out} ways to make maps."] if record.left_out else []
    if record.input is not None and record.input.left_out:
        found.append(f"The budget left out {record.input.left_out} inputs.")
    return tuple(found)


def _input_tables(choice: ChosenInput | None) -> tuple[Table, ...]:
    """What networks and inputs were compared by, where there were several; their settings are the default ones."""
    if choice is None:
        return ()
    names = (choice.chosen, choice.default)
    said = f"{choice.reason[0].upper()}{choice.reason[1:]}; {choice.found} of {choice.defects} defects count. "
    hidden = "A defect that an input cuts off is one that it misses."
    return (
        _table(choice.tried, names, "image", "Inputs: pictures", said + hidden),
        _table(choice.tried, names, "maps", "Inputs: maps", f"{_MAP_NOTE} Maps are compared on the whole picture. {hidden}"),
        _costs("Inputs: costs", choice.tried),
    )


def _table(options: Sequence[Tried], names: tuple[str, str], which: str, title: str, note: str) -> Table:
    """Options beside each other; `names` are those of the choice and of the default."""
    rows: list[tuple[str, float | None, float, str, str]] = []
    chosen, default = names
    for tried in options:
        own: Compared = getattr(tried, which)
        mark = " (chosen)" if tried.name == chosen else " (default)" if tried.name == default else ""
        interval = f"{own.low:+.3f} to {own.high:+.3f}"
        rows.append((tried.name + mark, own.value, own.difference, interval, "yes" if own.sure else "no"))
    first, rest = rows[:1], sorted(rows[1:], key=lambda row: -row[2])
    header = ("settings", "value", "difference", "interval", "sure")
    return Table(title=title, header=header, rows=(*first, *rest), note=note)


def _costs(title: str, options: Sequence[Tried]) -> Table:
    rows = tuple(
        (
            tried.name,
            None if tried.forward_ms is None else round(tried.forward_ms, 1),
            round(tried.ms, 1),
            round(tried.bytes),
            None if tried.memory is None else round(tried.memory / 2**20),
            "yes" if tried.allowed else "no",
        )
        for tried in options
    )
    header = ("settings", "ms of the network", "ms of the search", "bytes an image", "MiB of memory", "allowed")
    note = "Milliseconds are of an image, on this machine; memory is what scoring takes while it runs, without the cache."
    return Table(title=title, header=header, rows=rows, note=note, decimals=1)


def _group(found: Found, title: str, option: Option) -> CardGroup:
    trial, samples, cards = found.trial(option), found.samples, []
    # Settings have scales of their own: in units of the median normal picture's maximum, maps can be compared.
    unit = max(float(np.median(trial.normal["max"])), float(np.finfo(np.float32).tiny))
    for place, (number, picture) in enumerate(samples.shown.items()):
        if place == _SHOWN:
            break
        scores = (trial.shown[place] / np.float32(unit)).astype(np.float32)
        peak = np.unravel_index(int(scores.argmax()), scores.shape)
        name = samples.kinds[number]
        if samples.spoils:
            how = samples.spoils[number]
            name = f"{how.kind}, {100 * how.size:.1f} % of the picture, strength {how.strength:.2f}"
        row = ImageRow(
            id=f"{samples.spoilt.ids[number]} by {title}",
            scores={kind: float(values[number]) for kind, values in trial.spoilt.items()},
            neighbor_id=str(samples.spoilt.ids[number]),
            neighbor_dist=math.nan,
            kind=name,
            defective=True,
        )
        cards.append(
            Card(
                image=row,
                map=shrink_map(scores),
                peak=(int(peak[0]), int(peak[1])),
                picture=shrink(picture),
                mask=None if samples.masks is None else shrink_mask(samples.masks[number]),
                shrunk=shrink_factor(scores.shape),
            )
        )
    note = f"{option.name}; colors in units of the highest pixel of a median normal picture, from 1 to 2"
    return CardGroup(title=f"Maps by {title}", cards=tuple(cards), note=note)


def tuning_numbers(record: Record) -> dict[str, Any]:
    """Every number of a choice, for tuning.json."""
    return asdict(record)
