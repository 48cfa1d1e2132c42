"""Takes the pictures of a request in, and waits for their verdicts: for the API and the page alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from spade_faiss.bank.snapshot import unknown_product
from spade_faiss.core.errors import InputError, SpadeError
from spade_faiss.serve.errors import TooLargeError, UnavailableError
from spade_faiss.serve.history.records import ScoredPicture
from spade_faiss.serve.service import Service
from spade_faiss.serve.station.station import Station
from spade_faiss.serve.station.verdicts import Upload
from spade_faiss.serve.web.uploads import Arrived, receiver_of

# What the sender calls a picture, and what became of it.
Result = tuple[str, ScoredPicture | SpadeError]


async def receive_and_score(request: Request, service: Service, bank: str, product: str | None = None) -> list[Result]:
    """Read the pictures of a request, score them, and return what became of each once that is on disk.

    Args:
        request: holds the pictures.
        service: what serves the banks.
        bank: the bank that they are scored against.
        product: the product that all of them show, in a bank of several; None where their nearest normals shall name it.

    Raises:
        UnknownError: if no such bank is served.
        UnavailableError: if the queue has no room for all of them, or it takes too long; all or none of them are taken.
        TooLargeError: if they are more than are allowed.
        InputError: for a body that cannot be understood, and for a product that the bank does not have.
        HTTPException: see `Receiver`.
    """
    station = service.station(bank)
    # Its detector is not asked for: to open one takes longer than all other clients should wait.
    if product is not None and product not in (held := station.detector.bank).products:
        raise InputError(unknown_product(held, product))
    station.check_room()
    receiver = receiver_of(request, service.files, service.settings)
    with station.metrics.stage(station.name, "receive"):
        arrived = await receiver(request)
    uploads = [replace(item.upload, product=product) for item in arrived if item.upload is not None]
    if len(uploads) > (most := service.settings.max_queue):
        receiver.drop()
        raise TooLargeError(f"{len(uploads)} pictures are more than may wait, {most} (see --max-queue); send fewer at a time")
    # It goes on beyond the timeout: what was taken is recorded, and its key stays in flight until then.
    work = asyncio.create_task(_score(station, uploads) if receiver.key is None else _score_once(service, station, uploads))
    service.at_work.add(work)
    work.add_done_callback(partial(_end, service))
    try:
        async with asyncio.timeout(service.settings.timeout_s):
            found = await asyncio.shield(work)
    except TimeoutError:
        raise UnavailableError(
            f"scoring took longer than {service.settings.timeout_s:g} s; ask for the verdict later", 5
        ) from None
    scored = iter(found)
    return [(item.name, _result(item, scored)) for item in arrived]


def _end(service: Service, work: asyncio.Task[list[ScoredPicture | BaseException]]) -> None:
    service.at_work.discard(work)
    if not work.cancelled():
        work.exception()  # nobody may wait for it any more


def _result(item: Arrived, scored: object) -> ScoredPicture | SpadeError:
    if item.error is not None:
        return item.error
    found = next(scored)  # type: ignore[call-overload]
    if isinstance(found, BaseException) and not isinstance(found, SpadeError):
        raise found
    return found  # type: ignore[no-any-return]


async def _score(station: Station, uploads: Sequence[Upload]) -> list[ScoredPicture | BaseException]:
    try:
        jobs = station.submit(uploads)
    except BaseException:
        for upload in uploads:
            station.history.files.drop(upload.id)
        raise
    waiting: list[Awaitable[ScoredPicture]] = [asyncio.wrap_future(job.future) for job in jobs]
    return await asyncio.gather(*waiting, return_exceptions=True)


async def _score_once(service: Service, station: Station, uploads: Sequence[Upload]) -> list[ScoredPicture | BaseException]:
    """Score pictures that their sender may have sent before: those get the verdict that they got then."""
    found: dict[int, ScoredPicture | BaseException] = {}
    others: dict[int, asyncio.Future[ScoredPicture]] = {}
    ours: dict[int, Upload] = {}
    for i, upload in enumerate(uploads):
        key = (station.name, str(upload.key))
        if key in service.in_flight:
            others[i] = service.in_flight[key]
        else:
            ours[i] = upload
            service.in_flight[key] = asyncio.get_running_loop().create_future()
    try:
        for i, upload in ours.items():
            if (before := await run_in_threadpool(station.history.with_key, station.name, str(upload.key))) is not None:
                found[i] = before
        new = [i for i in ours if i not in found]
        found.update(zip(new, await _score(station, [ours[i] for i in new]), strict=True))
    except SpadeError:  # before any was submitted
        for upload in uploads:
            station.history.files.drop(upload.id)
        raise
    finally:
        for i, upload in ours.items():
            promise = service.in_flight.pop((station.name, str(upload.key)))
            outcome = found.get(i, UnavailableError("the same request was sent before, and could not be answered"))
            if isinstance(outcome, BaseException):
                promise.set_exception(outcome)
                promise.exception()  # nobody else may wait for it
            else:
                promise.set_result(outcome)
    for i, upload in enumerate(uploads):
        if i in others or (isinstance(found[i], ScoredPicture) and found[i].id != upload.id):  # type: ignore[union-attr]
            station.history.files.drop(upload.id)
    for i, promise in others.items():
        found[i] = (await asyncio.gather(asyncio.shield(promise), return_exceptions=True))[0]
    return [found[i] for i in range(len(uploads))]
