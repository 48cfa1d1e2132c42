"""The check of an exported network: what our exports hold passes, and nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spade_faiss.core.errors import InputError
from spade_faiss.features.forward.graph import check_graph

NAMES = ("fine", "coarse")


def changed(graph: bytes, change: Callable[[Any], object]) -> bytes:
    model = onnx.load_from_string(graph)
    change(model)
    data: bytes = model.SerializeToString()
    return data


def test_an_export_passes(graph: bytes) -> None:
    check_graph(graph, NAMES)
    check_graph(changed(graph, lambda model: None), NAMES)


def external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def branch(model: Any) -> None:
    inner = helper.make_graph([], "inner", [], [])
    node = model.graph.node[0]
    node.attribute.append(helper.make_attribute("then_branch", inner))


def function(model: Any) -> None:
    model.functions.append(helper.make_function("ours", "f", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], []))


def sparse(model: Any) -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def huge_pad(model: Any) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    pads = next(attribute for attribute in conv.attribute if attribute.name == "pads")
    pads.ints[:] = [1 << 30] * 4


def longer(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 1 << 50


def negative(model: Any) -> None:
    model.graph.initializer[0].dims[0] = -1


def text(model: Any) -> None:
    model.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"text"]))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "field 13|field 14"),
        (branch, "an attribute holds field 6"),
        (function, "the network holds field 25"),
        (sparse, "the graph holds field 15"),
        (huge_pad, "the setting 1073741824, at most 4096"),
        (longer, "another number of values"),
        (negative, "the dimensions"),
        (text, "field 6|the type 8"),
        (lambda model: setattr(model.graph.node[0], "op_type", "Loop"), "the operator 'Loop'"),
        (lambda model: setattr(model.graph.node[0], "op_type", "RandomNormal"), "the operator 'RandomNormal'"),
        (lambda model: setattr(model.graph.node[0], "domain", "com.microsoft"), "operators of 'com.microsoft'"),
        (lambda model: model.opset_import.add(domain="ours", version=1), "operators of 'ours'"),
        (
            lambda model: model.graph.node[1].input.__setitem__(0, "nothing"),
            "takes 'nothing', which nothing before it computes",
        ),
        (lambda model: model.graph.node.reverse(), "which nothing before it computes"),
        (
            lambda model: model.graph.node[0].ClearField("input"),
            "the operator Conv of the network has 0 inputs, expected 2 to 3",
        ),
        (lambda model: model.graph.node[1].output.__setitem__(0, "input"), "which is nothing, or there before"),
        (lambda model: model.graph.node.pop(), "which nothing computes"),
        (lambda model: model.graph.input.add(name="more"), "takes"),
        (lambda model: model.graph.output.pop(), "returns"),
        (lambda model: model.ClearField("graph"), "holds 0 graphs"),
    ],
)
def test_what_no_export_holds_is_refused(graph: bytes, change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_graph(changed(graph, change), NAMES)


def test_two_graphs_are_refused(graph: bytes) -> None:
    with pytest.raises(InputError, match="holds 2 graphs"):
        check_graph(graph + graph, NAMES)


def test_weights_may_be_stored_in_either_way(graph: bytes) -> None:
    def as_floats(model: Any) -> None:
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32:
                tensor.ClearField("raw_data")
                tensor.float_data.extend(values.ravel().tolist())

    check_graph(changed(graph, as_floats), NAMES)


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x3b", b"no network"]
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        check_graph(data, NAMES)


def test_a_damaged_file_is_refused_or_harmless(graph: bytes) -> None:
    """Whatever is changed, the check ends soon, with InputError or without."""
    rng, start = random.Random(0), time.monotonic()
    for _ in range(400):
        data = bytearray(graph)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            check_graph(bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data), NAMES)
        except InputError:
            continue
    assert time.monotonic() - start < 60


def test_many_fields_are_refused_soon() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="more than 1048576 fields"):
        check_graph(b"\x08\x01" * (1 << 23), NAMES)
    assert time.monotonic() - start < 30
