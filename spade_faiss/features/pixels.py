"""Converts decoded pixels of any mode and depth to RGB with 8 bits a channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from spade_faiss.core.errors import InputError

# The bits of a channel that is stored in 16, unless a bank says that cameras used fewer.
FULL_DEPTH = 16
# Values that no depth below 16 bits can hold: an image that reaches them uses all 16.
_BEYOND_14_BITS = 1 << 14


@dataclass(frozen=True, eq=False)
class Decoded:
    """The upright pixels of an image, before they become RGB with 8 bits a channel.

    Args:
        pixels: an image with up to 8 bits a channel (or the upper 8 of 16), or an array of more: uint16 of (H, W) for gray, of
            (H, W, C) for gray with alpha, RGB, or RGB with alpha.
        depth: the bits that the values have, where the file says so; None for an array of 16 bits, of which a camera may have
            used fewer.
        is_cut: whether there were 16 bits, of which `pixels` has the upper 8.
    """

    pixels: Image.Image | npt.NDArray[np.uint16]
    depth: int | None = None
    is_cut: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.size if isinstance(self.pixels, Image.Image) else (self.pixels.shape[1], self.pixels.shape[0])


def to_rgb(decoded: Decoded, bit_depth: int | None = FULL_DEPTH) -> Image.Image:
    """Convert decoded pixels of any mode to RGB with 8 bits a channel.

    Of 16 bits, of which `bit_depth` are used, the upper 8 of those remain: one fixed scale, since stretching each image to its
    own range would make equal parts look different from image to image.

    Args:
        decoded: the pixels.
        bit_depth: how many of 16 bits are used; with None, it is not known.

    Raises:
        InputError: for floating point pixels, integers beyond 16 bits, values beyond `bit_depth`, and values that come out
            differently at different depths where the depth is not known.
    """
    image = decoded.pixels
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_to_8_bits(colors_of(image), decoded.depth, bit_depth))
    elif decoded.is_cut and bit_depth not in (None, FULL_DEPTH):
        raise InputError(f"only the upper 8 of its 16 bits can be read ({image.mode}), not {bit_depth} of them; save it as RGB")
    if image.mode in ("F", "LAB", "HSV"):
        what = "floating point numbers of unknown range" if image.mode == "F" else f"{image.mode} colors"
        raise InputError(f"its pixels are {what}; save it with 8 or 16 bits a channel" + " in RGB" * (image.mode != "F"))
    # Alpha is dropped, as torchvision's loaders do: blending would invent a background, and a photograph whose writer left
    # alpha at zero would come out black. (A copy of the info: without transparency, Pillow does not warn about palettes.)
    if "transparency" in image.info:
        image = image.copy()
        image.info.pop("transparency")
    if image.mode == "La":  # Pillow converts colors multiplied by alpha step by step only
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def colors_of(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """(H, W) or (H, W, 3): the channels without alpha."""
    return values if values.ndim == 2 else values[..., 0] if values.shape[2] == 2 else values[..., :3]


def decoded_of(image: Image.Image) -> Decoded:
    """An image that Pillow holds in memory, which must be upright.

    Raises:
        InputError: for values beyond 16 bits.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"its values run from {values.min()} to {values.max()}, expected 0 to 65535; save it with 16 bits")
        return Decoded(values.astype(np.uint16))
    return Decoded(image)


def _to_8_bits(values: npt.NDArray[np.uint16], depth: int | None, bit_depth: int | None) -> npt.NDArray[np.uint8]:
    if depth is None:
        top = int(values.max())
        if bit_depth is None:
            if 0 < top < _BEYOND_14_BITS:
                raise InputError(
                    f"it has 16 bits a channel and its values reach {top}; how many bits the camera gives is not known, since "
                    f"no normal image of the bank has 16; save it with 8 bits, or make the bank anew with --bit-depth"
                )
            depth = FULL_DEPTH
        elif top >> bit_depth:
            raise InputError(
                f"its values reach {top}, the bank was made of images with {bit_depth} bits, up to {(1 << bit_depth) - 1}; "
                f"save it with as many bits, or make the bank anew with --bit-depth {top.bit_length()} or more"
            )
        else:
            depth = bit_depth
    return (values >> (depth - 8)).astype(np.uint8)
