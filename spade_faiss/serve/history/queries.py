"""Which pictures are asked for, and in which order."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, Select, and_, or_

from spade_faiss.serve.history.records import Filter
from spade_faiss.serve.history.rows import folded, microseconds
from spade_faiss.serve.history.tables import pictures

# The alarms that nobody has answered, and that still are alarms.
WAITING = and_(
    pictures.c.alarm.is_(True),
    pictures.c.label.is_(None),
    or_(pictures.c.now_alarm.is_(None), pictures.c.now_alarm.is_(True)),
)


def filtered(chosen: Select[Any], wanted: Filter) -> Select[Any]:
    """Choose the pictures that a filter lets pass."""
    if wanted.bank is not None:
        chosen = chosen.where(pictures.c.bank == wanted.bank)
    if wanted.alarm is not None:
        chosen = chosen.where(pictures.c.alarm.is_(wanted.alarm))
    if isinstance(wanted.answered, bool):
        chosen = chosen.where(pictures.c.label.is_not(None) if wanted.answered else pictures.c.label.is_(None))
    elif wanted.answered is not None:
        chosen = chosen.where(pictures.c.label == wanted.answered)
    if wanted.waiting:
        chosen = chosen.where(WAITING)
    if wanted.text:
        chosen = chosen.where(pictures.c.folded.contains(folded(wanted.text), autoescape=True))
    if wanted.since is not None:
        chosen = chosen.where(pictures.c.received >= microseconds(wanted.since))
    if wanted.until is not None:
        chosen = chosen.where(pictures.c.received < microseconds(wanted.until))
    return chosen


def ordered(chosen: Select[Any], wanted: Filter) -> Select[Any]:
    """Put pictures into the order that a filter asks for."""
    if wanted.order == "p_value":
        # Many have the smallest p-value that there is: of those, the one that scores highest comes first.
        return chosen.order_by(pictures.c.p_value.asc().nulls_last(), pictures.c.score.desc().nulls_last(), pictures.c.id)
    return chosen.order_by(pictures.c.received.desc(), pictures.c.id.desc())


def behind(row: Row[Any]) -> Any:
    """What comes after a picture in the order of p-values."""
    same = pictures.c.p_value == row.p_value
    score = -1.0 if row.score is None else row.score
    return or_(
        pictures.c.p_value > row.p_value,
        and_(same, pictures.c.score < score),
        and_(same, pictures.c.score == score, pictures.c.id > row.id),
    )
