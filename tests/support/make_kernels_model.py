"""Make tests/support/kernels.onnx: operators of the domain `cappy` in a row, without their functions.

    python -m tests.support.make_kernels_model OUT

Tests do not run this. Their expected result (tests/engine/cpu/test_kernels.py) draws the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cappy_engine.native import reference

INNER, BETWEEN = 40, 112
PARTS = ("weights", "scales", "bias")


def make_model() -> onnx.ModelProto:
    """Make the model: x (rows, 40) to 112 values with Gelu, and back to 40 with a layer norm of the sum with x.

    The first product's weights are packed, the second's are not. Rows are rounded in two ways.
    """
    random = np.random.default_rng(7)
    constants: dict[str, np.ndarray] = {}
    for name, rows, columns in (("up", INNER, BETWEEN), ("down", BETWEEN, INNER)):
        weights = random.integers(-127, 128, (rows, columns)).astype(np.int8)
        constants[f"{name}/weights"] = reference.pack(weights) if name == "up" else weights
        constants[f"{name}/scales"] = (random.uniform(0.5, 1, columns) / 127 / rows**0.5).astype(np.float32)
        constants[f"{name}/bias"] = random.standard_normal(columns).astype(np.float32)
    constants["gamma"], constants["beta"] = np.full(INNER, 0.5, np.float32), np.full(INNER, 0.25, np.float32)
    for name, columns in (("x", INNER), ("m", BETWEEN)):
        factors, offsets = random.uniform(-2, 2, (2, columns)).astype(np.float32)
        constants[f"{name}/factors"], constants[f"{name}/offsets"] = factors, offsets
    nodes = [
        helper.make_node(
            "QuantizeRotatedRows",
            ["x", "x/factors", "x/offsets"],
            ["x8", "xs"],
            domain="cappy",
            block=8,
            zero_point=128,
            steps=127,
            least=1e-12,
        ),
        helper.make_node(
            "LinearGelu", ["x8", "xs", *(f"up/{name}" for name in PARTS)], ["m"], domain="cappy", zero_point=128
        ),
        helper.make_node(
            "QuantizeRotatedRows",
            ["m", "m/factors", "m/offsets"],
            ["m8", "ms"],
            domain="cappy",
            block=16,
            zero_point=16,
            steps=239,
            least=2.5,
        ),
        helper.make_node(
            "LinearNorm",
            ["m8", "ms", *(f"down/{name}" for name in PARTS), "x", "gamma", "beta"],
            ["y"],
            domain="cappy",
            zero_point=16,
            epsilon=1e-5,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "kernels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INNER])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", INNER])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("cappy", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(make_model().SerializeToString())
