"""Decoding: Pillow as this project uses it, Pillow's draft mode, and other libraries, on the same files."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.deployment.measure import Row, in_turn, ratio
from benchmarks.deployment.places import Places
from benchmarks.process import seconds, spread
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.decoding import decode
from spade_faiss.features.pictures import to_picture
from spade_faiss.features.pixels import FULL_DEPTH, to_rgb
from spade_faiss.features.placement import place

PICTURES, QUALITY = 20, 95
# Larger pictures as JPEG: draft mode divides both sides by 2, 4 or 8 and has nothing to do where that is too small.
ENLARGED = 3
BASE = "pillow"
_REASONS = (ImportError, OSError, RuntimeError)

Pixels = npt.NDArray[np.uint8]
Decoder = Callable[[bytes], Image.Image]


def decoders(places: Places) -> Iterator[Row]:
    """Milliseconds to decode a picture and to decode and resize it, and whether pixels are those of Pillow bit for bit."""
    pngs = [record.path for record in places.dataset("mvtec_bottle").test[:PICTURES]]
    for kind, files in {
        "PNG": [path.read_bytes() for path in pngs],
        "JPEG": [_jpeg(path, 1) for path in pngs],
        "JPEG, three times the side": [_jpeg(path, ENLARGED) for path in pngs],
    }.items():
        available, missing = _available(kind)
        runs = {name: partial(_ms, partial(_resized, decoder), files) for name, decoder in available.items()}
        bare = {f"{name}, decoding": partial(_ms, decoder, files) for name, decoder in available.items()}
        found = in_turn({**runs, **bare}, places.repeats)
        expected = [available[BASE](data) for data in files]
        for name, decoder in available.items():
            images = [decoder(data) for data in files]
            yield {
                "file": kind,
                "decoder": name,
                "pictures": len(files),
                "side": expected[0].size[0],
                "ms": spread(found[name]),
                "decode_ms": spread(found[f"{name}, decoding"]),
                "times_pillow": ratio(found[BASE], found[name]),
                "equal_pixels": all(_same(a, b) for a, b in zip(images, expected, strict=True)),
                "largest_difference": max(
                    int(np.abs(_fitted(a).astype(int) - _fitted(b)).max()) for a, b in zip(images, expected, strict=True)
                ),
            }
        for name, reason in missing.items():
            yield {"file": kind, "decoder": name, "not_measured": reason}


def _jpeg(path: Path, times: int) -> bytes:
    with Image.open(path) as image:
        large = image.convert("RGB").resize((times * image.width, times * image.height), Image.Resampling.BICUBIC)
    to = io.BytesIO()
    large.save(to, "JPEG", quality=QUALITY)
    return to.getvalue()


def _available(kind: str) -> tuple[dict[str, Decoder], dict[str, str]]:
    """The decoders of a kind of file that can be used here, and why others cannot."""
    makers: dict[str, Callable[[], Decoder]] = {BASE: lambda: _by_pillow}
    if kind == "PNG":
        makers["imagecodecs"] = lambda: _by_array(importlib.import_module("imagecodecs").png_decode)
    else:
        makers |= {
            "pillow, draft": lambda: _by_draft,
            "imagecodecs": lambda: _by_array(importlib.import_module("imagecodecs").jpeg8_decode),
            "simplejpeg": lambda: _by_array(importlib.import_module("simplejpeg").decode_jpeg),
            "PyTurboJPEG": _turbojpeg,
        }
    found: dict[str, Decoder] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except _REASONS as error:
            missing[name] = " ".join(str(error).split())[:120]
    return found, missing


def _by_pillow(data: bytes) -> Image.Image:
    return to_rgb(decode(data, 1 << 30, cut=True), FULL_DEPTH)


def _by_draft(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (_preprocess().shorter_side,) * 2)
    return image.convert("RGB")


def _by_array(decoder: Callable[[bytes], Any]) -> Decoder:
    return lambda data: Image.fromarray(np.ascontiguousarray(decoder(data)))


def _turbojpeg() -> Decoder:
    module = importlib.import_module("turbojpeg")
    reader = module.TurboJPEG()
    return _by_array(lambda data: reader.decode(data, pixel_format=module.TJPF_RGB))


def _preprocess() -> Preprocess:
    return Preprocess()


def _fitted(image: Image.Image) -> Pixels:
    """The picture that the network sees of an image."""
    return to_picture(image, place(*image.size, _preprocess()))


def _resized(decoder: Decoder, data: bytes) -> Pixels:
    return _fitted(decoder(data))


def _same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and bool((np.asarray(a) == np.asarray(b)).all())


def _ms(run: Callable[[bytes], object], files: list[bytes]) -> float:
    """Milliseconds a file."""

    def every() -> None:
        for data in files:
            run(data)

    return 1000 * seconds(every) / len(files)
