"""Read Flax's msgpack checkpoints without Flax or JAX.

The format (flax/serialization.py) is a msgpack map of nested maps. ExtType 1 is an array as msgpack of (shape, dtype
name, C-order bytes), ExtType 3 a numpy scalar in the same form. An array over 2**30 bytes is split into chunks. Names
are those of transformers' Flax models, and become PyTorch's (transformers, modeling_flax_pytorch_utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from cappy_export.checkpoints.naming import shown
from cappy_export.checkpoints.refusals import refusing

Array = npt.NDArray[Any]

ARRAY, SCALAR = 1, 3
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""Types of numbers that weights have, with their bytes. numpy would parse any other name, as Python code in part."""
MAX_DIMENSIONS = 8
CHUNKED = "__msgpack_chunked_array__"
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def read_flax(path: Path) -> dict[str, Array]:
    """Read the arrays of a `flax_model.msgpack` as float32, under PyTorch's names and in PyTorch's layout.

    >>> read_flax(Path("cappy-large/flax_model.msgpack"))["classifier.out_proj.weight"].shape
    (1, 1024)

    Raises CheckpointError if the file is not such a checkpoint.
    """
    with refusing(f"{path} is not a Flax checkpoint"):
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_decode, raw=False, strict_map_key=False)
        tree = tree["params"] if isinstance(tree, dict) and set(tree) == {"params"} else tree
        if not isinstance(tree, dict) or CHUNKED in tree:
            raise ValueError(f"it holds a {type(tree).__name__}, not a map of names")
        weights: dict[str, Array] = {}
        for names, leaf in _leaves(tree, ()):
            name = ".".join(_torch_path(names))
            if name in weights:
                raise ValueError(f"it has {shown(name)} twice")
            weights[name] = _torch_layout(names, leaf)
    return weights


def _decode(code: int, content: bytes) -> Array:
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"unknown extension type {code}")
    shape, dtype, buffer = msgpack.unpackb(content, raw=False, use_list=False)
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"an array is of the type {shown(repr(dtype))}; known are {', '.join(WIDTHS)}")
    if not isinstance(buffer, bytes) or _count(shape) * WIDTHS[dtype] != len(buffer):
        raise ValueError(f"an array of the shape {shown(repr(shape))} in {dtype} has {shown(len(buffer))} bytes")
    return _from_buffer(dtype, buffer).reshape(shape)


def _count(shape: Any) -> int:
    """Count the elements of a shape, which must be a short tuple of whole numbers."""
    is_shape = isinstance(shape, (tuple, list)) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shown(repr(shape))} is not a shape")
    return math.prod(shape)


def _from_buffer(dtype: str, buffer: bytes) -> Array:
    if dtype == "bfloat16":  # numpy has none: it is the upper half of a float32
        return (np.frombuffer(buffer, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(buffer, dtype=np.dtype(dtype).newbyteorder("<"))


def _leaves(node: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Array]]:
    if isinstance(node, Mapping) and CHUNKED in node:
        chunks = [node["chunks"][str(number)] for number in range(len(node["chunks"]))]
        shape = [node["shape"][str(number)] for number in range(len(node["shape"]))]
        if not all(isinstance(chunk, np.ndarray) for chunk in chunks) or _count(shape) != sum(map(len, chunks)):
            raise ValueError(f"the chunks of {shown('.'.join(names))} do not make the shape {shown(repr(shape))}")
        yield names, np.concatenate(chunks).reshape(shape)
    elif isinstance(node, Mapping):
        for name, child in node.items():
            if not isinstance(name, str):
                raise ValueError(f"{shown(repr(name))} is not a name")  # noqa: TRY004 - a bad file, as all others
            yield from _leaves(child, (*names, name))
    elif isinstance(node, np.ndarray):
        yield names, node
    else:
        raise ValueError(f"{shown('.'.join(names))} is a {type(node).__name__}, not an array")


def _torch_path(names: tuple[str, ...]) -> tuple[str, ...]:
    return (*names[:-1], LEAF_NAMES.get(names[-1], names[-1]))


def _torch_layout(names: tuple[str, ...], leaf: Array) -> Array:
    array = leaf.T if names[-1] == "kernel" else leaf
    return np.array(array, dtype=np.float32, order="C")  # a copy: the buffer is read-only
