"""Check that a GPU does the work: which provider runs which nodes, and how fast a full batch was.

A session for a GPU opens without one, or with half of the model on the CPU, and says nothing; so this counts. Pure: it
reads what ONNX Runtime tells, and imports none of it. It sees operators, not shapes: an Add on the CPU may be of a
shape or of a whole batch. ONNX Runtime puts only the former there while it has a version for the GPU, and
`warn_if_slow` is for what this cannot see.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from cappy_engine.errors import DeviceUnavailable
from cappy_engine.session import PROVIDERS

SHAPE_OPERATORS = frozenset(
    "Shape Size Gather Slice Concat Squeeze Unsqueeze Reshape Cast ConstantOfShape Range Expand Equal Where "
    "Add Sub Mul Div ReduceProd".split()
)
"""Arithmetic on a few integers, which ONNX Runtime leaves on the CPU on purpose: a copy would take longer. More beside
the device's own provider would be parts that the device refused."""
HEAVY_OPERATORS = frozenset(
    "MatMul Gemm FusedMatMul FusedGemm MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul QLinearMatMul QGemm "
    "MatMulNBits Einsum Attention MultiHeadAttention PackedAttention PackedMultiHeadAttention QAttention".split()
)
"""Operators with products of matrices, where nearly all of the time goes; a device that runs none of them is idle."""
SPEED_FLOOR = 1e12
"""Floating-point operations per second. A GPU of the last ten years does several times that on a full batch, in fp32
too; a few cores do not. Many server cores may: what runs on a CPU is for `check_operator_providers` to find."""
LEAST_JUDGED_SECONDS = 0.02
"""A batch that takes a GPU at the floor less than this is mostly launches and copies, and tells nothing."""

log = logging.getLogger(__name__)


def check_operator_providers(device: str, placed: Mapping[str, Counter[str]]) -> None:
    """Raise DeviceUnavailable, with operators and counts, unless `device` runs the model; `placed` is from `census`.

    It runs it if some of HEAVY_OPERATORS are on its own provider, and others run no more than SHAPE_OPERATORS.
    """
    own = PROVIDERS[device]
    refused = {
        provider: found
        for provider, operators in placed.items()
        if provider != own
        and (found := Counter({name: operators[name] for name in operators if name not in SHAPE_OPERATORS}))
    }
    if refused:
        raise DeviceUnavailable(
            f"device {device!r} was asked for, but {_listed(refused)}: {own} does not take these operators in this "
            "model; choose a precision that was exported for the device, another device, or export the model again"
        )
    if HEAVY_OPERATORS.isdisjoint(placed.get(own, ())):
        raise DeviceUnavailable(
            f"device {device!r} was asked for, but {own} has none of the model's matrix products (ONNX Runtime "
            f"tells: {_listed(placed) or 'no node at all'}); run 'cappy doctor', or use device='cpu'"
        )


def warn_if_slow(device: str, *, gpu: int, flops: float, seconds: float) -> None:
    """Log a warning if a full batch took longer than on any free GPU.

    The batch has `flops` operations. Call this with the second run of a batch: the first one loads kernels. A batch
    that is too small is not judged.
    """
    if flops < SPEED_FLOOR * LEAST_JUDGED_SECONDS or flops >= SPEED_FLOOR * seconds:
        return
    log.warning(
        "GPU %d: device %r computes %.3f TFLOP/s on a full batch, and any GPU that is free does more than %.0f: is "
        "another process on the GPU (see nvidia-smi), or is it a slice of one?",
        gpu,
        device,
        flops / seconds / 1e12,
        SPEED_FLOOR / 1e12,
    )


def _listed(placed: Mapping[str, Counter[str]]) -> str:
    return " and ".join(
        f"{provider} runs {', '.join(f'{count} {name}' for name, count in operators.most_common())}"
        for provider, operators in placed.items()
    )
