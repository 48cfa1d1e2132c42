"""The records of the history: what was scored, what people answered, and how the bank changed."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, Literal, NamedTuple, TypeVar

T = TypeVar("T")

# y0, x0, y1, x1 in pixels of the score map.
Box = tuple[int, int, int, int]
# A region as `decisions.regions.Region.numbers()` gives it.
RegionRecord = Mapping[str, Any]
Kind = Literal["normal", "defect"]
State = Literal["pending", "in the bank", "kept", "undone", "failed"]
Order = Literal["newest", "p_value"]

UPLOAD = "upload"


@dataclass(frozen=True, kw_only=True)
class MatchedPatch:
    """Which patch of a normal picture a level matched to the strongest pixel of a map.

    Args:
        level: the level's name.
        box: the patch in the normal picture, as the backbone saw that.
        size: the height and width of the normal picture.
        query: the patch in the scored picture.
    """

    level: str
    box: Box
    size: tuple[int, int]
    query: Box


@dataclass(frozen=True, kw_only=True)
class NearestNormal:
    """A normal picture of the bank beside which a picture was scored.

    Args:
        id: its name in the bank.
        distance: its distance to the picture; None for one that is not among the nearest, but was matched.
        patches: what was matched in it.
    """

    id: str
    distance: float | None
    patches: tuple[MatchedPatch, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What somebody said of a picture.

    Args:
        id: names the answer.
        picture_id: the picture.
        bank: the bank that it was scored against.
        kind: `normal` or `defect`.
        note: what else was said; untrusted text.
        answered: when (UTC).
        by: who said it, as far as that is known.
        undone: whether it was taken back.
        state: what has become of it: `pending` until the bank has followed, then `in the bank`, `kept` (a label), `undone`
            or `failed`.
        message: why it failed, or what else is to be said.
        bank_picture: what the bank calls the picture, if this answer put it there.
    """

    id: str
    picture_id: str
    bank: str
    kind: Kind
    note: str
    answered: datetime
    by: str
    undone: bool = False
    state: State = "pending"
    message: str = ""
    bank_picture: str | None = None


@dataclass(frozen=True, kw_only=True)
class LaterVerdict:
    """What the bank says of a picture after it has changed.

    Args:
        generation: the bank's generation.
        p_value: the p-value, if the bank is calibrated.
        alarm: whether it would be an alarm.
    """

    generation: int
    p_value: float | None
    alarm: bool | None


@dataclass(frozen=True, kw_only=True)
class ScoredPicture:
    """A picture with the verdict on it.

    Args:
        id: 32 hex characters that ascend with time, see `new_id`.
        bank: the name of the bank that it was scored against.
        name: what its sender calls it; untrusted text.
        source: where it came from: `upload`, or a source that `watch` names.
        received: when (UTC).
        sha256: of its file.
        width, height: of the upright picture, in pixels.
        generation: the bank's.
        scores: the image scores by their names; None where there is no map.
        ranked_by: the name of the score that ranks.
        p_value, alarm, alpha: the verdict and the rate that it promises; None without a calibration.
        threshold: the pixel score above which a pixel is in a region.
        colors: the pixel scores at which the colors of its heat map begin and end.
        regions: the parts of the map above the threshold, strongest first.
        nearest: the normal pictures that it was compared with, nearest first.
        peak: (y, x) of the map's strongest pixel; None without a map.
        map_size: (height, width) of the map.
        suffix: of its file, such as `.png`.
        bytes: what its files take on disk.
        kept: whether its files are still there, see `History.purge`.
        key: what its sender calls the request, so that it can be sent again.
        answer: what was said of it last, and not taken back.
        now: what the bank says of it by now, if it was scored again.
        product: the one that it was searched in; None in a bank of one product.
        confidence: the share of its nearest normals' votes for that; None if its sender named it.
        p_none: the p-value of the test that it is a normal picture of any of the products; None likewise.
    """

    id: str
    bank: str
    name: str
    source: str
    received: datetime
    sha256: str
    width: int
    height: int
    generation: int
    scores: Mapping[str, float | None]
    ranked_by: str
    p_value: float | None = None
    alpha: float | None = None
    alarm: bool | None = None
    threshold: float | None = None
    colors: tuple[float, float] | None = None
    regions: tuple[RegionRecord, ...] = ()
    nearest: tuple[NearestNormal, ...] = ()
    peak: tuple[int, int] | None = None
    map_size: tuple[int, int] | None = None
    suffix: str = ".png"
    bytes: int = 0
    kept: bool = True
    key: str | None = None
    answer: Answer | None = None
    now: LaterVerdict | None = None
    product: str | None = None
    confidence: float | None = None
    p_none: float | None = None


class RecentScore(NamedTuple):
    """The scores of one of the last pictures: the image score, the map maximum, and the product, where the bank has several."""

    image: float
    map: float | None
    product: str | None


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a bank changed while it was served.

    Args:
        id: names the change.
        bank: the bank.
        generation_before, generation_after: its generations.
        changed: when (UTC).
        cause: why, in words.
        answers: the ids of the answers that caused it.
        added: how many pictures came into the bank; negative if they left it.
        alarms_gone: the ids of pictures that were alarms and are none any more.
        alarms_left: how many of the alarms that were scored again still are.
        seconds: how long it took.
        error: what went wrong, if something did.
    """

    id: str
    bank: str
    generation_before: int
    generation_after: int
    changed: datetime
    cause: str
    answers: tuple[str, ...] = ()
    added: int = 0
    alarms_gone: tuple[str, ...] = ()
    alarms_left: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which pictures are looked for; None leaves a property open.

    Args:
        bank: the bank.
        alarm: whether they are alarms.
        answered: whether somebody answered them: True, False, `normal` or `defect`.
        waiting: only the alarms that nobody answered, and that still are alarms by what the bank says now.
        text: a part of the name, whatever its case.
        since, until: when they were received; `until` is excluded.
        order: `newest` first, or by `p_value`, the smallest first.
        page: counted from 1.
        size: how many to a page.
    """

    bank: str | None = None
    alarm: bool | None = None
    answered: bool | Kind | None = None
    waiting: bool = False
    text: str = ""
    since: datetime | None = None
    until: datetime | None = None
    order: Order = "newest"
    page: int = 1
    size: int = 50


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """A page of what was found, and how much there is in all."""

    items: Sequence[T]
    total: int
    page: int
    size: int

    @property
    def pages(self) -> int:
        """The number of pages, one at least."""
        return max(1, -(-self.total // self.size))


@dataclass(frozen=True, kw_only=True)
class Overview:
    """How a bank is doing.

    Args:
        bank: its name.
        generation: the generation that is served.
        alpha: the rate of false alarms that it promises; None without a calibration.
        scored, alarms: how many pictures were scored in the last 24 hours, and how many of them were alarms.
        rate: alarms / scored; None if nothing was scored.
        interval: the 95 % interval of that.
        per_hour: (start, scored, alarms) of each of the last 24 hours, oldest first.
        waiting: alarms that nobody has answered, of all time.
        drift_p: the p-value of the drift test of the last pictures; None without enough of them, or without a calibration.
        drift_images: how many pictures that compares.
        pictures_per_s: how many pictures a second were scored in the last minute.
        last: when the last picture was received.
    """

    bank: str
    generation: int
    alpha: float | None
    scored: int
    alarms: int
    rate: float | None
    interval: tuple[float, float] | None
    per_hour: tuple[tuple[datetime, int, int], ...]
    waiting: int
    drift_p: float | None = None
    drift_images: int = 0
    pictures_per_s: float = 0.0
    last: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of pictures with the 95 % interval of it; both are None if there are none."""

    count: int
    of: int
    rate: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """What answers say of the verdicts so far, beside what was promised.

    The false alarms are of pictures that were answered, and alarms are answered more often than the rest: the share among all
    pictures, `alarms_of_all`, is what compares with alpha.

    Args:
        bank: the bank.
        alpha: the promised rate of false alarms; None without a calibration.
        false_alarms: alarms among the pictures that were answered `normal`.
        misses: pictures without an alarm among those that were answered `defect`.
        false_alarms_of_all: alarms that were answered `normal`, among all pictures that were not answered `defect`: at least so
            many of normal pictures were alarms.
    """

    bank: str
    alpha: float | None
    false_alarms: Rate
    misses: Rate
    false_alarms_of_all: Rate


@dataclass(frozen=True, kw_only=True)
class Label:
    """A picture whose label is known by an answer."""

    picture: ScoredPicture
    kind: Kind
    note: str


@dataclass
class _Clock:
    """The last time that an id was made of, so that ids ascend within a millisecond, too."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    last: int = 0


_clock = _Clock()
_COUNTER_BITS = 12


def new_id() -> str:
    """A name for a record, as UUID version 7 has it: 32 hex characters that ascend in the order in which they are made."""
    now = (time.time_ns() // 1_000_000) << _COUNTER_BITS
    with _clock.lock:
        _clock.last = max(now, _clock.last + 1)
        stamp = _clock.last
    counter = stamp & ((1 << _COUNTER_BITS) - 1)
    # 48 bits of time, the version, 12 bits of a counter, the variant, 62 random bits.
    return f"{stamp >> _COUNTER_BITS:012x}7{counter:03x}{(0b10 << 62) | secrets.randbits(62):016x}"


def time_of(name: str) -> datetime:
    """When an id was made (UTC)."""
    return datetime.fromtimestamp(int(name[:12], 16) / 1000, UTC)


def is_id(text: str) -> bool:
    """Whether a text may be the id of a record."""
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)


def utc_now() -> datetime:
    """The time."""
    return datetime.now(UTC)
