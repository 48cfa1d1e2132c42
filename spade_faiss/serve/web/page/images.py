"""The pictures of the page, and the values of a map, which the page's script draws."""

from __future__ import annotations

import io
import textwrap
from collections import OrderedDict
from threading import Lock
from xml.sax.saxutils import escape

import numpy as np
from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from spade_faiss.core.text import printable
from spade_faiss.report.pictures import shrink_map
from spade_faiss.serve.errors import UnknownError
from spade_faiss.serve.history.records import ScoredPicture
from spade_faiss.serve.service import Service
from spade_faiss.serve.web.page.rendering import service_of

router = APIRouter(include_in_schema=False)

# Of a thumbnail's longer side: twice as many pixels as it is wide on most screens.
_THUMBNAIL = 224
_QUALITY = 85
_CACHED = 3000  # thumbnails of some 6 kB
# What belongs to a record does not change: a browser may keep it, and nobody else.
_KEEP = {"cache-control": "private, max-age=86400"}


class Thumbnails:
    """The thumbnails that were made last, by the ids of their pictures."""

    def __init__(self) -> None:
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def __call__(self, service: Service, picture: ScoredPicture) -> bytes:
        """The thumbnail of a picture, under its heat map if it has one."""
        with self._lock:
            if picture.id in self._made:
                self._made.move_to_end(picture.id)
                return self._made[picture.id]
        source = service.picture_png(picture) if picture.map_size is None else service.overlay_png(picture)
        image = Image.open(io.BytesIO(source)).convert("RGB")
        image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, format="JPEG", quality=_QUALITY)
        with self._lock:
            self._made[picture.id] = data.getvalue()
            while len(self._made) > _CACHED:
                self._made.popitem(last=False)
        return data.getvalue()


@router.get("/pictures/{name}/thumbnail")
def thumbnail(request: Request, name: str) -> Response:
    """A small picture under its heat map."""
    service = service_of(request)
    thumbnails: Thumbnails = request.app.state.thumbnails
    return Response(thumbnails(service, service.history.get(name)), media_type="image/jpeg", headers=_KEEP)


@router.get("/pictures/{name}/view")
def view(request: Request, name: str) -> Response:
    """A picture as the backbone saw it."""
    service = service_of(request)
    return Response(service.picture_png(service.history.get(name)), media_type="image/png", headers=_KEEP)


@router.get("/pictures/{name}/values")
def values(request: Request, name: str) -> Response:
    """The score map of a picture as a NumPy file, as small as the picture is shown."""
    found = service_of(request).files.read_map(service_of(request).history.get(name).id)
    if found is None:
        raise UnknownError("the map of this picture is not kept any more, see --keep and --keep-bytes")
    small = np.ascontiguousarray(shrink_map(found))
    fits = float(np.abs(small).max(initial=0.0)) <= float(np.finfo(np.float16).max)
    data = io.BytesIO()
    np.lib.format.write_array(data, small.astype("<f2" if fits else "<f4"), version=(1, 0), allow_pickle=False)
    return Response(data.getvalue(), media_type="application/octet-stream", headers=_KEEP)


@router.get("/pictures/{name}/normals/{number}")
def normal(request: Request, name: str, number: int) -> Response:
    """A normal picture that a picture was compared with; a drawing that says why, where it cannot be shown."""
    service = service_of(request)
    picture = service.history.get(name)
    if not 0 <= number < len(picture.nearest):
        raise UnknownError(f"picture {picture.id} was compared with {len(picture.nearest)} normal pictures, not with {number}")
    try:
        return Response(service.normal_png(picture.bank, picture.nearest[number].id), media_type="image/png", headers=_KEEP)
    except UnknownError as error:
        return Response(_in_words(str(error)), media_type="image/svg+xml")


def _in_words(reason: str) -> str:
    """A drawing of some text, in place of a picture."""
    lines = textwrap.wrap(printable(reason), 30)[:9]
    text = "".join(f'<text x="100" y="{40 + 16 * i}">{escape(line)}</text>' for i, line in enumerate(lines))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 200" preserveAspectRatio="xMidYMid meet">'
        '<rect width="200" height="200" fill="#e9edf1"/>'
        f'<g font-family="sans-serif" font-size="11" text-anchor="middle" fill="#3c4550">{text}</g></svg>'
    )
