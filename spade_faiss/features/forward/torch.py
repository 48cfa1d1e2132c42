"""The forward pass by torch: any network, on the CPU or a CUDA card."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from spade_faiss.core.device import Device, check_fork
from spade_faiss.core.errors import InputError
from spade_faiss.core.process import fork_safe
from spade_faiss.core.types import FloatArray
from spade_faiss.features.forward.protocol import Features
from spade_faiss.features.network import Network


class TorchForward:
    """Runs a network by torch.

    Args:
        network: what computes; its module is switched to evaluation mode and moved to the device, channels last.
        precision: `float32`, or `bfloat16` for automatic mixed precision.
        device: where it runs.
    """

    engine = "torch"

    def __init__(self, network: Network, precision: str, device: Device) -> None:
        self._device = device
        self._place = torch.device(device.torch_name)
        if self._place.type == "cuda":
            # cuDNN would round float32 to TF32; without, features are those of the CPU to rounding. torch has one such setting
            # for the process: to put it back after each pass would turn it on in the middle of another thread's.
            torch.backends.cudnn.allow_tf32 = False
        module = network.module.eval().requires_grad_(False)
        # cast: torch's stubs lack this overload of Module.to.
        cast(Any, module).to(self._place, memory_format=torch.channels_last)
        self._network = network
        self._precision = precision

    @fork_safe
    def __call__(self, inputs: FloatArray) -> Features:
        """Run the network, see `Forward`.

        Raises:
            InputError: if a level of the network is not (n, C, H, W); for CUDA cards in a fork of a process that used CUDA.
        """
        check_fork(self._device)
        with torch.inference_mode(), self._autocast():
            x = torch.from_numpy(inputs).to(self._place).contiguous(memory_format=torch.channels_last)
            embedding, maps = self._network.forward(x)
        for level, m in maps.items():
            if m.ndim != 4:
                raise InputError(
                    f"backbone {self._network.name!r}: level {level!r} gives {m.ndim} dimensions, expected (n, C, H, W)"
                )
        return _to_numpy(embedding), {level: _to_numpy(m.permute(0, 2, 3, 1)) for level, m in maps.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._place.type, dtype=torch.bfloat16)


def _to_numpy(tensor: Tensor) -> FloatArray:
    return np.ascontiguousarray(tensor.float().cpu().numpy())
