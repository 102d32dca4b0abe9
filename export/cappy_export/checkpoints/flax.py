"""Read Flax's msgpack checkpoints without Flax or JAX.

The format (flax/serialization.py) is a msgpack map of nested maps. ExtType 1 is an array as msgpack of (shape, dtype
name, C-order bytes), ExtType 3 a numpy scalar in the same form. An array over 2**30 bytes is split into chunks. Names
are those of transformers' Flax models, and become PyTorch's (transformers, modeling_flax_pytorch_utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from cappy_engine.errors import CheckpointError

Array = npt.NDArray[Any]

ARRAY, SCALAR = 1, 3
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def read_flax(path: Path) -> dict[str, Array]:
    """Read the float32 arrays of a `flax_model.msgpack`, under PyTorch's names and in PyTorch's layout.

    >>> read_flax(Path("cappy-large/flax_model.msgpack"))["classifier.out_proj.weight"].shape
    (1, 1024)

    Raises CheckpointError if the file is not such a checkpoint.
    """
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_decode, raw=False, strict_map_key=False)
        tree = tree["params"] if isinstance(tree, dict) and set(tree) == {"params"} else tree
        if not isinstance(tree, dict):
            raise CheckpointError(f"it holds a {type(tree).__name__}, not a map")
        weights: dict[str, Array] = {}
        for names, leaf in _leaves(tree, ()):
            name = ".".join(_torch_path(names))
            if name in weights:
                raise CheckpointError(f"it has {name} twice")
            weights[name] = _torch_layout(names, leaf)
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException, CheckpointError) as error:
        raise CheckpointError(f"{path} is not a Flax checkpoint: {error}") from error
    return weights


def _decode(code: int, content: bytes) -> Any:
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"unknown extension type {code}")
    shape, dtype, buffer = msgpack.unpackb(content, raw=False, use_list=False)
    return _from_buffer(dtype, buffer).reshape(shape)


def _from_buffer(dtype: str, buffer: bytes) -> Array:
    if dtype == "bfloat16":  # numpy has none: it is the upper half of a float32
        return (np.frombuffer(buffer, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(buffer, dtype=np.dtype(dtype).newbyteorder("<"))


def _leaves(node: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Array]]:
    if isinstance(node, Mapping) and "__msgpack_chunked_array__" in node:
        chunks = [node["chunks"][str(number)] for number in range(len(node["chunks"]))]
        shape = [node["shape"][str(number)] for number in range(len(node["shape"]))]
        yield names, np.concatenate(chunks).reshape(shape)
    elif isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(child, (*names, str(name)))
    elif isinstance(node, np.ndarray):
        yield names, node
    else:
        raise CheckpointError(f"{'.'.join(names)} is a {type(node).__name__}, not an array")


def _torch_path(names: tuple[str, ...]) -> tuple[str, ...]:
    return (*names[:-1], LEAF_NAMES.get(names[-1], names[-1]))


def _torch_layout(names: tuple[str, ...], leaf: Array) -> Array:
    array = leaf.T if names[-1] == "kernel" else leaf
    return np.array(array, dtype=np.float32, order="C")  # a copy: the buffer is read-only
