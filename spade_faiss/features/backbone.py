"""Runs a network: preprocessed images become embeddings and feature maps, on a device, in a precision."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from spade_faiss.core.device import check_fork, find_device
from spade_faiss.core.errors import InputError
from spade_faiss.core.memory import format_bytes, physical_bytes
from spade_faiss.core.process import fork_safe
from spade_faiss.core.schema import check_choice
from spade_faiss.core.settings import PRECISIONS, Preprocess, Run, Source
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import Level
from spade_faiss.features.memory import forward_bytes
from spade_faiss.features.network import Network
from spade_faiss.features.weights import hash_weights


class Backbone:
    """A network that turns n preprocessed images into (n, d) embeddings and (n, H, W, C) maps per level.

    Args:
        network: what computes; its module is switched to evaluation mode and moved to the device, channels last.
        preprocess: how images become inputs.
        precision: `float32`, or `bfloat16` for automatic mixed precision; features are float32 either way.
        device: where it runs, see `Detector.open`; of several cards, the first.

    Raises:
        InputError: if a level of the network is not a map, if the precision or the device is unknown, or if one
            image is more than the machine's memory holds.
    """

    @fork_safe
    def __init__(
        self,
        network: Network,
        *,
        preprocess: Preprocess | None = None,
        precision: str = "float32",
        device: str = Run.device,
    ) -> None:
        check_choice("precision", precision, PRECISIONS)
        preprocess = preprocess or Preprocess()
        self._found_device = find_device(device)
        self._device = torch.device(self._found_device.torch_names[0])
        if self._device.type == "cuda":
            # cuDNN would round float32 to TF32; without, features are those of the CPU to rounding. torch has one such setting
            # for the process: to put it back after each pass would turn it on in the middle of another thread's.
            torch.backends.cudnn.allow_tf32 = False
        _check_memory(preprocess.crop)
        module = network.module.eval().requires_grad_(False)
        # cast: torch's stubs lack this overload of Module.to.
        self._module = cast(Any, module).to(self._device, memory_format=torch.channels_last)
        self._forward = network.forward
        self.source = Source(
            backbone=network.name,
            weights_sha256=hash_weights(module.state_dict()),
            precision=precision,
            preprocess=preprocess,
        )
        side = preprocess.crop
        embedding, maps = self(np.zeros((1, 3, side, side), np.float32))
        self.embedding_dim = embedding.shape[1]
        self.input_size = (side, side)
        self.levels = tuple(
            Level(level, channels=m.shape[3], stride=_stride(side, m.shape[1]), height=m.shape[1], width=m.shape[2])
            for level, m in maps.items()
        )

    @fork_safe
    def __call__(self, inputs: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Run the network.

        Args:
            inputs: (n, 3, H, W) float32, preprocessed.

        Returns:
            The embedding (n, d) and, for each level, maps (n, H, W, C), all float32.

        Raises:
            InputError: if a level of the network is not (n, C, H, W); for CUDA cards in a fork of a process that used CUDA.
        """
        check_fork(self._found_device)
        with torch.inference_mode(), self._autocast():
            x = torch.from_numpy(inputs).to(self._device).contiguous(memory_format=torch.channels_last)
            embedding, maps = self._forward(x)
        for level, m in maps.items():
            if m.ndim != 4:
                raise InputError(
                    f"backbone {self.source.backbone!r}: level {level!r} gives {m.ndim} dimensions, expected (n, C, H, W)"
                )
        return _to_numpy(embedding), {level: _to_numpy(m.permute(0, 2, 3, 1)) for level, m in maps.items()}

    def with_bit_depth(self, bit_depth: int | None) -> Backbone:
        """The same network for images of another bit depth, see `Preprocess`."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.source = replace(self.source, preprocess=replace(self.source.preprocess, bit_depth=bit_depth))
        return other

    def __copy__(self) -> Backbone:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return self  # it never changes, so that copies may share it

    def __reduce__(self) -> NoReturn:
        raise InputError(
            f"the backbone {self.source.backbone!r} cannot be pickled; load or make it in each process, or pass its name"
        )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.source.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


def _check_memory(side: int) -> None:
    """Raise InputError if one input is more than this machine can hold: the system would end the process without a word."""
    needed, there = forward_bytes(1, (side, side)), physical_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"crop={side} is too large: one image takes about {format_bytes(needed)}, this machine has "
            f"{format_bytes(there)}; lower it"
        )


def _stride(side: int, size: int) -> int:
    """The input pixels between two locations of a map: networks halve, rounding up, or cut the input into equal patches."""
    halved = 1 << (math.ceil(side / size) - 1).bit_length()
    return halved if math.ceil(side / halved) == size else round(side / size)


def _to_numpy(tensor: Tensor) -> FloatArray:
    return np.ascontiguousarray(tensor.float().cpu().numpy())
