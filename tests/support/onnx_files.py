"""Write small ONNX models without the onnx package: its files are protocol buffers, and few fields are needed.

Field numbers are those of onnx.proto3 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FLOAT, INT64 = 1, 7
OPSET, IR_VERSION = 17, 8
Dimension = int | str


def write_sum_model(path: Path, *, inputs: Sequence[str], output: str) -> Path:
    """Write a model that sums its (batch, length) int64 `inputs` to `output`, (batch, 1) float32."""
    nodes = [_node("Cast", [name], f"{name}_float", field(5, _attribute("to", FLOAT))) for name in inputs]
    nodes.append(_node("Sum", [f"{name}_float" for name in inputs], "total"))
    nodes.append(_node("ReduceSum", ["total", "last_axis"], output, field(5, _attribute("keepdims", 1))))
    return _write(
        path,
        nodes,
        [_value(name, INT64, ["batch", "length"]) for name in inputs],
        [_value(output, FLOAT, ["batch", 1])],
        [field(1, 1) + field(2, INT64) + field(7, -1) + field(8, "last_axis")],
    )


def write_product_model(path: Path) -> Path:
    """Write a model of a MatMul, a Softmax and a Shape."""
    nodes = [
        _node("MatMul", ["left", "right"], "product"),
        _node("Softmax", ["product"], "result"),
        _node("Shape", ["left"], "shape"),
    ]
    inputs = [_value(name, FLOAT, ["n", "n"]) for name in ("left", "right")]
    return _write(path, nodes, inputs, [_value("result", FLOAT, ["n", "n"]), _value("shape", INT64, [2])], [])


def write_external_model(path: Path, location: str) -> Path:
    """Write a model that adds up its `input_ids` and a number, which lies in the file `location`, as `logits`."""
    nodes = [
        _node("Cast", ["input_ids"], "floats", field(5, _attribute("to", FLOAT))),
        _node("ReduceSum", ["floats", "last_axis"], "total", field(5, _attribute("keepdims", 1))),
        _node("Add", ["total", "number"], "logits"),
    ]
    axis = field(1, 1) + field(2, INT64) + field(7, -1) + field(8, "last_axis")
    number = field(1, 1) + field(2, FLOAT) + field(8, "number") + external(location)
    ids, logits = _value("input_ids", INT64, ["batch", "length"]), _value("logits", FLOAT, ["batch", 1])
    return _write(path, nodes, [ids], [logits], [axis, number])


def write_attention_model(
    path: Path, *, heads: int, hidden: int, is_first: bool = False, window: int | None = None
) -> Path:
    """Write a model of Attention of the domain `cappy`, FirstAttention or, with a window, LocalRotaryAttention."""
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {"queries": (FLOAT, ["pairs", hidden])} if is_first else {}
    inputs |= {"packed": (FLOAT, ["tokens", (2 if is_first else 3) * hidden]), "lengths": (INT64, ["pairs"])}
    domain = field(7, "cappy") + field(5, _attribute("heads", heads))
    operator = "FirstAttention" if is_first else "Attention"
    if window is not None:
        operator = "LocalRotaryAttention"
        domain += field(5, _attribute("window", window))
        inputs |= {name: (FLOAT, ["places", hidden // heads // 2]) for name in ("cosines", "sines")}
    node = _node(operator, list(inputs), "result", domain)
    values = [_value(name, kind, shape) for name, (kind, shape) in inputs.items()]
    _write(path, [node], values, [_value("result", FLOAT, ["rows", hidden])], [])
    path.write_bytes(path.read_bytes() + field(8, field(1, "cappy") + field(2, 1)))
    return path


def external(location: str) -> bytes:
    """Encode the fields of a tensor whose 4 bytes lie in another file."""
    entries = {"location": location, "offset": "0", "length": "4"}
    return b"".join(field(13, field(1, key) + field(2, value)) for key, value in entries.items()) + field(14, 1)


def _write(
    path: Path, nodes: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes], constants: Sequence[bytes]
) -> Path:
    graph = b"".join(
        [
            *(field(1, node) for node in nodes),
            field(2, "graph"),
            *(field(5, constant) for constant in constants),
            *(field(11, value) for value in inputs),
            *(field(12, value) for value in outputs),
        ]
    )
    path.write_bytes(field(1, IR_VERSION) + field(7, graph) + field(8, field(2, OPSET)))
    return path


def _node(operator: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    names = b"".join(field(1, name) for name in inputs)
    return names + field(2, output) + field(4, operator) + attributes


def _attribute(name: str, value: int) -> bytes:
    return field(1, name) + field(3, value) + field(20, 2)  # AttributeProto.INT


def _value(name: str, kind: int, shape: Sequence[Dimension]) -> bytes:
    dimensions = b"".join(field(1, field(2 if isinstance(size, str) else 1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dimensions)))


def field(number: int, value: int | str | bytes) -> bytes:
    """Encode a field: an int as a varint, the others with their length before them."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (2**64 - 1))
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
