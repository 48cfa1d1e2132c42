"""For whoever operates the server: whether it lives, whether it is ready, and what it measures."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from spade_faiss.serve.errors import UnavailableError
from spade_faiss.serve.metrics import CONTENT_TYPE
from spade_faiss.serve.service import Service

router = APIRouter(tags=["operations"])


async def _service(request: Request) -> Service:  # one that is not async would be called in another thread
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


@router.get("/healthz", summary="Whether the server lives")
async def healthz() -> Response:
    """Always, as long as it answers."""
    return JSONResponse({"status": "ok"})


@router.get(
    "/readyz",
    summary="Whether all banks can be scored against",
    responses={503: {"description": "One of them is being opened, or cannot be served"}},
)
async def readyz(service: ServiceOf) -> Response:
    """The state of each bank; 503 unless all of them are ready."""
    ready = all(station.is_open for station in service.stations.values())
    states: dict[str, Any] = {name: station.state for name, station in sorted(service.stations.items())}
    return JSONResponse({"status": "ready" if ready else "not ready", "banks": states}, 200 if ready else 503)


@router.get("/metrics", summary="What is measured, for Prometheus", response_class=Response)
def metrics(service: ServiceOf) -> Response:
    """Latency by stage, the queue, verdicts, answers, the p-value of the drift test, and the generation of each bank."""
    for station in service.stations.values():
        with suppress(UnavailableError):  # what is measured matters most when the history cannot be used
            station.drift()
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)
