"""Compares two attention operators for CUDA graphs on this GPU, with the same weights.

The exporter writes PackedMultiHeadAttention. The other form is made of the bundle's own model, so that nothing else
differs.
"""

from __future__ import annotations

import numpy as np

from cappy_bench.gpu.plan import Check
from cappy_bench.gpu.results import Figures
from cappy_bench.gpu.throughput import random_batch, time_shapes, unless_failed
from cappy_engine.bundle import open_bundle
from cappy_engine.session import Session

PRECISION = "fp16"
OURS, OTHER = "PackedMultiHeadAttention", "PackedAttention"
SHAPES = ((1, 64), (1, 256), (8, 128), (64, 128), (32, 512))
"""Rows and tokens: pairs alone, a few candidates, and full batches of short and of long pairs."""


def run_attention(check: Check) -> Figures:
    """Run both forms once at every shape. ONNX Runtime then says which kernels it takes.

    >>> run_attention(check)["outcome"]
    'both forms ran at 5 shapes'
    """
    for session in _open_both(check).values():
        for rows, length in _shapes(check):
            session.run(random_batch(check, rows, length))
    return {"outcome": f"both forms ran at {len(_shapes(check))} shapes"}


def measure_attention(check: Check) -> Figures:
    """Time both forms at every shape, in turns, and compare their scores.

    >>> measure_attention(check)["forms"][0]["contestant"]
    'PackedMultiHeadAttention'
    """
    sessions = _open_both(check)
    cells, failed = time_shapes(check, sessions, _shapes(check))
    faster = [
        f"{other['seconds'] / ours['seconds']:.2f} at {ours['rows']} x {ours['length']}"
        for ours, other in zip(cells[::2], cells[1::2], strict=True)
        if ours["seconds"] and other["seconds"]
    ]
    outcome = f"{OURS} is so many times as fast as {OTHER}: {', '.join(faster)}"
    inputs = random_batch(check, 8, 128)
    ours, other = (session.run(inputs) for session in sessions.values())
    difference = float(np.abs(ours - other).max())
    return unless_failed({"forms": cells, "failed": failed, "difference": difference, "outcome": outcome})


def _shapes(check: Check) -> list[tuple[int, int]]:
    return [(rows, length) for rows, length in SHAPES if rows * length <= check.effort.tokens]


def _open_both(check: Check) -> dict[str, Session]:
    """Open the bundle's model, and its other form, which is written for this."""
    ours = open_bundle(check.bundle).model(PRECISION, "cuda")
    other = check.work / "packed_attention.onnx"
    sessions = {OURS: check.machine.open_file(ours)}
    # PyTorch comes with these: not before our session is open
    import onnx

    from cappy_bench.gpu.packed_attention import with_packed_attention
    from cappy_export.graphs.files import save

    save(with_packed_attention(onnx.load(str(ours))), other)
    return {**sessions, OTHER: check.machine.open_file(other)}
