"""Shows why the graphs use their operators: each alone, on this CPU, at Cappy's shapes.

There are two comparisons: products with weights (float32, and 8 bits in the ways that ONNX Runtime offers), in
operations per second, and the operators between them (residual with layer norm, bias with GELU), in nanoseconds per
value. Each figure is the median of repeated runs, after a first one.

    python -m cappy_bench.studies.operators [--tokens 384] [--hidden 1024] [--threads 1]

The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Arrays = Mapping[str, npt.NDArray[Any]]
MICROSOFT = "com.microsoft"
BLOCK = 256
SECONDS = 0.5
"""How long each operator is measured."""


def _product_nodes(weights: npt.NDArray[np.float32]) -> dict[str, tuple[list[Any], Arrays, bool]]:
    """Make nodes that multiply by `weights` (inputs, outputs), by name.

    With each come its constants, and whether the input is uint8.
    """
    node, (inputs, outputs) = helper.make_node, weights.shape
    scales = (np.abs(weights).max(axis=0) / 127).astype(np.float32)
    signed = np.rint(weights / scales).astype(np.int8)
    blocks = weights.T.reshape(outputs, inputs // BLOCK, BLOCK)
    block_scales = (np.abs(blocks).max(axis=2) / 127).astype(np.float32)
    zero, unit = np.array(128, np.uint8), np.array(1, np.float32)
    to_float = node("MatMulIntegerToFloat", ["x", "w", "one", "s", "z"], ["y"], domain=MICROSOFT)
    whole = node("MatMulInteger", ["x", "w", "z", "wz"], ["y"])
    dynamic = node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain=MICROSOFT)
    by_block = node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        bits=8,
        block_size=BLOCK,
        accuracy_level=4,
    )
    return {
        "float32, Gemm": ([node("Gemm", ["x", "w"], ["y"])], {"w": weights}, False),
        "8 bits, signed weights (chosen)": ([to_float], {"w": signed, "one": unit, "s": scales, "z": zero}, True),
        "8 bits, unsigned weights": (
            [whole],
            {"w": (signed.astype(np.int16) + 128).astype(np.uint8), "z": zero, "wz": zero},
            True,
        ),
        "8 bits, DynamicQuantizeMatMul": ([dynamic], {"w": signed, "s": scales}, False),
        f"8 bits, MatMulNBits in blocks of {BLOCK}": (
            [by_block],
            {"w": (np.rint(blocks / block_scales[..., None]) + 128).astype(np.uint8), "s": block_scales},
            False,
        ),
    }


def _pointwise_nodes(hidden: int) -> dict[str, tuple[list[Any], Arrays]]:
    """Make nodes on x and a residual r, both (tokens, hidden), by name, with constants."""
    node = helper.make_node
    constants = {name: np.linspace(0.5, 1.5, hidden, dtype=np.float32) for name in ("g", "b", "c")}
    return {
        "SkipLayerNormalization": (
            [node("SkipLayerNormalization", ["x", "r", "g", "b", "c"], ["y"], domain=MICROSOFT)],
            constants,
        ),
        "Add, Add, LayerNormalization (chosen)": (
            [
                node("Add", ["x", "c"], ["x_c"]),
                node("Add", ["x_c", "r"], ["sum"]),
                node("LayerNormalization", ["sum", "g", "b"], ["y"], axis=-1),
            ],
            constants,
        ),
        "BiasGelu": ([node("BiasGelu", ["x", "c"], ["y"], domain=MICROSOFT)], constants),
        "Gelu": ([node("Gelu", ["x"], ["y"], domain=MICROSOFT)], {}),
        "Mul by a row's scale": ([node("Mul", ["x", "row"], ["y"])], {"row": np.ones((1, 1), np.float32)}),
    }


def _time_nodes(nodes: Sequence[Any], constants: Arrays, inputs: Arrays, threads: int) -> float:
    """Time a run of the nodes: median seconds, after a first run."""
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "operators",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), ["tokens", value.shape[1]]
            )
            for name, value in inputs.items()
            if name in read
        ],
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in read],
    )
    graph.output[0].ClearField("type")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    feed = {name: value for name, value in inputs.items() if name in read}
    session.run(None, feed)
    seconds: list[float] = []
    while sum(seconds) < SECONDS or len(seconds) < 5:
        started = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    tokens, hidden, threads = options.tokens, options.hidden, options.threads
    random = np.random.default_rng(0)
    activations = random.standard_normal((tokens, hidden)).astype(np.float32)
    whole = random.integers(0, 256, (tokens, hidden)).astype(np.uint8)
    weights = (0.02 * random.standard_normal((hidden, 4 * hidden))).astype(np.float32)
    found: dict[str, dict[str, float]] = {"products, Gop/s": {}, "between products, ns a value": {}}
    for name, (nodes, constants, is_whole) in _product_nodes(weights).items():
        seconds = _time_nodes(nodes, constants, {"x": whole if is_whole else activations}, threads)
        found["products, Gop/s"][name] = 2 * tokens * weights.size / seconds / 1e9
    for name, (nodes, constants) in _pointwise_nodes(hidden).items():
        seconds = _time_nodes(nodes, constants, {"x": activations, "r": activations[::-1].copy()}, threads)
        found["between products, ns a value"][name] = seconds / activations.size * 1e9
    for title, rows in found.items():
        print(f"{title} ({tokens} tokens, hidden {hidden}, {threads} threads)")
        for name, value in rows.items():
            print(f"  {name:<40}  {value:>7.2f}")
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    print(json.dumps({"versions": versions, "tokens": tokens, "hidden": hidden, "threads": threads, **found}))


if __name__ == "__main__":
    main()
