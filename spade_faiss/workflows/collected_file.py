"""What is known of the images of a part, as arrays in a file, so that it outlives the command that the part was scored for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.arrays import map_arrays, text_array, write_arrays
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import FileEntry, hash_file
from spade_faiss.decisions.regions import Extent, Region
from spade_faiss.features.datasets import Duplicate, ImageRecord, Skipped
from spade_faiss.features.placement import Placement
from spade_faiss.report.columns import Columns, region_columns
from spade_faiss.scoring.routing import Routes
from spade_faiss.workflows.collected import Collected

_PLACEMENT = ("original", "resized", "offset", "size")
_ROUTE = ("confidence", "p_none", "none")


def write_collected(path: Path, collected: Collected, records: Sequence[ImageRecord], digests: Sequence[str]) -> FileEntry:
    """Write what is known of the images of a part, atomically.

    Args:
        path: the file to make or replace.
        collected: what is known.
        records: all images that the part was asked for, those that could not be read included.
        digests: the sha256 of each of them, empty for one that the system does not read.

    Raises:
        InputError: for a full disk.
    """
    number_of = {record.id: number for number, record in enumerate(records)}
    arrays: Columns = {
        "digest": text_array(digests),
        "image": _numbers(number_of[record.id] for record in collected.records),
        "placement": np.array([[getattr(at, name) for name in _PLACEMENT] for at in collected.placements], np.int64),
        "sha256": text_array(collected.sha256),
        "in_bank/image": _numbers(number_of[item.id] for item in collected.in_bank),
        "in_bank/of": _text([item.of for item in collected.in_bank]),
        "skipped/image": _numbers(number_of[item.id] for item in collected.skipped),
        "skipped/reason": _text([item.reason for item in collected.skipped]),
    }
    if len(collected):
        arrays["statistics"] = np.concatenate(collected.statistics)
        arrays |= {f"image_scores/{name}": values for name, values in collected.scores.items()}
        arrays |= {f"passed_over/{level}": values for level, values in collected.shares.items()}
    if (routes := collected.joined_routes) is not None:
        arrays["routes/product"] = _text(routes.product.tolist())
        arrays |= {f"routes/{name}": np.asarray(getattr(routes, name), np.float64) for name in _ROUTE}
    if collected.regions:
        arrays |= {f"regions/{name}": column for name, column in region_columns(collected.regions).items()}
    # An array of nothing has no place in a file; whoever reads it takes what is missing for nothing.
    held = {name: array for name, array in arrays.items() if array.size}
    marks = {"decided": int(bool(collected.regions))}
    return FileEntry.of(path, write_arrays(path, held, attributes=marks))


def read_collected(path: Path, entry: FileEntry, records: Sequence[ImageRecord]) -> tuple[Collected, list[str]]:
    """Read what `write_collected` wrote of the same images.

    Returns:
        What is known of them, and their digests.

    Raises:
        BankError: if the file is missing, or is not the one that was written.
    """
    if not path.is_file() or hash_file(path) != entry.sha256:
        raise BankError(f"{path} is missing, or is not the file that was written")
    mapped = map_arrays(path, entry.sha256)
    # Copies: the file goes when the results are complete.
    arrays = {name: np.array(array) for name, array in mapped.arrays.items()}

    def column(name: str, dtype: Any = np.int64) -> npt.NDArray[Any]:
        return arrays.get(name, np.empty(0, dtype))

    def text(name: str) -> list[str]:
        return [item.decode() for item in column(name, np.bytes_).tolist()]

    def below(group: str) -> Columns:
        start = f"{group}/"
        return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}

    own = [records[number] for number in column("image").tolist()]
    found = Collected(records=own, sha256=text("sha256"))
    for numbers in column("placement").reshape(-1, len(_PLACEMENT), 2).tolist():
        found.placements.append(Placement(**dict(zip(_PLACEMENT, map(tuple, numbers), strict=True))))
    if mapped.attributes.get("decided"):
        found.regions += _regions_of(below("regions"), len(own))
    if own:
        found.statistics.append(column("statistics"))
        found.image_scores.append(below("image_scores"))
        found.passed_over.append(below("passed_over"))
    if (routes := below("routes")) and own:
        none = routes["none"].astype(np.bool_)
        product = np.array(text("routes/product"), np.str_)
        found.routes.append(Routes(product=product, confidence=routes["confidence"], p_none=routes["p_none"], none=none))
    for number, of in zip(column("in_bank/image").tolist(), text("in_bank/of"), strict=True):
        found.in_bank.append(Duplicate(records[number].id, of))
    for number, reason in zip(column("skipped/image").tolist(), text("skipped/reason"), strict=True):
        found.skipped.append(Skipped(records[number].id, reason))
    digests = text("digest") if "digest" in arrays else [""] * len(records)
    return found, digests


def _numbers(values: Any) -> npt.NDArray[np.int64]:
    return np.fromiter(values, np.int64)


def _text(values: Sequence[str]) -> npt.NDArray[Any]:
    """Text of any kind: a reason may name a file whose name is no UTF-8."""
    return text_array([value.encode("utf-8", "backslashreplace").decode() for value in values])


def _regions_of(columns: Columns, images: int) -> list[list[Region]]:
    """The regions of each image, from the columns that `region_columns` makes of them."""
    found: list[list[Region]] = [[] for _ in range(images)]
    if not columns:
        return found
    extents = [_extents_of(columns, where) for where in ("input", "original")]
    numbers = (columns[name].tolist() for name in ("image", "score", "p_value"))
    for image, score, p_value, at, original in zip(*numbers, *extents, strict=True):
        found[image].append(Region(score=score, p_value=p_value, input=at, original=original))
    return found


def _extents_of(columns: Columns, where: str) -> list[Extent]:
    stops = np.cumsum(columns[f"{where}_runs"])
    counts = np.split(columns[f"{where}_counts"], stops[:-1])
    parts = (columns[f"{where}_{name}"].tolist() for name in ("size", "box", "area", "peak"))
    return [
        Extent(size=tuple(size), box=tuple(box), area=area, peak=tuple(peak), counts=tuple(runs.tolist()))
        for size, box, area, peak, runs in zip(*parts, counts, strict=True)
    ]
