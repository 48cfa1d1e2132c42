"""A backbone: preprocessed images become embeddings and feature maps, by one of the engines for the forward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from spade_faiss.core.device import CPU, find_device
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import PRECISIONS, Preprocess, Source
from spade_faiss.core.memory import format_bytes, physical_bytes
from spade_faiss.core.once import Once
from spade_faiss.core.process import fork_safe
from spade_faiss.core.roi import Roi
from spade_faiss.core.schema import check_choice
from spade_faiss.core.settings import Run
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import Level
from spade_faiss.features.forward.protocol import Features, Forward
from spade_faiss.features.memory import forward_bytes

if TYPE_CHECKING:
    from spade_faiss.features.network import Network


class Backbone:
    """A network that turns n preprocessed images into (n, d) embeddings and (n, H, W, C) maps per level.

    Made of a network, it runs by torch; a bank that carries its network opens it by another engine.

    Args:
        network: what computes; its module is switched to evaluation mode and moved to the device, channels last.
        preprocess: how images become inputs.
        precision: `float32`, or `bfloat16` for automatic mixed precision; features are float32 either way.
        device: where it runs, see `Detector.open`.

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
        from spade_faiss.features.forward.torch import TorchForward
        from spade_faiss.features.weights import hash_weights

        check_choice("precision", precision, PRECISIONS)
        preprocess = preprocess or Preprocess()
        found_device = find_device(device)
        height, width = preprocess.input_size
        _check_memory(preprocess)
        forward = TorchForward(network, precision, found_device)
        embedding, maps = forward(np.zeros((1, 3, height, width), np.float32))
        source = Source(
            backbone=network.name,
            weights_sha256=hash_weights(network.module.state_dict()),
            precision=precision,
            preprocess=preprocess,
            blocks=network.blocks,
        )
        levels = tuple(
            Level(
                level,
                channels=m.shape[3],
                # Patches divide the input; from the sizes alone, 4 of 14 pixels look like 4 of 16.
                stride=height // m.shape[1] if network.blocks else _stride((height, width), m.shape[1:3]),
                height=m.shape[1],
                width=m.shape[2],
            )
            for level, m in maps.items()
        )
        self._set(forward, source, levels, embedding.shape[1])
        self._network: Network | None = network
        self._exported = Once(partial(_export, network, (height, width), tuple(maps)))

    @classmethod
    def by_engine(cls, forward: Forward, source: Source, levels: tuple[Level, ...], embedding_dim: int) -> Backbone:
        """Make a backbone of an exported network that an engine has opened.

        Args:
            forward: runs the network.
            source: what its features are.
            levels: the levels that it returns.
            embedding_dim: the length of its embeddings.
        """
        made = object.__new__(cls)
        made._set(forward, source, levels, embedding_dim)
        made._network = None
        return made

    def _set(self, forward: Forward, source: Source, levels: tuple[Level, ...], embedding_dim: int) -> None:
        self._forward = forward
        self.source = source
        self.levels = levels
        self.embedding_dim = embedding_dim
        self.input_size = source.preprocess.input_size

    @property
    def engine(self) -> str:
        """What runs the network: `torch`, `onnxruntime` or `openvino`."""
        return self._forward.engine

    def __call__(self, inputs: FloatArray) -> Features:
        """Run the network.

        Args:
            inputs: (n, 3, H, W) float32, preprocessed.

        Returns:
            The embedding (n, d) and, for each level, maps (n, H, W, C), all float32.

        Raises:
            InputError: if a level of the network is not (n, C, H, W); for CUDA cards in a fork of a process that used CUDA.
        """
        return self._forward(inputs)

    def in_float32(self, inputs: FloatArray) -> Features:
        """Run the network in float32 on the device that it is on, whatever its precision; see `__call__`."""
        from spade_faiss.features.forward.torch import TorchForward

        if self.source.precision == "float32":
            return self._forward(inputs)
        return TorchForward(self._own_network(), "float32", CPU)(inputs)

    def export(self) -> bytes:
        """Export the network as an ONNX file, once, for engines that need no torch.

        Raises:
            InputError: if the network cannot be exported, or was not made of a network.
            DependencyError: if the package onnx is not installed.
        """
        self._own_network()
        return self._exported()

    def _own_network(self) -> Network:
        if self._network is None:
            raise InputError(f"the backbone {self.source.backbone!r} is an exported network; load it by its name to export it")
        return self._network

    def with_bit_depth(self, bit_depth: int | None) -> Backbone:
        """The same network for images of another bit depth, see `Preprocess`."""
        return self._with_preprocess(replace(self.source.preprocess, bit_depth=bit_depth))

    def with_roi(self, roi: Roi | None, *, own_rois: bool = False) -> Backbone:
        """The same network for images with another region of interest, or with regions of their own, see `Preprocess`."""
        return self._with_preprocess(replace(self.source.preprocess, roi=roi, own_rois=own_rois))

    def placed_as(self, preprocess: Preprocess) -> Backbone:
        """The same network for images that are placed otherwise in inputs of the same size: by another resize mode.

        Raises:
            InputError: for another size, for which the network has to be loaded again.
        """
        if preprocess.input_size != self.input_size:
            raise InputError(f"size={preprocess.size} is not that of the backbone, {self.source.preprocess.size}")
        own = self.source.preprocess
        return self._with_preprocess(replace(preprocess, mean=own.mean, std=own.std, bit_depth=own.bit_depth))

    def _with_preprocess(self, preprocess: Preprocess) -> Backbone:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.source = replace(self.source, preprocess=preprocess)
        return other

    def __copy__(self) -> Backbone:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return self  # it never changes, so that copies may share it

    def __reduce__(self) -> NoReturn:
        raise InputError(
            f"the backbone {self.source.backbone!r} cannot be pickled; load or make it in each process, or pass its name"
        )


def _export(network: Network, input_size: tuple[int, int], levels: tuple[str, ...]) -> bytes:
    from spade_faiss.features.forward.export import export

    return export(network, input_size, levels)


def _check_memory(preprocess: Preprocess) -> None:
    """Raise InputError if one input is more than this machine can hold: the system would end the process without a word."""
    needed, there = forward_bytes(1, preprocess.input_size), physical_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"size={preprocess.size} is too large: one image takes about {format_bytes(needed)}, this machine has "
            f"{format_bytes(there)}; lower it"
        )


def _stride(input_size: tuple[int, int], shape: tuple[int, ...]) -> int:
    """The input pixels between two locations of a map: networks halve, rounding up, or cut the input into equal patches.

    Both are (height, width). The longer side tells: of few locations, many strides leave as many.
    """
    side, size = max(zip(input_size, shape, strict=True))
    halved = 1 << (math.ceil(side / size) - 1).bit_length()
    return halved if math.ceil(side / halved) == size else round(side / size)
