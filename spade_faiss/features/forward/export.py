"""Exports a network from torch to ONNX, for engines that run it without torch."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spade_faiss.core.errors import DependencyError, InputError
from spade_faiss.core.memory import is_out_of_memory
from spade_faiss.core.schema import cut
from spade_faiss.features.forward.protocol import EMBEDDING, INPUT
from spade_faiss.features.network import Network

# The oldest set of operators that has all that the exporter writes.
_OPSET = 17
_SHOWN = 300


def export(network: Network, input_size: tuple[int, int], levels: Sequence[str]) -> bytes:
    """Export a network for inputs of one size, any number at a time.

    Args:
        network: the network, in evaluation mode.
        input_size: the height and width of its inputs.
        levels: the names of its levels, finest first.

    Returns:
        An ONNX file: `input` (n, 3, height, width) to `embedding` (n, d) and the levels (n, H, W, C), all float32.

    Raises:
        InputError: if the network cannot be exported.
        DependencyError: if the package onnx is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise DependencyError(
            f"exporting {network.name} needs the package 'onnx'; install it with: pip install 'spade-faiss[torch]'"
        )
    device = next((weight.device for weight in network.module.parameters()), torch.device("cpu"))
    names, file = [EMBEDDING, *levels], io.BytesIO()
    with warnings.catch_warnings():
        # It warns of each size that is fixed, which is what is asked for, and that another exporter is to replace it: that one
        # takes ten times as long for the same graph.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                _ChannelsLast(network).eval(),  # left in training mode, the network would be switched to it afterwards
                (torch.zeros(2, 3, *input_size, device=device),),
                file,  # type: ignore[arg-type]  # the type is that of the exporter to come
                dynamo=False,
                input_names=[INPUT],
                output_names=names,
                dynamic_axes={name: {0: "n"} for name in (INPUT, *names)},
                opset_version=_OPSET,
            )
        except Exception as error:  # torch raises a dozen types of error for one cause: the network cannot be exported
            if is_out_of_memory(error):
                raise
            text = cut(" ".join(str(error).split()), _SHOWN)
            raise InputError(f"the network {network.name} cannot be exported to ONNX ({text}); use --engine torch") from error
    return file.getvalue()


class _ChannelsLast(nn.Module):
    """A network whose maps are (n, H, W, C)."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.module = network.module
        self._network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with _FixedSizes():
            embedding, maps = self._network.forward(x)
        return embedding, *(m.permute(0, 2, 3, 1) for m in maps.values())


class _FixedSizes(TorchFunctionMode):
    """Makes numbers of all sizes but the first: only the number of images is left open.

    The trace would hold how margins follow from the input's size otherwise, operator by operator. The norm by the root of the
    mean square, which this set of operators lacks, is written out.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.rms_norm:
            return _rms_norm(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.shape.__get__ or (func is torch.Tensor.size and isinstance(found, tuple)):  # type: ignore[attr-defined]
            return (found[0], *map(int, found[1:])) if found else found
        return found


def _rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """What `torch.nn.functional.rms_norm` computes."""
    dims = tuple(range(-len(normalized_shape), 0))
    scaled = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    return scaled if weight is None else scaled * weight
