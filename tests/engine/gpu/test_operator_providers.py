"""Who runs the model: a GPU that does not is found out, with the operators that say so."""

from __future__ import annotations

from collections import Counter

import pytest

from cappy_engine.errors import DeviceUnavailable
from cappy_engine.gpu.operator_providers import (
    SHAPE_OPERATORS,
    SPEED_FLOOR,
    check_operator_providers,
    warn_if_slow,
)

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
OWN = {"cuda": CUDA, "tensorrt": TENSORRT}
LAYERS = Counter({"MatMul": 48, "LayerNormalization": 8, "Softmax": 4, "Gather": 3})


# Placement


@pytest.mark.parametrize(("device", "elsewhere"), [("cuda", CPU), ("tensorrt", CPU), ("tensorrt", CUDA)])
def test_arithmetic_on_shapes_may_stay_elsewhere(device: str, elsewhere: str) -> None:
    check_operator_providers(device, {OWN[device]: LAYERS, elsewhere: Counter(SHAPE_OPERATORS)})


@pytest.mark.parametrize("device", OWN)
@pytest.mark.parametrize("operator", ["MatMul", "QAttention", "LayerNormalization", "Softmax", "Gelu", "GatherND"])
def test_no_other_operator_may_run_on_the_cpu(device: str, operator: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"CPUExecutionProvider runs 1 {operator}: {OWN[device]}"):
        check_operator_providers(device, {OWN[device]: LAYERS, CPU: Counter({operator: 1, "Shape": 2})})


def test_everything_that_runs_elsewhere_is_in_one_error() -> None:
    with pytest.raises(DeviceUnavailable, match="CUDAExecutionProvider runs 2 Gelu and CPUExecutionProvider runs 9 Q"):
        check_operator_providers(
            "tensorrt", {TENSORRT: LAYERS, CUDA: Counter({"Gelu": 2}), CPU: Counter({"QAttention": 9})}
        )


@pytest.mark.parametrize("device", OWN)
def test_a_device_without_matrix_products_does_not_run_the_model(device: str) -> None:
    idle = {OWN[device]: Counter({"Gather": 3, "Softmax": 4})}
    with pytest.raises(DeviceUnavailable, match=f"{OWN[device]} has none of the model's matrix products"):
        check_operator_providers(device, idle)


@pytest.mark.parametrize("device", OWN)
def test_a_session_that_tells_nothing_is_no_proof(device: str) -> None:
    with pytest.raises(DeviceUnavailable, match="no node at all"):
        check_operator_providers(device, {})


# Speed


@pytest.mark.parametrize(
    ("flops", "seconds"),
    [
        pytest.param(SPEED_FLOOR, 1.0, id="at the floor"),
        pytest.param(SPEED_FLOOR, 0.01, id="above it"),
        pytest.param(1e9, 0.01, id="mostly launches, which tell nothing"),
    ],
)
def test_nobody_is_warned_of_a_gpu_that_may_be_fast(
    flops: float, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_slow("cuda", gpu=0, flops=flops, seconds=seconds)
    assert not caplog.records
