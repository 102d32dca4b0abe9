"""Find the files that hold the weights of an ONNX model.

Does not need the package `onnx`, and does not read the weights. Walks the protobuf encoding of a ModelProto wherever a
TensorProto may be: initializers, nodes' attributes, graphs in attributes, functions, sparse tensors. Knows nothing of
bundles.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import BinaryIO

Buffer = mmap.mmap | bytes

_KEY = b"location"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WHERE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""The fields of each message that lead to external data, by their numbers in onnx.proto."""
_DEEPEST = 100
"""As deep as protobuf itself reads messages in messages."""


def external_locations(file: BinaryIO) -> set[bytes]:
    """Find the locations of external data that the model in an open file names.

    They are returned as they are written in the model.

    >>> external_locations(open("cappy-bundle/onnx/model.onnx", "rb"))
    {b'model.onnx_data'}

    Raises ValueError if it is not the encoding of a model.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(_KEY) < 0:  # walking cappy-mini, which holds its weights itself, takes 0.1 s
            return set()
        return set(_locations(content, 0, len(content), "model", _DEEPEST))


def _locations(content: Buffer, start: int, end: int, kind: str, depth: int) -> Iterator[bytes]:
    if not depth:
        raise ValueError(f"messages lie in more than {_DEEPEST} others")
    texts: dict[int, set[bytes]] = {1: set(), 2: set()}
    for number, begin, stop in _fields(content, start, end):
        if kind == "entry" and number in texts:
            texts[number].add(content[begin:stop])
        elif number in _WHERE.get(kind, {}):
            yield from _locations(content, begin, stop, _WHERE[kind][number], depth - 1)
    if _KEY in texts[1]:  # of a field that comes twice, readers differ in which they take
        yield from texts[2]


def _fields(content: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """List the fields of bytes in a message: number, start and end."""
    while at < end:
        tag, at = _varint(content, at, end)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(content, at, end)
            if size > end - at:
                raise ValueError(f"a field at byte {at} is longer than what it lies in")
            yield tag >> 3, at, at + size
            at += size
        elif wire == _VARINT:
            _, at = _varint(content, at, end)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field at byte {at} has the unknown type {wire}")
    if at != end:
        raise ValueError(f"a field ends behind byte {end}, where its message does")


def _varint(content: Buffer, at: int, end: int) -> tuple[int, int]:
    """Read a number of 7 bits in each byte; returns it, and where it ends."""
    value = 0
    for place in range(10):
        if at >= end:
            break
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number at byte {at} does not end")
