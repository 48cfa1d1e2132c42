"""Makes views of a normal picture, which a bank holds beside it: turned, mirrored, darker and brighter.

All of it is computed from the picture alone: the same picture has the same views, whenever they are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from spade_faiss.core.augmentation import Augmentation
from spade_faiss.features.placement import Placement

# An image is named after its file, and no path holds an empty part: what follows is no image's name.
_SEPARATOR = "//"
# How far beyond the border of an image the rounding of a turned coordinate may lie, in pixels.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class View:
    """A view of a picture.

    Args:
        name: how it was made, such as `rotate=45,flip`; it is part of the entry's id.
        picture: (H, W, 3) uint8.
        valid: (H, W), True where it shows the image.
    """

    name: str
    picture: npt.NDArray[np.uint8]
    valid: npt.NDArray[np.bool_]


def view_id(image: str, name: str) -> str:
    """Return the id of the entry that is made of a view: `good/001.png//rotate=45,flip`."""
    return f"{image}{_SEPARATOR}{name}"


def make_views(whole: npt.NDArray[np.uint8], placement: Placement, augmentation: Augmentation) -> list[View]:
    """Make the views of a picture, without the picture itself: `augmentation.views` - 1 of them.

    A turned picture shows what lay beside the part that the picture shows, as far as the image reaches; beyond, its border is
    repeated.

    Args:
        whole: (height, width, 3), the image resized as the placement says, before anything of it is cut off.
        placement: how it lies in the picture.
        augmentation: which views.
    """
    turned = list(_turned(whole, placement, augmentation.rotate))
    found = turned[1:]
    if augmentation.flip:
        found += [View(f"{view.name},flip".removeprefix(","), view.picture[:, ::-1], view.valid[:, ::-1]) for view in turned]
    if augmentation.brightness is not None:
        found += [
            replace(turned[0], name=f"brightness={factor:g}", picture=_scaled(turned[0].picture, factor))
            for factor in augmentation.brightness
        ]
    return found


def _turned(whole: npt.NDArray[np.uint8], placement: Placement, turns: int) -> Iterator[View]:
    """Yield the picture itself, and then its turns counterclockwise, by 1 / turns of a full one each."""
    left, top, right, bottom = placement.visible
    picture = np.pad(whole[top:bottom, left:right], (*placement.padding, (0, 0)), mode="edge")
    yield View("", picture, placement.valid)
    width, height = placement.size
    center = np.array([height - 1, width - 1]) / 2
    for turn in range(1, turns):
        degrees = 360 * turn / turns
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        # From (y, x) of the view to (y, x) of the whole image, both from the center of the picture.
        matrix = np.array([[cos, sin], [-sin, cos]])
        shift = center - placement.offset[::-1] - matrix @ center
        yield View(
            f"rotate={degrees:g}",
            _resampled(whole, matrix, shift, (height, width)),
            _inside(whole, matrix, shift, (height, width)),
        )


def _resampled(
    whole: npt.NDArray[np.uint8], matrix: npt.NDArray[np.float64], shift: npt.NDArray[np.float64], size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """(H, W, 3), bilinear; beyond the image, its border is repeated."""
    from scipy import ndimage  # takes longer to import than many images take to read, and only augmented ones need it

    found = np.empty((*size, 3), np.uint8)
    for channel in range(3):
        values = ndimage.affine_transform(whole[..., channel], matrix, shift, size, output=np.float32, order=1, mode="nearest")
        found[..., channel] = np.rint(values)
    return found


def _inside(
    whole: npt.NDArray[np.uint8], matrix: npt.NDArray[np.float64], shift: npt.NDArray[np.float64], size: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """(H, W), True where a view shows the image, and not its repeated border."""
    y, x = (matrix @ np.indices(size).reshape(2, -1) + shift[:, None]).reshape(2, *size)
    least, height, width = -0.5 - _ROUNDING, whole.shape[0] - 0.5 + _ROUNDING, whole.shape[1] - 0.5 + _ROUNDING
    found: npt.NDArray[np.bool_] = (y > least) & (y < height) & (x > least) & (x < width)
    return found


def _scaled(picture: npt.NDArray[np.uint8], factor: float) -> npt.NDArray[np.uint8]:
    """Multiply all values; those beyond white are white."""
    found: npt.NDArray[np.uint8] = np.rint(picture * np.float32(factor)).clip(0, 255).astype(np.uint8)
    return found
