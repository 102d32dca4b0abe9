"""One operator of the domain `cappy` in a session, with kernels and without, and attention in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from cappy_engine.cpu.kernels import find_kernels
from cappy_export.graphs.operators import DOMAIN, with_functions

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]


def kernel_options() -> onnxruntime.SessionOptions:
    """Options of a session that runs the kernels, and prints nothing."""
    if (library := find_kernels().library) is None:
        pytest.skip(f"no kernels here: {find_kernels().why_not}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return options


def computed(
    name: str,
    inputs: dict[str, Array],
    heads: int,
    options: onnxruntime.SessionOptions | None = None,
) -> Floats:
    """The operator's result, by its function in plain ONNX Runtime unless `options` bring kernels."""
    node = helper.make_node(name, list(inputs), ["y"], domain=DOMAIN, heads=heads)
    return run_node(node, inputs, {}, options or onnxruntime.SessionOptions())[0]


def run_node(
    node: onnx.NodeProto,
    inputs: Mapping[str, Array],
    constants: Mapping[str, Floats | onnx.TensorProto],
    options: onnxruntime.SessionOptions,
) -> list[Floats]:
    values = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for key, value in inputs.items()
    ]
    kinds = {"q": TensorProto.UINT8}
    outputs = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in node.output]
    stored = [
        value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph([node], "g", values, outputs, stored)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = with_functions(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Floats] = session.run(None, inputs)
    return found


def attended(rows: Floats, heads: int) -> Floats:
    """Attention within one pair, (length, 3 hidden) to (length, hidden), in numpy."""
    query, key, value = (part.reshape(len(rows), heads, -1).swapaxes(0, 1) for part in np.split(rows, 3, axis=1))
    scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    found: Floats = (shares @ value).swapaxes(0, 1).reshape(len(rows), -1)
    return found
