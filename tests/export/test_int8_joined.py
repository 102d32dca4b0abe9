"""What stands before and behind an int8 product is a part of it: layer norms, gates and residuals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cappy_export.graphs.operators import DOMAIN, with_functions
from cappy_export.precisions.int8 import quantize_products
from cappy_export.precisions.int8_graph import Int8Options
from tests.export.test_int8_graph import body_end, product_model, run

RANDOM = np.random.default_rng(5)
X = RANDOM.standard_normal((40, 32)).astype(np.float32)
STORED: dict[str, np.ndarray] = {
    "gamma": RANDOM.uniform(0.5, 2, 32).astype(np.float32),
    "beta": RANDOM.standard_normal(32).astype(np.float32),
    "up": RANDOM.standard_normal((32, 64)).astype(np.float32) / 8,
    "up_bias": RANDOM.standard_normal(64).astype(np.float32),
    "down": RANDOM.standard_normal((32, 32)).astype(np.float32) / 8,
    "down_bias": RANDOM.standard_normal(32).astype(np.float32),
    **{f"{name}_ones": np.ones(32, np.float32) for name in ("y", "normed", "gated", "narrow")},
}
LAYER = (
    helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], "layer/norm", epsilon=0.25),
    helper.make_node("Gemm", ["normed", "up", "up_bias"], ["wide"], "layer/up"),
    helper.make_node("GeGlu", ["wide"], ["gated"], "layer/gate", domain=DOMAIN),
    helper.make_node("Gemm", ["gated", "down", "down_bias"], ["narrow"], "layer/down"),
    helper.make_node("Add", ["x", "narrow"], ["y"], "layer/residual"),
)


def quantized(
    folder: Path, nodes: Sequence[onnx.NodeProto], read: Sequence[str] = ("y",), outputs: Sequence[str] = ()
) -> Path:
    """The int8 model of these nodes; the tensors `read` have a reader more."""
    folder.mkdir()
    ends = [*(f"{name}_normed" for name in read), *outputs]
    source = product_model(folder / "m.onnx", [*nodes, *body_end(*read)], ends, STORED)
    onnx.save(with_functions(onnx.load(str(source))), str(source))
    calibration: list[Any] = [{"x": X}]
    quantize_products(source, folder / "q.onnx", Int8Options(), calibration)
    return folder / "q.onnx"


def kinds_of(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def test_a_layer_that_normalises_what_it_reads_is_four_operators(tmp_path: Path) -> None:
    """They give what the same operators give apart, as they stand where the tensors between them are read, too."""
    joined = quantized(tmp_path / "joined", LAYER)
    assert kinds_of(joined) == Counter(
        ["QuantizeNormedRows", "Linear", "QuantizeGatedRows", "LinearAdd", "LayerNormalization"]
    )
    apart = quantized(tmp_path / "apart", LAYER, ("y", "normed", "gated", "narrow"))
    assert kinds_of(apart)["LinearAdd"] == 0
    assert kinds_of(apart)["QuantizeRotatedRows"] == 2
    [found], [wanted] = run(joined, X, ["y"]), run(apart, X, ["y"])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    [exact] = run(tmp_path / "apart" / "m.onnx", X, ["y"])
    assert 0 < np.abs(found - exact).max() < 0.05 * exact.std()


def test_a_layer_norm_that_a_residual_reads_as_well_stays(tmp_path: Path) -> None:
    residual = helper.make_node("Add", ["normed", "narrow"], ["y"], "layer/residual")
    kinds = kinds_of(quantized(tmp_path / "q", [*LAYER[:-1], residual]))
    assert (kinds["LayerNormalization"], kinds["QuantizeNormedRows"], kinds["QuantizeRotatedRows"]) == (2, 0, 1)
    assert kinds["LinearAdd"] == 1


def test_a_layer_norm_that_is_an_output_stays(tmp_path: Path) -> None:
    found = quantized(tmp_path / "q", LAYER, outputs=["normed"])
    kinds = kinds_of(found)
    assert (kinds["QuantizeNormedRows"], kinds["QuantizeRotatedRows"], kinds["QuantizeGatedRows"]) == (0, 1, 1)
    [wanted], [normed] = (run(path, X, ["normed"]) for path in (tmp_path / "q" / "m.onnx", found))
    np.testing.assert_array_equal(normed, wanted)


@pytest.mark.parametrize("inputs", [["narrow", "beta"], ["narrow", "narrow"]], ids=["a weight", "itself"])
def test_what_is_added_and_is_no_residual_stays(tmp_path: Path, inputs: list[str]) -> None:
    added = helper.make_node("Add", inputs, ["y"], "layer/residual")
    kinds = kinds_of(quantized(tmp_path / "q", [*LAYER[:-1], added]))
    assert (kinds["LinearAdd"], kinds["Add"]) == (0, 1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes"),
    [
        pytest.param(["x", "gamma", "beta"], ["normed"], {"axis": 0}, id="of all rows together"),
        pytest.param(["x", "gamma"], ["normed"], {}, id="without a shift"),
        pytest.param(["x", "gamma", "beta"], ["normed", "mean"], {}, id="whose mean is read"),
    ],
)
def test_a_layer_norm_of_another_kind_stays(
    tmp_path: Path, inputs: list[str], outputs: list[str], attributes: dict[str, Any]
) -> None:
    norm = helper.make_node("LayerNormalization", inputs, outputs, "layer/norm", **attributes)
    added = "mean" if "mean" in outputs else "x"
    residual = helper.make_node("Add", ["narrow", added], ["y"], "layer/residual")
    found = quantized(tmp_path / "q", [norm, *LAYER[1:-1], residual])
    assert kinds_of(found)["QuantizeNormedRows"] == 0
    [near], [exact] = (run(path, X, ["y"]) for path in (found, tmp_path / "q" / "m.onnx"))
    assert np.abs(near - exact).max() < 0.05 * exact.std()
