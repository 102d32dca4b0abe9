"""Run a float32 graph on calibration pairs, and measure what its tensors hold.

fp16 looks for the largest value of every tensor (`take_census`). int8 on CPUs needs the means of what products
read, and how they spread (`measure_activations`); int8 for TensorRT needs the largest value of every channel
(`activation_ranges`). Knows nothing of the models that are made from these figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime import InferenceSession, NodeArg, SessionOptions

from cappy_engine.batching import Batch, EncodedPairs
from cappy_engine.errors import GraphError
from cappy_engine.inputs import model_inputs
from cappy_export.graphs.files import save
from cappy_export.precisions.rounding import Floats

CALIBRATION_PAIRS = 32
"""Pairs on which the float32 graph is searched for values beyond fp16."""
TOKENS_AT_ONCE = 1024
"""Tokens whose second moments are summed in one product. A model of cappy-large's size holds 0.7 MB for each."""
INT8_CALIBRATION_PAIRS = 512
"""Pairs on which int8 weighs its errors: with a few it would fit what these have by chance."""
QUIETEST = 0.25
"""The least root mean square of a channel, in that of all. It binds for 0.5% of what follows cappy-mini's Gelus."""

Inputs = Mapping[str, npt.NDArray[np.int64]]
"""Model inputs by name, each (batch, length) int64."""


@dataclass(frozen=True)
class CalibrationPairs:
    """Hold the pairs that values are measured on, as tokens.

    >>> pairs = CalibrationPairs(tokenizer.encode(default_pairs()), pad_token_id=1)
    >>> len(list(pairs.inputs(32)))
    35
    """

    encoded: EncodedPairs
    pad_token_id: int

    def inputs(self, count: int = CALIBRATION_PAIRS) -> Iterator[Inputs]:
        """Yield model inputs of about `count` pairs, one pair each: every n-th by length, and so the longest."""
        lengths = self.encoded.lengths
        order = np.argsort(lengths, kind="stable")
        for row in order[:: -max(1, len(order) // count)]:
            batch = Batch(np.array([row]), int(lengths[row]))
            yield model_inputs(self.encoded, batch, pad_token_id=self.pad_token_id)


@dataclass(frozen=True)
class Census:
    """Hold all tensors of a graph, and the largest absolute value of each float one."""

    tensors: list[NodeArg]
    largest: Mapping[str, float]


@dataclass(frozen=True)
class Activations:
    """Hold what a product reads, over all tokens of the calibration: `mean`, (inputs,), and `spread`, (inputs, inputs).

    The spread is the mean of (x - mean) (x - mean)ᵀ.
    """

    mean: Floats
    spread: Floats

    @property
    def moments(self) -> Floats:
        """Compute the mean of x xᵀ, (inputs, inputs)."""
        moments: Floats = self.spread + np.outer(self.mean, self.mean)
        return moments


def take_census(source: Path, calibration: Iterable[Inputs]) -> Census:
    """Run the model on `calibration`, and note the largest absolute value of every float tensor.

    >>> take_census(Path("my-bundle/onnx/model.onnx"), pairs.inputs()).largest["logits"]
    """
    weights = onnx.load(str(source)).graph.initializer
    largest = {
        entry.name: float(np.abs(onnx.numpy_helper.to_array(entry)).max())
        for entry in weights
        if entry.data_type == onnx.TensorProto.FLOAT and 0 not in entry.dims
    }
    del weights
    session = open_exposed(source)
    tensors = session.get_outputs()
    names = [tensor.name for tensor in tensors if tensor.type == "tensor(float)"]
    for values in exposed_values(session, names, calibration):
        for name, value in values.items():
            if value.size:
                most = np.maximum(np.abs(value).max(), largest.get(name, 0.0))  # NaN stays, which max() forgets
                largest[name] = float(most)
    return Census(tensors, largest)


def measure_activations(source: Path, names: Sequence[str], calibration: Iterable[Inputs]) -> dict[str, Activations]:
    """Measure what the model `source` computes on `calibration` as `names`; empty without inputs.

    >>> measure_activations(Path("my-bundle/onnx/model.onnx"), ["layer.0/attention"], pairs.inputs())

    A channel that the calibration hardly saw may be alive elsewhere, so none spreads by less than QUIETEST. Spreads
    take inputs² times 4 bytes: 1.9 GB in all for a model of cappy-large's size. Raises GraphError where a mean is not
    finite.
    """
    if not names:
        return {}  # ONNX Runtime takes an empty list for all outputs
    sums = {name: _Sums() for name in names}
    for values in exposed_values(open_exposed(source, names), names, calibration):
        for name, value in values.items():
            sums[name].take(value.reshape(-1, value.shape[-1]))
    return {name: found.finish(name) for name, found in sums.items() if found.tokens}


class _Sums:
    """Sum rows (tokens, inputs), and their second moments for many tokens at a time: each product writes inputs²."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0
        self._waiting: list[Floats] = []

    def take(self, rows: Floats) -> None:
        self.tokens += len(rows)
        self._sum = self._sum + rows.sum(axis=0, dtype=np.float64)
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= TOKENS_AT_ONCE:
            self._multiply()

    def finish(self, name: str) -> Activations:
        if not np.isfinite(self._sum).all():
            raise GraphError(f"{name} is not finite on the pairs to calibrate on")
        mean = (self._sum / self.tokens).astype(np.float32)
        self._multiply()
        spread: Floats = self._squares
        spread /= np.float32(self.tokens)
        spread -= np.outer(mean, mean)
        return Activations(mean, _without_silence(spread))

    def _multiply(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting)
            self._waiting.clear()
            self._squares += rows.T @ rows


def activation_ranges(source: Path, calibration: Iterable[Inputs]) -> dict[str, Floats]:
    """Find the largest absolute values, (channels,), of every activation that a product with weights reads.

    >>> activation_ranges(Path("my-bundle/tensorrt/model.onnx"), pairs.inputs())
    """
    graph = onnx.load(str(source)).graph
    weights = {entry.name for entry in graph.initializer if len(entry.dims) == 2}
    read = [node.input[0] for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    del graph
    names = list(dict.fromkeys(read))
    largest: dict[str, Floats] = {}
    for values in exposed_values(open_exposed(source, names), names, calibration):
        for name, value in values.items():
            found = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0)
            largest[name] = np.maximum(found, largest.get(name, found))
    return largest


def open_exposed(source: Path, names: Sequence[str] | None = None, *, folder: Path | None = None) -> InferenceSession:
    """Open a model on the CPU with intermediate tensors as outputs: those of `names`, or every one.

    >>> session = open_exposed(Path("my-bundle/onnx/model.onnx"), ["layer.0/attention"])

    A copy lies in `folder` meanwhile; without one, where the model is.
    """
    model = onnx.load(str(source))
    if names is None:
        names = [name for node in model.graph.node for name in node.output if name]
    known = {entry.name for entry in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(dir=folder or source.parent) as temporary:
        path = Path(temporary, "exposed.onnx")
        save(model, path)
        del model
        return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def exposed_values(
    session: InferenceSession, names: Sequence[str], calibration: Iterable[Inputs]
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield the values of the tensors `names`, by name, for each of `calibration`.

    >>> next(exposed_values(session, ["layer.0/attention"], pairs.inputs()))["layer.0/attention"].shape
    """
    taken = [entry.name for entry in session.get_inputs()]
    for inputs in calibration:
        values = session.run(list(names), {name: inputs[name] for name in taken})
        yield dict(zip(names, values, strict=True))


def _without_silence(spread: Floats) -> Floats:
    """Let no channel spread by less than QUIETEST, in place."""
    sizes = np.diag(spread)
    floor = QUIETEST**2 * sizes.mean()
    spread[np.diag_indices_from(spread)] = np.maximum(sizes, floor)
    return spread
