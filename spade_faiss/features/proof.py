"""Proves that engines compute what torch computes, on real inputs, before a bank carries the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Source
from spade_faiss.core.types import FloatArray
from spade_faiss.features.backbone import Backbone
from spade_faiss.features.batch import Level
from spade_faiss.features.forward.choice import open_forward, usable_engines
from spade_faiss.features.forward.graph import check_graph
from spade_faiss.features.forward.probe import Probe, difference
from spade_faiss.features.forward.protocol import Features

# Float32 engines differ from each other by 1e-6. One that differs by more than this from torch computes something else.
_MOST = 1e-4
# How far apart features may be elsewhere: other processors round otherwise.
_LEAST_LIMIT = 1e-5
_MARGIN = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class ExportedNetwork:
    """A network that engines other than torch can run, with the evidence that they compute the same.

    Args:
        graph: an ONNX file.
        source: what its features are.
        levels: its levels.
        embedding_dim: the length of its embeddings.
        probe: with which engines are proven elsewhere.
        differences: how far each engine that was installed is from torch in float32, see `probe.difference`.
        limit: how far from the probe an engine may be.
    """

    graph: bytes = field(repr=False)
    source: Source
    levels: tuple[Level, ...]
    embedding_dim: int
    probe: Probe
    differences: Mapping[str, float]
    limit: float

    def open(self, engine: str) -> Backbone:
        """Run it by one of the engines that were proven."""
        names, size = [level.name for level in self.levels], self.source.preprocess.input_size
        forward = open_forward(engine, partial(_given, self.graph), names, self.source.precision, size)
        return Backbone.by_engine(forward, replace(self.source, engine=engine), self.levels, self.embedding_dim)


def prove(backbone: Backbone, inputs: FloatArray, engine: str) -> ExportedNetwork:
    """Export a backbone from torch, and compare every engine that is installed with torch on real inputs.

    Args:
        backbone: computes by torch.
        inputs: (n, 3, H, W) of real images.
        engine: the engine that will make a bank. In float32 any may read it; in another precision only this one.

    Raises:
        InputError: if the network cannot be exported, or no engine computes what torch computes.
        DependencyError: if the package onnx is not installed.
    """
    graph, names, precision = backbone.export(), [level.name for level in backbone.levels], backbone.source.precision
    check_graph(graph, names)  # what a bank would not be opened with must not be written into it
    expected = backbone.in_float32(inputs)
    probe = _first(expected)
    differences: dict[str, float] = {}
    wrong: dict[str, float] = {}
    for name in usable_engines(precision) if precision == "float32" else (engine,):
        forward = open_forward(name, partial(_given, graph), names, precision, backbone.input_size)
        found = forward(inputs)
        apart = max(difference(found, expected), difference(forward(inputs[:1]), _first(expected)))
        (differences if apart <= _MOST or precision != "float32" else wrong)[name] = apart
        if precision != "float32":
            probe = _first(found)
    if not differences:
        raise InputError(
            f"no engine computes what torch computes for {backbone.source.backbone} ({wrong or 'none is installed'}); install "
            f"onnxruntime or openvino, or use --engine torch"
        )
    largest = max(differences.values())
    return ExportedNetwork(
        graph=graph,
        source=backbone.source,
        levels=backbone.levels,
        embedding_dim=backbone.embedding_dim,
        probe=Probe(inputs[:1], probe),
        differences=differences,
        limit=max(_LEAST_LIMIT, _MARGIN * largest) if precision == "float32" else largest,
    )


def _first(features: Features) -> Features:
    """The features of the first image, as if it had been alone."""
    return features[0][:1], {level: maps[:1] for level, maps in features[1].items()}


def _given(graph: bytes) -> bytes:
    return graph
