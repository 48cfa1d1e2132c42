"""The history of what was scored and answered, in a database."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Select, and_, case, delete, exists, func, insert, or_, select, update

from spade_faiss.decisions.conformal import rate_interval
from spade_faiss.serve.errors import UnknownError
from spade_faiss.serve.history.database import WRITES, open_database, problems
from spade_faiss.serve.history.files import MAP, Files
from spade_faiss.serve.history.migrate import migrate
from spade_faiss.serve.history.queries import WAITING, behind, filtered, ordered
from spade_faiss.serve.history.records import (
    Achieved,
    Answer,
    Change,
    Filter,
    Kind,
    Label,
    LaterVerdict,
    Overview,
    Page,
    Rate,
    RecentScore,
    ScoredPicture,
    State,
    new_id,
    utc_now,
)
from spade_faiss.serve.history.rows import answer_of, change_of, microseconds, moment, picture_of, row_of
from spade_faiss.serve.history.tables import answers, changes, pictures

_log = logging.getLogger(__name__)

# How many records are removed in one transaction.
_PURGED = 500
_HOURS = 24


class History:
    """What was scored and answered. Safe to use from several threads.

    Args:
        url: of the database, as SQLAlchemy has it.
        files: the pictures and maps.

    Raises:
        UnavailableError: if the database cannot be opened.
    """

    def __init__(self, url: str, files: Files) -> None:
        self.files = files
        self._engine = open_database(url)
        with problems():
            migrate(self._engine)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def record(self, scored: Sequence[ScoredPicture]) -> list[ScoredPicture]:
        """Store pictures with their verdicts; they survive a crash once this returns.

        Returns:
            Those that were not stored, because another picture has their key. All others were.

        Raises:
            UnavailableError: if the database is locked, or the disk is full; then none was stored.
        """
        stored: list[ScoredPicture] = []
        repeated: list[ScoredPicture] = []
        with self._writing() as connection:
            known: set[tuple[str, str]] = set()
            for item in scored:
                if item.key is not None:
                    same = select(pictures.c.id).where(pictures.c.bank == item.bank, pictures.c.key == item.key)
                    if (item.bank, item.key) in known or connection.execute(same).first():
                        repeated.append(item)
                        continue
                    known.add((item.bank, item.key))
                stored.append(item)
            if stored:
                connection.execute(insert(pictures), [row_of(item) for item in stored])
        for item in stored:
            try:
                self.files.settle(item.id, (item.suffix, MAP) if item.map_size is not None else (item.suffix,))
            except OSError as error:  # they are found where they are, and the next start moves them
                _log.warning("the files of picture %s stay where they came: %s", item.id, error)
        return repeated

    def get(self, name: str) -> ScoredPicture:
        """The picture with an id.

        Raises:
            UnknownError: if there is none.
        """
        with self._reading() as connection:
            found = self._pictures(connection, select(pictures).where(pictures.c.id == name))
        if not found:
            raise UnknownError(f"there is no picture {name[:40]!r}; it may have been removed since, see --keep")
        return found[0]

    def with_key(self, bank: str, key: str) -> ScoredPicture | None:
        """The picture that was sent to a bank with a key."""
        with self._reading() as connection:
            chosen = select(pictures).where(pictures.c.bank == bank, pictures.c.key == key)
            found = self._pictures(connection, chosen)
        return found[0] if found else None

    def find(self, wanted: Filter) -> Page[ScoredPicture]:
        """A page of the pictures that a filter lets pass."""
        with self._reading() as connection:
            chosen = filtered(select(pictures), wanted)
            total = connection.execute(filtered(select(func.count()).select_from(pictures), wanted)).scalar_one()
            chosen = ordered(chosen, wanted).limit(wanted.size).offset((wanted.page - 1) * wanted.size)
            items = self._pictures(connection, chosen)
        return Page(items=items, total=total, page=wanted.page, size=wanted.size)

    def every(self, wanted: Filter) -> Iterator[ScoredPicture]:
        """All pictures that a filter lets pass, newest first, whatever its page says."""
        last: tuple[int, str] | None = None
        while True:
            chosen = filtered(select(pictures), wanted)
            if last is not None:
                received, name = last
                older = or_(pictures.c.received < received, and_(pictures.c.received == received, pictures.c.id < name))
                chosen = chosen.where(older)
            with self._reading() as connection:
                items = self._pictures(connection, ordered(chosen, replace(wanted, order="newest")).limit(_PURGED))
            yield from items
            if len(items) < _PURGED:
                return
            last = microseconds(items[-1].received), items[-1].id

    def next_in_queue(self, bank: str, after: str | None = None) -> ScoredPicture | None:
        """The next alarm that waits for an answer: the one with the smallest p-value, or the next one after a picture."""
        chosen = select(pictures).where(pictures.c.bank == bank, WAITING)
        with self._reading() as connection:
            if after is not None:
                row = connection.execute(select(pictures).where(pictures.c.id == after)).first()
                if row is not None and row.p_value is not None:
                    chosen = chosen.where(behind(row))
            found = self._pictures(connection, ordered(chosen, Filter(order="p_value")).limit(1))
        return found[0] if found else None

    def answer(self, picture_id: str, kind: Kind, note: str = "", by: str = "") -> Answer:
        """Store what somebody said of a picture. An earlier answer of the other kind is taken back by it.

        Raises:
            UnknownError: if there is no such picture.
            UnavailableError: if the database is locked, or the disk is full.
        """
        with self._writing() as connection:
            row = connection.execute(select(pictures.c.bank).where(pictures.c.id == picture_id).with_for_update()).first()
            if row is None:
                raise UnknownError(f"there is no picture {picture_id[:40]!r}")
            for before in connection.execute(
                select(answers).where(answers.c.picture_id == picture_id, answers.c.undone.is_(False))
            ).all():
                if before.kind == kind and before.state != "failed":
                    return answer_of(before)
                _take_back(connection, answer_of(before))
            given = Answer(
                id=new_id(),
                picture_id=picture_id,
                bank=row.bank,
                kind=kind,
                note=note,
                answered=utc_now(),
                by=by,
                state="kept" if kind == "defect" else "pending",
            )
            connection.execute(insert(answers), [{**asdict(given), "answered": microseconds(given.answered)}])
            connection.execute(update(pictures).where(pictures.c.id == picture_id).values(label=kind))
            return given

    def undo(self, answer_id: str) -> Answer:
        """Take an answer back.

        Raises:
            UnknownError: if there is no such answer.
            UnavailableError: if the database is locked, or the disk is full.
        """
        with self._writing() as connection:
            row = connection.execute(select(answers).where(answers.c.id == answer_id).with_for_update()).first()
            if row is None:
                raise UnknownError(f"there is no answer {answer_id[:40]!r}")
            given = answer_of(row)
            if given.undone:
                return given
            connection.execute(update(pictures).where(pictures.c.id == given.picture_id).values(label=None))
            return _take_back(connection, given)

    def get_answer(self, answer_id: str) -> Answer:
        """The answer with an id.

        Raises:
            UnknownError: if there is none.
        """
        with self._reading() as connection:
            row = connection.execute(select(answers).where(answers.c.id == answer_id)).first()
        if row is None:
            raise UnknownError(f"there is no answer {answer_id[:40]!r}")
        return answer_of(row)

    def pending(self, bank: str) -> list[Answer]:
        """The answers that a bank has not followed yet, oldest first."""
        with self._reading() as connection:
            chosen = select(answers).where(answers.c.bank == bank, answers.c.state == "pending").order_by(answers.c.id)
            return [answer_of(row) for row in connection.execute(chosen)]

    def settle(self, given: Answer, state: State, message: str = "", bank_picture: str | None = None) -> None:
        """Store what has become of an answer, `given` as it was seen: one that was taken back meanwhile stays pending."""
        with self._writing() as connection:
            known = {"message": message, "bank_picture": bank_picture}
            connection.execute(update(answers).where(answers.c.id == given.id).values(**known))
            unchanged = and_(answers.c.id == given.id, answers.c.undone.is_(given.undone))
            connection.execute(update(answers).where(unchanged).values(state=state))

    def add_change(self, change: Change) -> None:
        """Store how a bank changed."""
        details = {
            "answers": change.answers,
            "added": change.added,
            "alarms_gone": change.alarms_gone,
            "alarms_left": change.alarms_left,
        }
        row = {name: getattr(change, name) for name in changes.c.keys() if name not in ("details", "changed")}  # noqa: SIM118
        with self._writing() as connection:
            connection.execute(
                insert(changes), [{**row, "changed": microseconds(change.changed), "details": json.dumps(details)}]
            )

    def changes(self, bank: str, limit: int = 50) -> list[Change]:
        """The last changes of a bank, newest first."""
        with self._reading() as connection:
            chosen = select(changes).where(changes.c.bank == bank).order_by(changes.c.id.desc()).limit(limit)
            return [change_of(row) for row in connection.execute(chosen)]

    def score_again(self, verdicts: Iterable[tuple[str, LaterVerdict]]) -> None:
        """Store what a bank says of pictures by now."""
        rows = [(name, asdict(verdict)) for name, verdict in verdicts]
        with self._writing() as connection:
            for name, verdict in rows:
                values = {f"now_{key}": value for key, value in verdict.items()}
                connection.execute(update(pictures).where(pictures.c.id == name).values(**values))

    def recent_scores(self, bank: str, generation: int, limit: int) -> list[RecentScore]:
        """The scores of those of a bank's last pictures that are of a generation, newest first.

        No more than `limit` are looked at, whatever they are of: the index has them, and nothing else is read.
        """
        last = select(pictures.c.knn, pictures.c.max, pictures.c.product, pictures.c.generation, pictures.c.received)
        last_ones = last.where(pictures.c.bank == bank).order_by(pictures.c.received.desc()).limit(limit).subquery()
        chosen = select(last_ones.c.knn, last_ones.c.max, last_ones.c.product)
        chosen = chosen.where(last_ones.c.generation == generation, last_ones.c.knn.is_not(None))
        with self._reading() as connection:
            found = connection.execute(chosen.order_by(last_ones.c.received.desc()))
            return [RecentScore(row.knn, row.max, row.product) for row in found]

    def overview(self, bank: str) -> Overview:
        """How a bank is doing by the history alone: what is served, its alpha and its drift are for the station to add."""
        now = utc_now()
        first = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=_HOURS - 1)
        since, hour_us = microseconds(first), 3_600_000_000
        of_bank = pictures.c.bank == bank
        alarmed = func.sum(case((pictures.c.alarm.is_(True), 1), else_=0))
        with self._reading() as connection:
            hour = (pictures.c.received - since) // hour_us
            counted = select(hour.label("hour"), func.count().label("scored"), alarmed.label("alarms"))
            counted = counted.where(of_bank, pictures.c.received >= since).group_by("hour")
            by_hour = {int(row.hour): (int(row.scored), int(row.alarms or 0)) for row in connection.execute(counted)}
            waiting = connection.execute(select(func.count()).select_from(pictures).where(of_bank, WAITING)).scalar_one()
            newest = select(pictures.c.received, pictures.c.generation, pictures.c.alpha).where(of_bank)
            last = connection.execute(newest.order_by(pictures.c.received.desc()).limit(1)).first()
            minute = select(func.count()).select_from(pictures)
            minute = minute.where(of_bank, pictures.c.received >= microseconds(now) - 60_000_000)
            in_a_minute = connection.execute(minute).scalar_one()
        scored, alarms = (sum(counts[i] for counts in by_hour.values()) for i in (0, 1))
        rate = _rate(alarms, scored)
        return Overview(
            bank=bank,
            generation=0 if last is None else last.generation,
            alpha=None if last is None else last.alpha,
            scored=scored,
            alarms=alarms,
            rate=rate.rate,
            interval=rate.interval,
            per_hour=tuple((first + timedelta(hours=i), *by_hour.get(i, (0, 0))) for i in range(_HOURS)),
            waiting=waiting,
            pictures_per_s=in_a_minute / 60,
            last=None if last is None else moment(last.received),
        )

    def achieved(self, bank: str) -> Achieved:
        """How often verdicts were right, as far as answers tell."""
        counted = select(pictures.c.label, pictures.c.alarm, func.count().label("pictures"))
        counted = counted.where(pictures.c.bank == bank, pictures.c.alarm.is_not(None))
        with self._reading() as connection:
            rows = connection.execute(counted.group_by(pictures.c.label, pictures.c.alarm)).all()
            newest = select(pictures.c.alpha).where(pictures.c.bank == bank).order_by(pictures.c.received.desc()).limit(1)
            alpha = connection.execute(newest).scalar()
        number = {(row.label, bool(row.alarm)): int(row.pictures) for row in rows}
        normal, missed = number.get(("normal", True), 0), number.get(("defect", False), 0)
        of_normal = normal + number.get(("normal", False), 0)
        others = sum(count for (label, _), count in number.items() if label != "defect")
        return Achieved(
            bank=bank,
            alpha=alpha,
            false_alarms=_rate(normal, of_normal),
            misses=_rate(missed, missed + number.get(("defect", True), 0)),
            false_alarms_of_all=_rate(normal, others),
        )

    def labels(self, bank: str) -> Iterator[Label]:
        """The pictures of a bank whose label is known by an answer, and whose files are still there, newest first."""
        for picture in self.every(Filter(bank=bank, answered=True)):
            if picture.answer is not None and picture.kept:
                yield Label(picture=picture, kind=picture.answer.kind, note=picture.answer.note)

    def are_recorded(self, names: Sequence[str]) -> dict[str, str]:
        """Which of some ids have a record, with the suffix of its picture."""
        found: dict[str, str] = {}
        with self._reading() as connection:
            for start in range(0, len(names), _PURGED):
                chosen = select(pictures.c.id, pictures.c.suffix).where(pictures.c.id.in_(names[start : start + _PURGED]))
                found.update({row.id: row.suffix for row in connection.execute(chosen)})
        return found

    def reconcile(self) -> int:
        """After a kill, move files that have a record to their place, and remove the others; returns how many those were."""
        unsettled = self.files.unsettled()
        recorded, removed = self.are_recorded(list(unsettled)), 0
        for name, paths in unsettled.items():
            for path in paths:
                suffix = path.name.removeprefix(name)
                if name in recorded and suffix in (recorded[name], MAP):
                    self.files.settle(name, (suffix,))
                else:
                    path.unlink()
                    removed += 1
        return removed

    def purge(self, keep: timedelta | None, keep_bytes: int | None) -> int:
        """Remove what is older than `keep`, and files beyond `keep_bytes`, oldest first; returns how many pictures lost theirs.

        Pictures that somebody answered stay: they are labels. So do those of answers that the bank has yet to follow.
        """
        followed = ~exists().where(answers.c.picture_id == pictures.c.id, answers.c.state == "pending")
        unanswered, removed = and_(pictures.c.label.is_(None), followed), 0
        # Nobody answers a picture between its choice and its end: both are in one transaction that holds what it has chosen.
        files_of = select(pictures.c.id, pictures.c.suffix, pictures.c.bytes).order_by(pictures.c.received).limit(_PURGED)
        while keep is not None:
            old = files_of.where(unanswered, pictures.c.received < microseconds(utc_now() - keep))
            with self._writing() as connection:
                rows = connection.execute(old.with_for_update()).all()
                if not rows:
                    break
                self._remove_files(rows)
                names = [row.id for row in rows]
                connection.execute(delete(answers).where(answers.c.picture_id.in_(names)))
                connection.execute(delete(pictures).where(pictures.c.id.in_(names)))
            removed += len(rows)
        while keep_bytes is not None:
            with self._writing() as connection:
                used = connection.execute(select(func.sum(pictures.c.bytes)).where(pictures.c.kept.is_(True))).scalar()
                over = int(used or 0) - keep_bytes
                if over <= 0:
                    break
                rows = connection.execute(files_of.where(unanswered, pictures.c.kept.is_(True)).with_for_update()).all()
                if not rows:
                    break
                chosen, freed = [], 0
                for row in rows:
                    if freed >= over:
                        break
                    chosen.append(row)
                    freed += row.bytes
                self._remove_files(chosen)
                names = [row.id for row in chosen]
                connection.execute(update(pictures).where(pictures.c.id.in_(names)).values(kept=False))
            removed += len(chosen)
        if removed:
            self.files.forget_empty_folders()
        return removed

    def _remove_files(self, rows: Iterable[Any]) -> None:
        """Remove files before their records say so: after a kill between the two, the same are chosen again."""
        for row in rows:
            self.files.remove(row.id, row.suffix)

    def _pictures(self, connection: Connection, chosen: Select[Any]) -> list[ScoredPicture]:
        rows = connection.execute(chosen).all()
        labeled = [row.id for row in rows if row.label is not None]
        given: dict[str, Answer] = {}
        if labeled:
            held = select(answers).where(answers.c.picture_id.in_(labeled), answers.c.undone.is_(False))
            given = {row.picture_id: answer_of(row) for row in connection.execute(held.order_by(answers.c.id))}
        return [picture_of(row, given.get(row.id)) for row in rows]

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with problems(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with problems(), self._engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
            yield connection


def _take_back(connection: Connection, given: Answer) -> Answer:
    """Mark an answer as taken back; what it did to the bank is left to do."""
    pending = given.kind == "normal" and (given.state == "pending" or given.bank_picture is not None)
    state: State = "pending" if pending else "undone"
    connection.execute(update(answers).where(answers.c.id == given.id).values(undone=True, state=state))
    return replace(given, undone=True, state=state)


def _rate(count: int, of: int) -> Rate:
    if of == 0:
        return Rate(count=0, of=0, rate=None, interval=None)
    low, high = rate_interval(count, of)
    return Rate(count=count, of=of, rate=count / of, interval=(float(low), float(high)))
