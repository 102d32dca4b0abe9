"""What a float32 graph's products read on calibration pairs: means, for int8's biases, and second moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cappy_engine.errors import GraphError
from cappy_export.precisions.fp16 import Inputs, present_inputs, session_for
from cappy_export.precisions.rounding import Floats

QUIETEST = 0.25
"""The least root mean square of a channel, in that of all. It binds for 0.5% of what follows cappy-mini's Gelus."""


@dataclass(frozen=True)
class Activations:
    """What a product reads, over all tokens of the calibration: mean (inputs,) and, if asked for, x xᵀ's mean."""

    mean: Floats
    moments: Floats | None = None


def measure_activations(
    source: Path, names: Sequence[str], calibration: Iterable[Inputs], *, has_moments: bool = False
) -> dict[str, Activations]:
    """What the model `source` computes on `calibration` (model inputs by name) as `names`; empty without inputs.

    A channel that the calibration hardly saw may be alive elsewhere, so none counts for less than QUIETEST. Second
    moments take inputs² times 4 bytes: 1.9 GB in all for a model of cappy-large's size. Raises GraphError where what is
    measured is not finite.
    """
    if not names:
        return {}  # ONNX Runtime takes an empty list for all outputs
    model = onnx.load(str(source))
    known = {entry.name for entry in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = session_for(model, source.parent)
    del model
    tokens: dict[str, int] = dict.fromkeys(names, 0)
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    squares: dict[str, Any] = dict.fromkeys(names, 0.0)
    for inputs in calibration:
        for name, value in zip(names, session.run(list(names), present_inputs(session, inputs)), strict=True):
            rows = value.reshape(-1, value.shape[-1])
            tokens[name] += len(rows)
            sums[name] = sums[name] + rows.sum(axis=0, dtype=np.float64)
            if has_moments:
                squares[name] += rows.T @ rows
    found: dict[str, Activations] = {}
    for name, count in tokens.items():
        if count:
            if not np.isfinite(sums[name]).all():
                raise GraphError(f"{name} is not finite on the pairs to calibrate on")
            moments = _without_silence(squares.pop(name), count) if has_moments else None
            found[name] = Activations((sums[name] / count).astype(np.float32), moments)
    return found


def _without_silence(squares: Floats, count: int) -> Floats:
    """The mean of `count` tokens' sums of x xᵀ, in place, with no channel below QUIETEST."""
    squares /= np.float32(count)
    sizes = np.diag(squares)
    floor = QUIETEST**2 * sizes.mean()
    squares[np.diag_indices_from(squares)] = np.maximum(sizes, floor)
    return squares
