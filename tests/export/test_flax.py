"""Flax's msgpack, read without Flax: all that its serialisation can hold, against arrays written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.flax import read_flax


def flax_array(array: np.ndarray[Any, Any], dtype: str | None = None) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes())))


def write(path: Path, tree: object) -> Path:
    path.write_bytes(msgpack.packb(tree))
    return path


def test_names_and_layout_become_pytorchs(tmp_path: Path) -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {
        "dense": {"kernel": flax_array(kernel), "bias": flax_array(np.ones(3, dtype=np.float32))},
        "LayerNorm": {"scale": flax_array(np.full(2, 5, dtype=np.float32))},
        "word_embeddings": {"embedding": flax_array(kernel)},
    }
    weights = read_flax(write(tmp_path / "flax_model.msgpack", tree))
    assert set(weights) == {"dense.weight", "dense.bias", "LayerNorm.weight", "word_embeddings.weight"}
    np.testing.assert_array_equal(weights["dense.weight"], kernel.T)
    np.testing.assert_array_equal(weights["word_embeddings.weight"], kernel)
    assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in weights.values())


def test_a_params_wrapper_is_taken_off(tmp_path: Path) -> None:
    tree = {"params": {"dense": {"bias": flax_array(np.ones(3, dtype=np.float32))}}}
    assert set(read_flax(write(tmp_path / "flax_model.msgpack", tree))) == {"dense.bias"}


def test_bfloat16_float16_and_scalars_become_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38], dtype=np.float32)  # exact in bfloat16 but for the last
    upper_halves = (values.view("<u4") >> 16).astype("<u2")
    tree = {
        "bias": flax_array(upper_halves, "bfloat16"),
        "half": flax_array(np.array([0.5], dtype=np.float16)),
        "scalar": msgpack.ExtType(3, msgpack.packb(((), "float32", np.float32(7).tobytes()))),
    }
    weights = read_flax(write(tmp_path / "flax_model.msgpack", tree))
    np.testing.assert_array_equal(weights["bias"][:2], values[:2])
    assert weights["bias"][2] == pytest.approx(3e38, rel=0.01)
    assert weights["half"].dtype == np.float32
    assert weights["scalar"] == 7


def test_a_chunked_array_is_put_together(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    flat = array.reshape(-1)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 3, "1": 4},
        "chunks": {"0": flax_array(flat[:5]), "1": flax_array(flat[5:10]), "2": flax_array(flat[10:])},
    }
    weights = read_flax(write(tmp_path / "flax_model.msgpack", {"word_embeddings": {"embedding": chunked}}))
    np.testing.assert_array_equal(weights["word_embeddings.weight"], array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not msgpack at all",
        msgpack.packb([1, 2]),
        msgpack.packb({"dense": {"kernel": "text"}}),
        msgpack.packb({"params": [1]}),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
        msgpack.packb({"a": {"b": flax_array(np.ones(2))}, "a.b": flax_array(np.ones(2))}),
        msgpack.packb({"dense": {"kernel": msgpack.ExtType(9, b"x")}}),
        msgpack.packb({"dense": {"kernel": msgpack.ExtType(1, b"x")}}),
        msgpack.packb({"dense": {"kernel": msgpack.ExtType(1, msgpack.packb(((5,), "float32", b"1234")))}}),
        msgpack.packb({"dense": {"kernel": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678")))}}),
    ],
)
def test_what_is_no_flax_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack|Flax checkpoint"):
        read_flax(path)
