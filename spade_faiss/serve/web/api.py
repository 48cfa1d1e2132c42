"""The API: pictures go in, verdicts come out, and people say what they think of them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from fastapi.security import HTTPBearer
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from spade_faiss.core.errors import SpadeError
from spade_faiss.report.cells import csv_line, text_cell
from spade_faiss.serve.errors import UnavailableError, UnknownError
from spade_faiss.serve.history.records import Filter, Order, ScoredPicture, new_id
from spade_faiss.serve.service import Service
from spade_faiss.serve.web.models import (
    PICTURE,
    AnswerModel,
    BankFeedbackModel,
    BankModel,
    ChangeModel,
    FeedbackModel,
    PageModel,
    PictureModel,
    ScoredModel,
    answer_numbers,
    change_numbers,
    overview_numbers,
    picture_numbers,
)
from spade_faiss.serve.web.problems import problem_numbers, problem_responses
from spade_faiss.serve.web.scoring import Result, receive_and_score
from spade_faiss.serve.web.uploads import KEY_HEADER, LONGEST_KEY, NAME_HEADER, SOURCE_HEADER

_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "a PNG file"}}
# A drawn picture never changes: its id is that of one request.
_FOR_GOOD = {"cache-control": "private, max-age=86400, immutable"}
_ID = Annotated[str, PathParameter(pattern="^[0-9a-f]{32}$", description="of the picture", examples=[PICTURE["id"]])]
_BANK = Annotated[str, PathParameter(description="the name of the bank", examples=["bottles"], min_length=1)]
_CSV: tuple[str, ...] = ("id", "bank", "name", "source", "received", "generation", "ranked_by", "knn", "max", "top")
_CSV += ("p_value", "alpha", "alarm", "regions", "label", "note", "now_generation", "now_p_value", "now_alarm")
_CSV += ("product", "confidence", "p_none")

_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "description": "One picture as it is, or several as the files of a form. PNG, JPEG, BMP, TIFF, WebP or binary PNM.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"picture": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["picture"],
                }
            },
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "parameters": [
        {
            "name": KEY_HEADER,
            "in": "header",
            "required": False,
            "description": "names the request, so that it may be sent again: what was scored then is answered, and not again",
            "schema": {"type": "string", "pattern": f"^[0-9A-Za-z._:-]{{1,{LONGEST_KEY}}}$"},
        },
        {
            "name": NAME_HEADER,
            "in": "header",
            "required": False,
            "description": "what the picture is called, percent-encoded UTF-8; a form has it as the filename of its part",
            "schema": {"type": "string", "maxLength": 1000},
        },
        {
            "name": SOURCE_HEADER,
            "in": "header",
            "required": False,
            "description": "where the picture comes from, percent-encoded UTF-8",
            "schema": {"type": "string", "maxLength": 1000},
        },
    ],
}

bearer = HTTPBearer(auto_error=False, description="the token of --token-file; needless where the server has none")
router = APIRouter(
    prefix="/v1",
    dependencies=[Depends(bearer)],
    responses=problem_responses(400, 401, 403, 404, 413, 422, 503),
)


async def _service(request: Request) -> Service:  # one that is not async would be called in another thread
    service: Service = request.app.state.service
    return service


# `of_product` says what is wrong with one that the bank does not have.
_PRODUCT = Annotated[
    str | None,
    Query(
        min_length=1,
        max_length=200,
        description="of a bank of several products, the one that all pictures show; else each one's nearest normals name it",
    ),
]
ServiceOf = Annotated[Service, Depends(_service)]


@router.get("/banks", response_model=list[BankModel], tags=["banks"], summary="The banks that are served")
def banks(service: ServiceOf) -> Response:
    """All banks with how they are doing."""
    return JSONResponse([_bank(service, name) for name in sorted(service.stations)])


@router.get("/banks/{bank}", response_model=BankModel, tags=["banks"], summary="How a bank is doing")
def bank(bank: _BANK, service: ServiceOf) -> Response:
    """The rate of alarms beside what is promised, what waits for answers, drift, and how fast it goes."""
    return JSONResponse(_bank(service, bank))


@router.post(
    "/banks/{bank}/score",
    response_model=ScoredModel,
    tags=["pictures"],
    summary="Score pictures",
    openapi_extra=_UPLOAD_BODY,
    responses=problem_responses(400, 408, 409, 413, 415),
)
async def score(bank: _BANK, request: Request, service: ServiceOf, product: _PRODUCT = None) -> Response:
    """Scores, p-values, the verdict, regions and nearest normals of each picture; they are on disk when this answers.

    A single picture that cannot be read is answered 422; among several, it has a problem in its place.
    """
    results = await receive_and_score(request, service, bank, product)
    if len(results) == 1 and not isinstance(error := results[0][1], ScoredPicture):
        raise error
    return JSONResponse(_scored(service, bank, results))


@router.post(
    "/banks/{bank}/normals",
    response_model=list[AnswerModel],
    status_code=202,
    tags=["answers"],
    summary="Put normal pictures into the bank",
    openapi_extra=_UPLOAD_BODY,
    responses=problem_responses(400, 408, 409, 413, 415),
)
async def normals(bank: _BANK, request: Request, service: ServiceOf, product: _PRODUCT = None) -> Response:
    """Pictures that are known to be normal: each is scored, recorded and answered `normal`; the bank follows in the background.

    If one of them cannot be read, none comes into the bank.
    """
    results = await receive_and_score(request, service, bank, product)
    for _, found in results:
        if not isinstance(found, ScoredPicture):
            raise found
    given = [
        await run_in_threadpool(service.answer, item.id, "normal") for _, item in results if isinstance(item, ScoredPicture)
    ]
    return JSONResponse([answer_numbers(answer) for answer in given], 202)


def _filter(
    alarm: Annotated[bool | None, Query(description="only alarms, or only others")] = None,
    answered: Annotated[
        Literal["true", "false", "normal", "defect"] | None, Query(description="only what somebody answered, or answered so")
    ] = None,
    text: Annotated[str, Query(max_length=200, description="a part of the name, whatever its case")] = "",
    since: Annotated[datetime | None, Query(description="received at that time or later; UTC unless it says otherwise")] = None,
    until: Annotated[datetime | None, Query(description="received before that time")] = None,
) -> Filter:
    """The filter that a query asks for."""
    state = {"true": True, "false": False, "normal": "normal", "defect": "defect", None: None}[answered]
    return Filter(alarm=alarm, answered=state, text=text.replace("\0", ""), since=_utc(since), until=_utc(until))  # type: ignore[arg-type]


_FilterOf = Annotated[Filter, Depends(_filter)]


@router.get("/banks/{bank}/pictures", response_model=PageModel, tags=["pictures"], summary="What was scored")
def pictures(
    bank: _BANK,
    service: ServiceOf,
    wanted: _FilterOf,
    order: Annotated[Order, Query(description="the newest first, or the smallest p-value")] = "newest",
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    size: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Response:
    """A page of the pictures that were scored against a bank."""
    _ = service.station(bank)
    found = service.history.find(replace(wanted, bank=bank, order=order, page=page, size=size))
    numbers = {"total": found.total, "page": found.page, "size": found.size, "pages": found.pages}
    return JSONResponse({"items": [picture_numbers(item) for item in found.items], **numbers})


@router.get(
    "/banks/{bank}/pictures.csv",
    tags=["pictures"],
    summary="What was scored, as a table",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {}}, "description": "a line for each picture"}},
)
def pictures_csv(bank: _BANK, service: ServiceOf, wanted: _FilterOf) -> Response:
    """All pictures that a filter lets pass, newest first, for spreadsheets: text cannot be taken for a formula."""
    _ = service.station(bank)

    def lines() -> Iterator[str]:
        yield csv_line(_CSV)
        for item in service.history.every(replace(wanted, bank=bank)):
            yield csv_line(_csv_cells(item))

    headers = {"content-disposition": 'attachment; filename="pictures.csv"'}
    return StreamingResponse(lines(), media_type="text/csv; charset=utf-8", headers=headers)


@router.get(
    "/banks/{bank}/labels.zip",
    tags=["answers"],
    summary="The pictures that were answered, as a labeled set",
    response_class=FileResponse,
    responses={200: {"content": {"application/zip": {}}, "description": "test/good/* and test/defect/*"}},
)
def labels_zip(bank: _BANK, service: ServiceOf) -> Response:
    """Unpacked, it is a folder that `spade-faiss evaluate` takes. Pictures that an answer put into the bank are not in it:
    they would be compared with themselves.
    """
    _ = service.station(bank)
    path = service.files.exports / f"{new_id()}.zip"
    try:
        count = _write_labels(service, bank, path)
        if not count:
            raise UnknownError(f"no picture of {bank} was answered yet, beside those that came into the bank")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UnavailableError(f"the archive cannot be written at the moment: {error.strerror or error}", 10) from error
    except SpadeError:
        path.unlink(missing_ok=True)
        raise
    return FileResponse(
        path,
        media_type="application/zip",
        filename="labels.zip",
        background=BackgroundTask(path.unlink, missing_ok=True),
    )


@router.get("/banks/{bank}/changes", response_model=list[ChangeModel], tags=["banks"], summary="How a bank has changed")
def changes(bank: _BANK, service: ServiceOf, limit: Annotated[int, Query(ge=1, le=500)] = 50) -> Response:
    """The last changes while it was served, newest first: by which answers, and which alarms are none any more."""
    _ = service.station(bank)
    return JSONResponse([change_numbers(change) for change in service.history.changes(bank, limit)])


@router.get(
    "/banks/{bank}/normal",
    tags=["banks"],
    summary="A normal picture of a bank",
    response_class=Response,
    responses=_PNG,
)
def normal(bank: _BANK, name: Annotated[str, Query(max_length=4096, examples=["000.png"])], service: ServiceOf) -> Response:
    """A normal picture as the backbone saw it, if its file is where it was, and has not changed."""
    return Response(service.normal_png(bank, name), media_type="image/png", headers=_FOR_GOOD)


@router.post(
    "/banks/{bank}/feedback",
    response_model=AnswerModel,
    status_code=202,
    tags=["answers"],
    summary="Say what a picture shows",
)
def bank_feedback(bank: _BANK, given: BankFeedbackModel, service: ServiceOf) -> Response:
    """As `POST /v1/pictures/{id}/feedback`, with the picture in the body."""
    if service.history.get(given.id).bank != service.station(bank).name:
        raise UnknownError(f"there is no picture {given.id} of the bank {bank}")
    return _answered(service, given.id, given)


@router.get("/pictures/{id}", response_model=PictureModel, tags=["pictures"], summary="A picture")
def picture(id: _ID, service: ServiceOf) -> Response:
    """A picture with its verdict, and what was said of it."""
    return JSONResponse(picture_numbers(service.history.get(id)))


@router.get("/pictures/{id}/file", tags=["pictures"], summary="The file as it came", response_class=FileResponse)
def picture_file(id: _ID, service: ServiceOf) -> Response:
    """The picture as it was sent; browsers save it, and show it nowhere."""
    found = service.history.get(id)
    path = service.files.picture_path(found.id, found.suffix)
    if not path.is_file():
        raise UnknownError(f"the file of picture {id} was removed, see --keep and --keep-bytes")
    return FileResponse(path, media_type="application/octet-stream", filename=path.name, headers=_FOR_GOOD)


@router.get(
    "/pictures/{id}/picture", tags=["pictures"], summary="What the backbone saw", response_class=Response, responses=_PNG
)
def picture_png(id: _ID, service: ServiceOf) -> Response:
    """The picture as it was scored: cut or resized to the backbone's input."""
    return Response(service.picture_png(service.history.get(id)), media_type="image/png", headers=_FOR_GOOD)


@router.get(
    "/pictures/{id}/map",
    tags=["pictures"],
    summary="The score map",
    response_class=Response,
    responses={200: {"content": {"image/png": {}, "application/x-npy": {}}, "description": "a PNG file, or an array"}},
)
def map_png(
    id: _ID,
    service: ServiceOf,
    format: Annotated[
        Literal["png", "npy"], Query(description="colors, or the scores as NumPy's array file (float16)")
    ] = "png",
) -> Response:
    """The score of every pixel: as colors that compare between pictures of a bank, or as numbers."""
    found = service.history.get(id)
    if format == "png":
        return Response(service.map_png(found), media_type="image/png", headers=_FOR_GOOD)
    path = service.files.map_path(found.id)
    if not path.is_file():
        raise UnknownError(f"picture {id} has no map, or its file was removed, see --keep and --keep-bytes")
    return FileResponse(path, media_type="application/x-npy", filename=f"{id}.npy", headers=_FOR_GOOD)


@router.get(
    "/pictures/{id}/overlay",
    tags=["pictures"],
    summary="The picture under its map",
    response_class=Response,
    responses=_PNG,
)
def overlay_png(id: _ID, service: ServiceOf) -> Response:
    """The picture as it was scored, with the colors of its map over it."""
    return Response(service.overlay_png(service.history.get(id)), media_type="image/png", headers=_FOR_GOOD)


@router.post(
    "/pictures/{id}/feedback",
    response_model=AnswerModel,
    status_code=202,
    tags=["answers"],
    summary="Say what a picture shows",
)
def feedback(id: _ID, given: FeedbackModel, service: ServiceOf) -> Response:
    """`normal` puts the picture into the bank; indexes, calibration and older alarms follow in the background. `defect` is kept
    as a label. A second answer of the other kind takes the first one back.
    """
    return _answered(service, id, given)


@router.get("/answers/{id}", response_model=AnswerModel, tags=["answers"], summary="What has become of an answer")
def answer(id: _ID, service: ServiceOf) -> Response:
    """An answer with its state."""
    return JSONResponse(answer_numbers(service.history.get_answer(id)))


@router.post("/answers/{id}/undo", response_model=AnswerModel, status_code=202, tags=["answers"], summary="Take an answer back")
def undo(id: _ID, service: ServiceOf) -> Response:
    """Take an answer back; a picture that it put into the bank leaves that in the background."""
    return JSONResponse(answer_numbers(service.undo(id)), 202)


def _write_labels(service: Service, bank: str, path: Path) -> int:
    """Write the pictures that were answered into an archive; returns how many they are."""
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for label in service.history.labels(bank):
            answer, item = label.picture.answer, label.picture
            if answer is None or answer.bank_picture is not None:
                continue
            file = service.files.picture_path(item.id, item.suffix)
            if file.is_file():
                archive.write(file, f"test/{'good' if label.kind == 'normal' else 'defect'}/{item.id}{item.suffix}")
                count += 1
    return count


def _bank(service: Service, name: str) -> dict[str, Any]:
    station = service.station(name)
    achieved = asdict(service.achieved(name))
    return {
        "name": name,
        "state": station.state,
        "message": station.message,
        "normals": station.normals,
        "queue": station.waiting,
        "pending": len(service.history.pending(name)),
        **overview_numbers(service.overview(name)),
        "achieved": {key: achieved[key] for key in ("false_alarms", "misses", "false_alarms_of_all")},
    }


def _scored(service: Service, bank: str, results: Sequence[Result]) -> dict[str, Any]:
    items = []
    for name, found in results:
        if isinstance(found, ScoredPicture):
            items.append({"name": found.name, "picture": picture_numbers(found), "problem": None})
        else:
            items.append({"name": name, "picture": None, "problem": problem_numbers(found)})
    return {"bank": bank, "generation": service.station(bank).generation, "pictures": items}


def _answered(service: Service, picture_id: str, given: FeedbackModel) -> Response:
    found = service.answer(picture_id, given.kind, given.note.replace("\0", ""), given.by.replace("\0", ""))
    return JSONResponse(answer_numbers(found), 202)


def _csv_cells(item: ScoredPicture) -> list[object]:
    given, later = item.answer, item.now
    numbers = [item.scores.get(name) for name in ("knn", "max", "top")]
    cells: list[object] = [
        item.id,
        text_cell(item.bank),
        text_cell(item.name),
        text_cell(item.source),
        item.received.isoformat(),
    ]
    cells += [item.generation, item.ranked_by, *numbers, item.p_value, item.alpha, item.alarm, len(item.regions)]
    cells += ["", ""] if given is None else [given.kind, text_cell(given.note)]
    cells += [None, None, None] if later is None else [later.generation, later.p_value, later.alarm]
    cells += [None if item.product is None else text_cell(item.product), item.confidence, item.p_none]
    return ["" if cell is None else int(cell) if isinstance(cell, bool) else cell for cell in cells]


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
