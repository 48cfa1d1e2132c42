"""Where to compute: the CPU, or CUDA cards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spade_faiss.core.errors import InputError


@dataclass(frozen=True)
class Device:
    """Where to compute: `cpu`, or the CUDA cards of these numbers."""

    kind: str = "cpu"
    cards: tuple[int, ...] = ()

    @property
    def torch_names(self) -> tuple[str, ...]:
        """Each part of it as torch calls it."""
        return tuple(f"cuda:{card}" for card in self.cards) or ("cpu",)

    def __str__(self) -> str:
        return ", ".join(self.torch_names)


CPU = Device()


def parse_device(text: str, cards: int, why_none: str = "") -> Device:
    """The device that a text such as `auto`, `cpu`, `cuda`, `cuda:1` or `cuda:all` means on a machine with so many CUDA cards.

    Args:
        text: `auto` means the first card if there is one, else the CPU.
        cards: how many there are.
        why_none: what an error says if there is none.

    Raises:
        InputError: for anything else, or a card that is not there.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(all|\d{1,4}))?", text)
    if found is None:
        raise InputError(f"device={text!r} is none; use auto, cpu, cuda, cuda:NUMBER or cuda:all")
    if text == "cpu" or (text == "auto" and cards == 0):
        return CPU
    if cards == 0:
        raise InputError(f"device={text!r}: there is no CUDA card that torch can use{why_none}; use --device cpu")
    if found[1] == "all":
        return Device("cuda", tuple(range(cards)))
    if (card := int(found[1] or 0)) >= cards:
        there = ", ".join(f"cuda:{number}" for number in range(cards))
        raise InputError(f"device={text!r} is not there; this machine has {there}")
    return Device("cuda", (card,))


def find_device(text: str) -> Device:
    """The same on this machine; torch is asked only where the answer depends on it.

    Raises:
        InputError: see `parse_device`.
    """
    if text == "cpu":
        return CPU
    import torch

    built = torch.version.cuda
    why = " (it was built without CUDA)" if built is None else f" (it was built for CUDA {built}; is there a driver?)"
    return parse_device(text, torch.cuda.device_count() if torch.cuda.is_available() else 0, why)
