"""What the API answers, for its OpenAPI document, and how records become it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from spade_faiss.serve.history.records import Answer, Change, Overview, ScoredPicture

ID = "01932c07209c7000b1f2c0ffee00c0de"
_ID_PATTERN = "^[0-9a-f]{32}$"

_MATCH: dict[str, Any] = {"level": "blocks.2", "box": [96, 128, 104, 136], "size": [224, 224], "query": [96, 120, 104, 128]}
_REGION: dict[str, Any] = {
    "score": 3.2,
    "p_value": 0.005,
    "input": {
        "box": [118, 90, 21, 17],
        "area": 240,
        "peak": [97, 126],
        "segmentation": {"size": [224, 224], "counts": "PnQ12e62N2"},
    },
    "original": {"box": [474, 361, 84, 68], "area": 3840, "peak": [390, 505]},
}
ANSWER: dict[str, Any] = {
    "id": "01932c0a11227000a0a1b2c3d4e5f607",
    "picture_id": ID,
    "bank": "bottles",
    "kind": "normal",
    "note": "a reflection",
    "answered": "2026-11-29T16:20:01.5Z",
    "by": "",
    "undone": False,
    "state": "in the bank",
    "message": "",
}
PICTURE: dict[str, Any] = {
    "id": ID,
    "bank": "bottles",
    "name": "line-3/000123.png",
    "source": "upload",
    "received": "2026-11-29T16:18:58.123Z",
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "width": 900,
    "height": 900,
    "generation": 7,
    "scores": {"knn": 4.1, "max": 3.2, "top": 2.7, "structure": 1.9},
    "ranked_by": "top",
    "p_value": 0.005,
    "alpha": 0.01,
    "alarm": True,
    "threshold": 2.4,
    "colors": [1.1, 3.6],
    "regions": [_REGION],
    "nearest": [{"id": "000.png", "distance": 3.9, "patches": [_MATCH]}],
    "peak": [97, 126],
    "map_size": [224, 224],
    "kept": True,
    "answer": ANSWER,
    "now": {"generation": 8, "p_value": 0.6, "alarm": False},
    "product": None,
    "confidence": None,
    "p_none": None,
    "links": {
        "self": f"/v1/pictures/{ID}",
        "file": f"/v1/pictures/{ID}/file",
        "picture": f"/v1/pictures/{ID}/picture",
        "map": f"/v1/pictures/{ID}/map",
        "overlay": f"/v1/pictures/{ID}/overlay",
    },
}


class Model(BaseModel):
    """What all of them have in common."""

    model_config = ConfigDict(extra="forbid")


class AnswerModel(Model):
    """What somebody said of a picture."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [ANSWER]})

    id: str = Field(pattern=_ID_PATTERN)
    picture_id: str = Field(pattern=_ID_PATTERN)
    bank: str
    kind: Literal["normal", "defect"]
    note: str
    answered: datetime
    by: str
    undone: bool
    state: Literal["pending", "in the bank", "kept", "undone", "failed"] = Field(
        description="`pending` until the bank has followed; `kept`: a label that changes no bank"
    )
    message: str = Field(description="why it failed, or what else is to be said")


class LaterModel(Model):
    """What the bank says of a picture after it has changed."""

    generation: int
    p_value: float | None
    alarm: bool | None


class PatchModel(Model):
    """A patch that a level matched to the strongest pixel of the map; boxes are y0, x0, y1, x1."""

    level: str
    box: tuple[int, int, int, int] = Field(description="in the normal picture")
    size: tuple[int, int] = Field(description="height and width of the normal picture")
    query: tuple[int, int, int, int] = Field(description="in the map of the scored picture")


class NearestModel(Model):
    """A normal picture of the bank."""

    id: str
    distance: float | None = Field(description="null for one that is not among the nearest, but was matched")
    patches: list[PatchModel]


class MaskModel(Model):
    """A mask, as COCO's compressed run lengths."""

    size: tuple[int, int]
    counts: str


class InputExtentModel(Model):
    """Where a region is in the backbone's input; `box` is x, y, width, height, `peak` y, x."""

    box: tuple[int, int, int, int]
    area: int
    peak: tuple[int, int]
    segmentation: MaskModel


class OriginalExtentModel(Model):
    """Where a region is in the picture as it came."""

    box: tuple[int, int, int, int]
    area: int
    peak: tuple[int, int]


class RegionModel(Model):
    """A part of the map above the threshold."""

    score: float
    p_value: float
    input: InputExtentModel
    original: OriginalExtentModel


class LinksModel(Model):
    """Where the rest of a picture is."""

    self: str
    file: str
    picture: str
    map: str
    overlay: str


class PictureModel(Model):
    """A picture with the verdict on it."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [PICTURE]})

    id: str = Field(pattern=_ID_PATTERN)
    bank: str
    name: str = Field(description="what its sender calls it; show it escaped")
    source: str
    received: datetime
    sha256: str
    width: int
    height: int
    generation: int = Field(description="of the bank, when the picture was scored")
    scores: dict[str, float | None]
    ranked_by: str
    p_value: float | None = Field(description="null without a calibration")
    alpha: float | None = Field(description="the share of normal pictures that may become alarms")
    alarm: bool | None
    threshold: float | None = Field(description="a pixel is in a region if its score is above")
    colors: tuple[float, float] | None
    regions: list[RegionModel]
    nearest: list[NearestModel]
    peak: tuple[int, int] | None
    map_size: tuple[int, int] | None
    kept: bool = Field(description="whether its files are still there")
    answer: AnswerModel | None
    now: LaterModel | None = Field(description="what the bank says of it since it has changed")
    product: str | None = Field(description="that it was searched in; null in a bank of one product")
    confidence: float | None = Field(
        description="the share of its nearest normals' votes for the product; null if it was named"
    )
    p_none: float | None = Field(
        description="p-value of the test that it is a normal picture of any of the products; null if one was named"
    )
    links: LinksModel


class ProblemModel(BaseModel):
    """A problem as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str


class ItemModel(Model):
    """What became of one picture of a request: a verdict, or a problem."""

    name: str
    picture: PictureModel | None = None
    problem: ProblemModel | None = None


class ScoredModel(Model):
    """What became of the pictures of a request, in its order."""

    bank: str
    generation: int
    pictures: list[ItemModel]


class PageModel(Model):
    """A page of pictures."""

    items: list[PictureModel]
    total: int
    page: int
    size: int
    pages: int


class HourModel(Model):
    """How much was scored in an hour."""

    start: datetime
    scored: int
    alarms: int


class RateModel(Model):
    """A share, and the 95 % interval of it."""

    count: int
    of: int
    rate: float | None
    interval: tuple[float, float] | None


class AchievedModel(Model):
    """How often verdicts were right, as far as answers tell."""

    false_alarms: RateModel = Field(description="alarms among the pictures that were answered `normal`")
    misses: RateModel = Field(description="no alarms among the pictures that were answered `defect`")
    false_alarms_of_all: RateModel = Field(description="false alarms among all pictures that were not answered `defect`")


class BankModel(Model):
    """A bank that is served, and how it is doing."""

    name: str
    state: Literal["opening", "ready", "changing", "failed", "closed"]
    message: str
    generation: int
    normals: int
    alpha: float | None
    queue: int = Field(description="pictures on their way")
    pending: int = Field(description="answers that the bank has not followed yet")
    scored: int = Field(description="in the last 24 hours")
    alarms: int
    rate: float | None
    interval: tuple[float, float] | None
    per_hour: list[HourModel]
    waiting: int = Field(description="alarms that nobody has answered")
    drift_p: float | None
    drift_images: int
    pictures_per_s: float
    last: datetime | None
    achieved: AchievedModel


class ChangeModel(Model):
    """How a bank has changed while it was served."""

    id: str = Field(pattern=_ID_PATTERN)
    bank: str
    generation_before: int
    generation_after: int
    changed: datetime
    cause: str
    answers: list[str]
    added: int
    alarms_gone: list[str]
    alarms_left: int
    seconds: float
    error: str | None


class FeedbackModel(Model):
    """What somebody says of a picture."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"kind": "normal", "note": "a reflection"}]})

    kind: Literal["normal", "defect"] = Field(description="`normal` puts it into the bank, `defect` is kept as a label")
    note: str = Field("", max_length=2000)
    by: str = Field("", max_length=100, description="who says it")


class BankFeedbackModel(FeedbackModel):
    """What somebody says of a picture that the body names."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"id": ID, "kind": "defect", "note": "a crack"}]})

    id: str = Field(pattern=_ID_PATTERN, description="of the picture")


def picture_numbers(picture: ScoredPicture) -> dict[str, Any]:
    """A picture as `PictureModel` has it."""
    link = f"/v1/pictures/{picture.id}"
    return {
        "id": picture.id,
        "bank": picture.bank,
        "name": picture.name,
        "source": picture.source,
        "received": _time(picture.received),
        "sha256": picture.sha256,
        "width": picture.width,
        "height": picture.height,
        "generation": picture.generation,
        "scores": picture.scores,
        "ranked_by": picture.ranked_by,
        "p_value": picture.p_value,
        "alpha": picture.alpha,
        "alarm": picture.alarm,
        "threshold": picture.threshold,
        "colors": picture.colors,
        "regions": picture.regions,
        "nearest": [asdict(normal) for normal in picture.nearest],
        "peak": picture.peak,
        "map_size": picture.map_size,
        "kept": picture.kept,
        "answer": None if picture.answer is None else answer_numbers(picture.answer),
        "now": None if picture.now is None else asdict(picture.now),
        "product": picture.product,
        "confidence": picture.confidence,
        "p_none": picture.p_none,
        "links": {"self": link, **{name: f"{link}/{name}" for name in ("file", "picture", "map", "overlay")}},
    }


def answer_numbers(answer: Answer) -> dict[str, Any]:
    """An answer as `AnswerModel` has it."""
    numbers = asdict(answer)
    del numbers["bank_picture"]
    return {**numbers, "answered": _time(answer.answered)}


def change_numbers(change: Change) -> dict[str, Any]:
    """A change as `ChangeModel` has it."""
    return {**asdict(change), "changed": _time(change.changed)}


def overview_numbers(overview: Overview) -> dict[str, Any]:
    """An overview as `BankModel` has it, without what the station knows."""
    numbers = asdict(overview)
    del numbers["bank"]
    hours = [{"start": _time(start), "scored": scored, "alarms": alarms} for start, scored, alarms in overview.per_hour]
    return {**numbers, "per_hour": hours, "last": None if overview.last is None else _time(overview.last)}


def _time(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
