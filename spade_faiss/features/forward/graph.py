"""Checks an exported network (ONNX) before an engine opens it: the bank that carries it may come from anybody.

What is allowed is what our exports consist of: operators of the ONNX standard, one graph, all weights inside. The file's own
records say what runs: a graph in a graph, a function, an operator of another domain, or a tensor in another file is refused,
and so is every field that is not listed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import shorten
from spade_faiss.features.forward.protocol import EMBEDDING, INPUT

# Operators without control flow and random numbers, by how many inputs they take.
_ARITIES = {
    (0, 0): "Constant",
    (1, 1): "Abs AveragePool Cast Ceil ConstantOfShape Cos Elu Erf Exp Flatten Floor Gelu GlobalAveragePool GlobalMaxPool "
    "HardSigmoid HardSwish Identity LeakyRelu Log MaxPool Mish Neg Not Reciprocal Relu Selu Shape Sigmoid Sign Sin Softmax "
    "Softplus Sqrt Tanh Transpose",
    (1, 2): "ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Split Squeeze Trilu",
    (1, 3): "Clip",
    (1, 4): "Resize",
    (1, 64): "Concat Einsum Max Min Sum",
    (
        2,
        2,
    ): "Add And Div Equal Expand Gather Greater GreaterOrEqual Less LessOrEqual MatMul Mod Mul Or PRelu Pow Reshape Sub Tile "
    "Unsqueeze",
    (2, 3): "Conv Gemm LayerNormalization",
    (2, 4): "Pad",
    (3, 3): "GroupNormalization InstanceNormalization Range Where",
    (3, 5): "Slice",
    (5, 5): "BatchNormalization",
}
_OPERATORS = {operator: arity for arity, operators in _ARITIES.items() for operator in operators.split()}
_MOST_NODES = 1 << 14
_MOST_FIELDS = 1 << 20
# The longest side of a kernel, a stride or a margin.
_MOST_NUMBER = 1 << 12
_DOMAINS = (b"", b"ai.onnx")

# Bytes of an element by ONNX's number of its type: float32, uint8, int8, int32, int64, bool, float16, float64.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}

# The kinds of a field's value on the wire.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    number: int
    kind: int
    value: int
    data: memoryview


# The fields of each message that may occur, by their numbers in onnx.proto.
_MODEL = {1: "ir_version", 2: "producer_name", 3: "producer_version", 4: "domain", 5: "model_version", 6: "doc_string"}
_MODEL |= {7: "graph", 8: "opset_import", 14: "metadata_props"}
_GRAPH = {1: "node", 2: "name", 5: "initializer", 10: "doc_string", 11: "input", 12: "output", 13: "value_info"}
_GRAPH |= {16: "metadata_props"}
_NODE = {1: "input", 2: "output", 3: "name", 4: "op_type", 5: "attribute", 6: "doc_string", 7: "domain", 9: "metadata_props"}
_ATTRIBUTE = {1: "name", 2: "f", 3: "i", 4: "s", 5: "t", 7: "floats", 8: "ints", 13: "doc_string", 20: "type"}
_TENSOR = {1: "dims", 2: "data_type", 4: "float_data", 5: "int32_data", 7: "int64_data", 8: "name", 9: "raw_data"}
_TENSOR |= {12: "doc_string"}


def check_graph(data: bytes, levels: Sequence[str]) -> None:
    """Check that a file is an exported network, and nothing that does anything but compute features.

    Args:
        data: the file.
        levels: the names of the levels that it must return, finest first, after the embedding.

    Raises:
        InputError: if it is anything else; the message says what.
    """
    _Checker().check(memoryview(data), list(levels))


class _Checker:
    """Walks through a file, field by field, and raises InputError at the first thing that is not allowed."""

    def __init__(self) -> None:
        self._fields_left = _MOST_FIELDS

    def check(self, data: memoryview, levels: list[str]) -> None:
        graphs = []
        for name, field in self._read(data, _MODEL, "the network"):
            if name == "graph":
                graphs.append(field.data)
            elif name == "opset_import":
                _check_domain(dict(self._strings(field.data)).get(1, b""))
        if len(graphs) != 1:
            raise InputError(f"the network holds {len(graphs)} graphs, expected one")
        named: dict[str, list[str]] = {"input": [], "output": [], "initializer": []}
        nodes = []
        for name, field in self._read(graphs[0], _GRAPH, "the graph"):
            if name in ("input", "output"):
                named[name].append(dict(self._strings(field.data)).get(1, b"").decode(errors="replace"))
            elif name == "node":
                nodes.append(field.data)
            elif name == "initializer":
                named[name].append(self._check_tensor(field.data))
        if len(nodes) > _MOST_NODES:
            raise InputError(f"the network has {len(nodes)} operators, at most {_MOST_NODES}")
        computed = {*named["input"], *named["initializer"]}
        for node in nodes:
            self._check_node(node, computed)
        if missing := [name for name in named["output"] if name not in computed]:
            raise InputError(f"the network returns {shorten(missing[0])}, which nothing computes")
        if named["input"] != [INPUT] or named["output"] != [EMBEDDING, *levels]:
            raise InputError(
                f"the network takes {shorten(named['input'])} and returns {shorten(named['output'])}, expected {[INPUT]} and "
                f"{[EMBEDDING, *levels]}"
            )

    def _check_node(self, data: memoryview, computed: set[str]) -> None:
        """Check an operator; `computed` are the names of what is there before it, to which its outputs are added."""
        operator, domain = "", b""
        inputs: list[str] = []
        outputs: list[str] = []
        for name, field in self._read(data, _NODE, "an operator"):
            if name == "op_type":
                operator = bytes(field.data).decode(errors="replace")
            elif name == "domain":
                domain = bytes(field.data)
            elif name == "attribute":
                self._check_attribute(field.data)
            elif name in ("input", "output"):
                (inputs if name == "input" else outputs).append(bytes(field.data).decode(errors="replace"))
        _check_domain(domain)
        if operator not in _OPERATORS:
            raise InputError(f"the network holds the operator {shorten(operator)}, which no exported network has")
        least, most = _OPERATORS[operator]
        if not least <= len(inputs) <= most or "" in inputs[:least]:
            raise InputError(f"the operator {operator} of the network has {len(inputs)} inputs, expected {least} to {most}")
        # Some engines look for what does not exist without end.
        if missing := [name for name in inputs if name and name not in computed]:
            raise InputError(
                f"the operator {operator} of the network takes {shorten(missing[0])}, which nothing before it computes"
            )
        if not outputs or any(name in computed for name in outputs) or len(set(outputs)) < len(outputs):
            raise InputError(
                f"the operator {operator} of the network computes {shorten(outputs)}, which is nothing, or there before"
            )
        computed |= set(outputs)

    def _check_attribute(self, data: memoryview) -> None:
        for name, field in self._read(data, _ATTRIBUTE, "an attribute"):
            if name == "t":
                self._check_tensor(field.data)
            elif name == "ints":
                packed = self._varints(field.data) if field.kind == _BYTES else [field.value]
                if wrong := [value for value in packed if abs(value) > _MOST_NUMBER]:
                    raise InputError(f"an operator of the network has the setting {wrong[0]}, at most {_MOST_NUMBER}")

    def _check_tensor(self, data: memoryview) -> str:
        """Check that a tensor holds as many bytes as its dimensions say; return its name."""
        called = ""
        dims: list[int] = []
        kind, raw, values = 0, None, 0
        for name, field in self._read(data, _TENSOR, "a tensor"):
            if name == "dims":
                dims += self._varints(field.data) if field.kind == _BYTES else [field.value]
            elif name == "data_type":
                kind = field.value
            elif name == "name":
                called = bytes(field.data).decode(errors="replace")
            elif name == "raw_data":
                raw = len(field.data)
            elif name == "float_data":
                values += len(field.data) // 4 if field.kind == _BYTES else 1
            elif name in ("int32_data", "int64_data"):
                values += len(self._varints(field.data)) if field.kind == _BYTES else 1
        if kind not in _ITEM_BYTES or any(size < 0 for size in dims):
            raise InputError(f"a tensor of the network has the type {kind} and the dimensions {shorten(dims)}")
        count = math.prod(dims)
        if (raw if raw is not None else values) != (count * _ITEM_BYTES[kind] if raw is not None else count):
            raise InputError(f"a tensor of the network has the dimensions {shorten(dims)}, but another number of values")
        return called

    def _strings(self, data: memoryview) -> Iterator[tuple[int, bytes]]:
        """The fields of a message whose value is a text."""
        for field in self._fields(data):
            if field.kind == _BYTES:
                yield field.number, bytes(field.data)

    def _read(self, data: memoryview, known: dict[int, str], where: str) -> Iterator[tuple[str, _Field]]:
        """The fields of a message by name; one that is not known is refused."""
        for field in self._fields(data):
            if field.number not in known:
                raise InputError(f"{where} holds field {field.number} of ONNX, which no exported network has")
            yield known[field.number], field

    def _fields(self, data: memoryview) -> Iterator[_Field]:
        """The fields of a protobuf message, one after the other."""
        at, nothing = 0, data[:0]
        while at < len(data):
            self._count()
            tag, at = _varint(data, at)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                value, at = _varint(data, at)
                yield _Field(number, kind, value, nothing)
                continue
            if kind == _BYTES:
                size, at = _varint(data, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise InputError(f"it is no ONNX file: a field of kind {kind}")
            if not 0 <= size <= len(data) - at:
                raise InputError("it is no ONNX file: a field is longer than the file")
            yield _Field(number, kind, 0, data[at : at + size])
            at += size

    def _varints(self, data: memoryview) -> list[int]:
        values, at = [], 0
        while at < len(data):
            self._count()
            value, at = _varint(data, at)
            values.append(value)
        return values

    def _count(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise InputError(f"the network has more than {_MOST_FIELDS} fields, which no exported network has")


def _check_domain(domain: bytes) -> None:
    if domain not in _DOMAINS:
        raise InputError(f"the network uses operators of {shorten(domain.decode(errors='replace'))}, not of the ONNX standard")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number, signed as int64, and where the next one begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            value &= (1 << 64) - 1
            return (value - (1 << 64) if value >> 63 else value), at
    raise InputError("it is no ONNX file: a number is cut off")
