"""fp16: half the bytes, a head in float32, and every node that overflows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_export.precisions.fp16 import convert_to_half
from tests.support.checkpoints import random_inputs


def test_fp16_holds_half_the_bytes_and_a_head_in_fp32(bundle: Path) -> None:
    sizes = {name: (bundle / f"onnx/{name}.onnx").stat().st_size for name in ("model", "model_fp16")}
    assert sizes["model_fp16"] < 0.6 * sizes["model"]
    half = onnx.load(bundle / "onnx/model_fp16.onnx")
    types = {entry.name: entry.data_type for entry in half.graph.initializer}
    assert all(types[name] == TensorProto.FLOAT for name in types if name.startswith("classifier"))
    assert TensorProto.FLOAT16 in types.values()
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize(
    ("factors", "overflowing"), [((1e7, 1e-7), ["scale_0", "scale_1"]), ((1e-3, 1e5, 0.01), ["scale_1"])], ids=str
)
def test_a_node_that_overflows_fp16_stays_in_fp32(
    fused: Path, tmp_path: Path, factors: tuple[float, ...], overflowing: list[str]
) -> None:
    """Scale by values beyond 65504, or to them, and back: the float32 scores stay, a plain fp16 graph's do not."""
    source, big, half = fused, tmp_path / "big.onnx", tmp_path / "half.onnx"
    model = onnx.load(source)
    node = next(node for node in model.graph.node if node.op_type == "BiasGelu")
    place = list(model.graph.node).index(node) + 1
    names = [*(f"scaled_{step}" for step in range(len(factors))), node.output[0]]
    node.output[0] = names[0]
    for step, factor in enumerate(factors):
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), f"factor_{step}"))
        scale = helper.make_node("Mul", [names[step], f"factor_{step}"], [names[step + 1]], name=f"scale_{step}")
        model.graph.node.insert(place + step, scale)
    onnx.save(model, big)
    inputs = random_inputs(2, 40)
    facts = convert_to_half(big, half, [inputs])
    assert sorted(facts["overflowing_in_fp32"]) == overflowing
    assert facts["largest_value"] > 65504
    expected, found = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], inputs)[0]
        for path in (source, half)
    )
    np.testing.assert_allclose(found, expected, atol=5e-3)
