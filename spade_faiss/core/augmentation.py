"""Which views of a normal picture a bank holds beside the picture itself, and how that is written."""

from __future__ import annotations

from dataclasses import dataclass

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import is_finite, shorten

# More than one view a few degrees finds nothing new, and costs as much again.
_MOST_TURNS = 72
_BRIGHTEST = 10.0


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The views that are made of a picture.

    Args:
        rotate: into how many equal parts a full turn is divided: the picture is turned by each multiple of them; 1 for no turn.
        flip: whether the mirror image of the picture, left and right exchanged, and those of all its turns are added.
        brightness: the factors of one darker and one brighter view of the picture, which is not turned; None for neither.

    Raises:
        InputError: for a value out of its range, and for what adds no view.
    """

    rotate: int = 1
    flip: bool = False
    brightness: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rotate, bool) or not isinstance(self.rotate, int) or not 1 <= self.rotate <= _MOST_TURNS:
            raise InputError(f"rotate={shorten(self.rotate)} must be a whole number from 2 to {_MOST_TURNS}")
        if self.brightness is not None:
            if len(self.brightness) != 2 or not all(map(is_finite, self.brightness)):
                raise InputError(f"brightness={shorten(self.brightness)} must be two numbers, such as 0.8:1.2")
            darker, brighter = self.brightness
            if not 0 < darker < 1 < brighter <= _BRIGHTEST:
                raise InputError(
                    f"brightness={darker:g}:{brighter:g} must be a factor between 0 and 1, and one above 1 and at most "
                    f"{_BRIGHTEST:g}, such as 0.8:1.2"
                )
        if self.views == 1:
            raise InputError("the augmentation adds no view; name some, such as rotate=8,flip,brightness=0.8:1.2")

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read what is written as `rotate=8,flip,brightness=0.8:1.2`, any of the three.

        Raises:
            InputError: for anything else.
        """
        found: dict[str, object] = {}
        for part in text.split(","):
            name, sign, value = part.strip().partition("=")
            if name in found:
                raise InputError(f"augment={shorten(text)} names {name} twice")
            try:
                if name == "rotate" and sign:
                    found[name] = int(value)
                elif name == "flip" and not sign:
                    found[name] = True
                elif name == "brightness" and sign:
                    found[name] = tuple(map(float, value.split(":")))
                else:
                    raise ValueError
            except ValueError as error:
                raise InputError(
                    f"augment={shorten(text)}: {shorten(part)} is none of rotate=N, flip and brightness=A:B; "
                    f"write for example rotate=8,flip,brightness=0.8:1.2"
                ) from error
        return cls(**found)  # type: ignore[arg-type]

    @property
    def views(self) -> int:
        """How many entries a picture has in the bank, itself included."""
        return self.rotate * (2 if self.flip else 1) + (0 if self.brightness is None else 2)

    def __str__(self) -> str:
        parts = [f"rotate={self.rotate}"] if self.rotate > 1 else []
        parts += ["flip"] if self.flip else []
        parts += [] if self.brightness is None else ["brightness={:g}:{:g}".format(*self.brightness)]
        return ",".join(parts)
