"""Read tensors of texts: lists in JSON, or bytes behind it (each text after its length). Knows nothing of requests."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cappy_engine.errors import InvalidRequest


def split_body(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    """Split a body into its JSON and the bytes behind it. Raises InvalidRequest.

    >>> split_body(b"{}abc", "2")
    (b'{}', b'abc')
    """
    if json_length is None:
        return body, b""
    if not (json_length.isascii() and json_length.isdecimal() and len(json_length) < 20):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {json_length[:40]!r}; it must be a count of bytes", 400
        )
    length = int(json_length)
    if length > len(body):
        raise InvalidRequest(f"Inference-Header-Content-Length is {length}, and the body has {len(body)} bytes", 400)
    return body[:length], body[length:]


def flattened(where: str, data: Sequence[str | list[str]]) -> list[str]:
    """List the texts of a tensor of shape [n], or [n, 1]. Raises InvalidRequest.

    >>> flattened("$.inputs[0]", [["Yes"], ["No"]])
    ['Yes', 'No']
    """
    texts: list[str] = []
    for place, each in enumerate(data):
        if isinstance(each, list) and len(each) != 1:
            raise InvalidRequest(f"{where}.data[{place}]: has {len(each)} texts; send texts, or lists of one text")
        texts.append(each if isinstance(each, str) else each[0])
    return texts


def texts_of(where: str, data: bytes) -> list[str]:
    r"""Read a tensor of BYTES: before each text there is its length in bytes, a little-endian uint32.

    Raises InvalidRequest.

        >>> texts_of("$.inputs[0]", b"\x03\0\0\0Yes\x02\0\0\0No")
        ['Yes', 'No']
    """
    texts: list[str] = []
    at = 0
    while at < len(data):
        end = at + _LENGTH.size
        if end <= len(data):
            end += _LENGTH.unpack_from(data, at)[0]
        if end > len(data) or end < at + _LENGTH.size:
            raise InvalidRequest(f"{where}: text {len(texts)} ends behind the tensor's {len(data)} bytes")
        try:
            texts.append(data[at + _LENGTH.size : end].decode())
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{where}: text {len(texts)} is not UTF-8 ({error})") from error
        at = end
    return texts


_LENGTH = struct.Struct("<I")
