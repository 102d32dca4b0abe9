"""How near int8 products are to float32's, on tokens that were not calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cappy_engine.errors import GraphError
from cappy_export.precisions.int8 import quantize_products
from cappy_export.precisions.int8_graph import Int8Options
from cappy_export.precisions.rounding import quantize_weights
from tests.export.test_int8_graph import body_end, product_model, run

NEAREST = Int8Options(rounds=lambda weights, _: quantize_weights(weights))
"""Rotated, but each weight is rounded alone."""


def correlated_tokens(seed: int, tokens: int) -> np.ndarray:
    """(tokens, 64): a few directions carry most of the variance, the mean is not 0, one channel is far above others."""
    mixing = np.random.default_rng(0).standard_normal((4, 64))
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, 4)) @ mixing + 0.2 * random.standard_normal((tokens, 64)) + 0.5
    x[:, 5] *= 20
    made: np.ndarray = x.astype(np.float32)
    return made


def two_products(path: Path) -> Path:
    """x (batch, length, 64) -> y, by a product with a bias, and z, by one without."""
    random = np.random.default_rng(1)
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "v", "b"], ["y"], "layer.0/dense"),
        helper.make_node("MatMul", ["flat", "w"], ["z"], "layer.1/dense"),
        *body_end("y", "z"),
    ]
    weights = {name: random.standard_normal((64, 32)).astype(np.float32) / 8 for name in ("v", "w")}
    ones = {f"{name}_ones": np.ones(32, np.float32) for name in ("y", "z")}
    stored: dict[str, np.ndarray] = {**weights, **ones, "b": np.ones(32, np.float32), "shape": np.array([-1, 64])}
    return product_model(path, nodes, ["y_normed", "z_normed"], stored)


def unrotated_products(source: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and z as they are without rotation, and with each weight rounded alone, in numpy."""
    stored = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(str(source)).graph.initializer}
    rows = x.reshape(-1, x.shape[-1])
    scale = np.abs(rows).max(axis=-1, keepdims=True) / 127
    parts = []
    for name in ("v", "w"):
        steps, scales = quantize_weights(stored[name])
        parts.append(np.rint(rows / scale) @ steps.astype(np.float64) * scales * scale)
    return parts[0] + stored["b"], parts[1]


def differences(found: Sequence[np.ndarray], source: Path, x: np.ndarray) -> list[np.ndarray]:
    """How far y and z are from float32's."""
    return [part - exact for part, exact in zip(found, run(source, x, ["y", "z"]), strict=True)]


def sizes(errors: Sequence[np.ndarray]) -> list[float]:
    """The root mean square of each."""
    return [float(np.sqrt(np.mean(np.square(error)))) for error in errors]


def errors(source: Path, options: Int8Options, seen: np.ndarray, fresh: np.ndarray) -> list[np.ndarray]:
    """How far y and z are from float32's on `fresh`, calibrated on `seen`; both (1, tokens, 64)."""
    out = source.with_name("q.onnx")
    calibration: list[Any] = [{"x": part} for part in np.split(seen, 4, axis=1)]
    assert quantize_products(source, out, options, calibration)[1] == {"Gemm": 1, "MatMul": 1}
    return differences(run(out, fresh, ["y", "z"]), source, fresh)


def test_rotation_and_compensation_each_make_products_closer(tmp_path: Path) -> None:
    source = two_products(tmp_path / "m.onnx")
    seen, fresh = correlated_tokens(2, 400)[None], correlated_tokens(3, 200)[None]
    plain = sizes(differences(unrotated_products(source, fresh), source, fresh))
    rotated, chosen = (sizes(errors(source, each, seen, fresh)) for each in (NEAREST, Int8Options()))
    assert all(later < 0.75 * before for before, later in zip(plain, rotated, strict=True))
    assert all(later < 0.75 * before for before, later in zip(rotated, chosen, strict=True))


def test_products_that_read_the_same_share_its_rotation(tmp_path: Path) -> None:
    source = two_products(tmp_path / "m.onnx")
    errors(source, Int8Options(), correlated_tokens(2, 400)[None], correlated_tokens(3, 8)[None])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "q.onnx")).graph.node]
    assert (kinds.count("QuantizeRotatedRows"), kinds.count("MatMul"), kinds.count("Gemm")) == (1, 0, 0)


@pytest.mark.parametrize("loudness", [0.0, 1e-3, 1e-2])
def test_a_channel_that_calibration_hardly_saw_may_be_alive_later(tmp_path: Path, loudness: float) -> None:
    source = two_products(tmp_path / "m.onnx")
    seen, fresh = correlated_tokens(2, 400)[None], correlated_tokens(3, 200)[None]
    seen[..., 7:11] *= loudness
    plain = sizes(differences(unrotated_products(source, fresh), source, fresh))
    chosen = sizes(errors(source, Int8Options(), seen, fresh))
    assert all(later < before for before, later in zip(plain, chosen, strict=True))


@pytest.mark.parametrize("options", [NEAREST, Int8Options()], ids=["nearest", "compensated"])
def test_products_are_right_in_the_mean(tmp_path: Path, options: Int8Options) -> None:
    """The mean is taken out of what is rounded, and its product is added: to the bias, where there is one."""
    source = two_products(tmp_path / "m.onnx")
    seen = correlated_tokens(2, 4000)[None]
    plain = differences(unrotated_products(source, seen), source, seen)
    rotated, unrotated = (
        [float(np.linalg.norm(error.mean(axis=0))) for error in each]
        for each in (errors(source, options, seen, seen), plain)
    )
    assert max(rotated) < min(unrotated) / 5


def test_calibration_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    calibration: list[Any] = [{"x": np.full((1, 4, 64), np.inf, np.float32)}]
    with pytest.raises(GraphError, match="flat is not finite on the pairs to calibrate on"):
        quantize_products(two_products(tmp_path / "m.onnx"), tmp_path / "q.onnx", Int8Options(), calibration)
