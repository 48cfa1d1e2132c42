"""Where computations run: on the CPU, or on a CUDA card."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spade_faiss.core.errors import InputError
from spade_faiss.core.process import is_fork


@dataclass(frozen=True)
class Device:
    """Where computations run.

    Args:
        kind: `cpu` or `cuda`.
        card: the number of the CUDA card; 0 for the CPU.
    """

    kind: str = "cpu"
    card: int = 0

    @property
    def torch_name(self) -> str:
        """The name by which torch knows the device."""
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.card}"

    def __str__(self) -> str:
        return self.torch_name


CPU = Device()


def parse_device(text: str, cards: int, why_none: str = "") -> Device:
    """Find the device that a text such as `auto`, `cpu`, `cuda` or `cuda:1` stands for.

    Args:
        text: what a user wrote; `auto` stands for the first card if there is one, and for the CPU otherwise.
        cards: the number of CUDA cards.
        why_none: an explanation that an error message gives if there is no card.

    Raises:
        InputError: for any other text, or for a card that does not exist.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,4}))?", text)
    if found is None:
        raise InputError(f"device={text!r} is not a device; use auto, cpu, cuda or cuda:NUMBER")
    if text == "cpu" or (text == "auto" and cards == 0):
        return CPU
    if cards == 0:
        raise InputError(f"device={text!r}: there is no CUDA card that torch can use{why_none}; use --device cpu")
    if (card := int(found[1] or 0)) >= cards:
        there = ", ".join(f"cuda:{number}" for number in range(cards))
        raise InputError(f"device={text!r} does not exist; this machine has {there}")
    return Device("cuda", card)


def find_device(text: str) -> Device:
    """Find the device that a text stands for on this machine. Torch is imported only if the answer depends on the cards.

    Raises:
        InputError: as `parse_device` and `check_fork` do.
    """
    if text == "cpu":
        return CPU
    import torch

    built = torch.version.cuda
    why = " (it was built without CUDA)" if built is None else f" (it was built for CUDA {built}; is there a driver?)"
    found = parse_device(text, torch.cuda.device_count() if torch.cuda.is_available() else 0, why)
    check_fork(found)
    return found


def check_fork(device: Device) -> None:
    """Raise InputError for a CUDA card in a fork of a process that had used CUDA: the driver does not allow it."""
    if device.kind == "cpu" or not is_fork():
        return
    import torch

    if torch.cuda._is_in_bad_fork():
        raise InputError(
            f"{device} cannot be used in this process: it was forked from one that had used CUDA; start processes with "
            f"multiprocessing.get_context('spawn'), or fork before the first use of CUDA, or use device='cpu'"
        )
