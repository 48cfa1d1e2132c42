"""Rows of the tables, and the records that they stand for."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from spade_faiss.serve.history.records import Answer, Change, LaterVerdict, MatchedPatch, NearestNormal, ScoredPicture
from spade_faiss.serve.history.tables import answers, changes

_DETAILS = ("regions", "nearest", "peak", "map_size", "colors")
# Those that rows of versions before lack.
_MORE_DETAILS = ("confidence", "p_none")
_ROW: tuple[str, ...] = (
    "id",
    "bank",
    "name",
    "source",
    "sha256",
    "width",
    "height",
    "generation",
    "ranked_by",
    "p_value",
    "alpha",
    "alarm",
    "threshold",
    "suffix",
    "bytes",
    "kept",
    "key",
    "product",
)
_SCORES = ("knn", "max", "top")


def row_of(item: ScoredPicture) -> dict[str, Any]:
    """The row of a picture."""
    details = {name: getattr(item, name) for name in (*_DETAILS, *_MORE_DETAILS)}
    details["nearest"] = [asdict(normal) for normal in item.nearest]
    details["scores"] = {name: score for name, score in item.scores.items() if name not in _SCORES}
    return {
        **{name: getattr(item, name) for name in _ROW},
        **{name: item.scores.get(name) for name in _SCORES},
        "score": item.scores.get(item.ranked_by),
        "folded": folded(item.name),
        "received": microseconds(item.received),
        "details": json.dumps(details),
    }


def picture_of(row: Row[Any], given: Answer | None) -> ScoredPicture:
    """The picture of a row, with what was said of it."""
    details = json.loads(row.details)
    later = None
    if row.now_generation is not None:
        later = LaterVerdict(generation=row.now_generation, p_value=row.now_p_value, alarm=row.now_alarm)
    return ScoredPicture(
        **{name: getattr(row, name) for name in _ROW},
        received=moment(row.received),
        scores={**{name: getattr(row, name) for name in _SCORES}, **details["scores"]},
        colors=_tuple(details["colors"]),
        regions=tuple(details["regions"]),
        nearest=tuple(_normal_of(normal) for normal in details["nearest"]),
        peak=_tuple(details["peak"]),
        map_size=_tuple(details["map_size"]),
        answer=given,
        now=later,
        **{name: details.get(name) for name in _MORE_DETAILS},
    )


def _normal_of(normal: dict[str, Any]) -> NearestNormal:
    patches = tuple(
        MatchedPatch(level=patch["level"], box=_tuple(patch["box"]), size=_tuple(patch["size"]), query=_tuple(patch["query"]))
        for patch in normal["patches"]
    )
    return NearestNormal(id=normal["id"], distance=normal["distance"], patches=patches)


def _tuple(values: Any) -> Any:
    return None if values is None else tuple(values)


def answer_of(row: Row[Any]) -> Answer:
    """The answer of a row."""
    values = {name: getattr(row, name) for name in answers.c.keys()}  # noqa: SIM118
    return Answer(**{**values, "answered": moment(row.answered)})


def change_of(row: Row[Any]) -> Change:
    """The change of a row."""
    details = json.loads(row.details)
    values = {name: getattr(row, name) for name in changes.c.keys() if name != "details"}  # noqa: SIM118
    for name in ("answers", "alarms_gone"):
        values[name] = tuple(details[name])
    values.update(added=details["added"], alarms_left=details["alarms_left"], changed=moment(row.changed))
    return Change(**values)


def folded(text: str) -> str:
    """Text as it is searched for, whatever its case."""
    return text.casefold()


def microseconds(when: datetime) -> int:
    """A moment as it is stored."""
    return round(when.timestamp() * 1_000_000)


def moment(stored: int) -> datetime:
    """The moment that is stored as a number of microseconds."""
    return datetime.fromtimestamp(stored / 1_000_000, UTC)
