"""Measures how fast this machine multiplies matrices at best.

A runner exceeds it where its own products are faster than those tried here, or the machine was slower meanwhile.

The best of PyTorch's and ONNX Runtime's products, over shapes of Cappy's layers and square ones; `flops` counts a
multiplication and an addition as two. A printed figure is the best of several repetitions, since a peak is a maximum.
On a CPU without bfloat16 PyTorch emulates it, and bf16's peak is below fp32's.

    python -m cappy_bench.speed.peak [--threads 2] [--seconds 4]

The last line of the output is one JSON document: {"fp32": {"flops": ..., "how": ...}, "bf16": {...}, "int8": {...}}.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from cappy_bench.seconds import read_seconds

SHAPES = ((32, 512, 512), (512, 1024, 4096), (512, 4096, 1024), (2048, 2048, 2048))
"""Rows, inner and outer size: a small one, to find what is hopeless; 512 tokens through both products of cappy-large's
feed-forward; and a square."""
HOPELESS = 10
"""A product that is this many times slower than the best so far, or than float32, is not tried at the next shape."""


def measure_peak(*, threads: int, seconds: float) -> dict[str, Any]:
    """Measure the most operations per second in float32, bfloat16 and int8, and their products.

    >>> measure_peak(threads=2, seconds=6.0)["fp32"]["how"]
    'PyTorch 2.13.0 mm, 2048 x 2048 x 2048'
    """
    torch.set_num_threads(threads)
    best: dict[str, dict[str, Any]] = {}
    share = seconds / len(SHAPES) / 6
    hopeless: set[str] = set()
    for shape in SHAPES:
        for precision, how, multiply in _products(shape, threads):
            if how in hopeless:
                continue
            flops = 2 * np.prod(shape, dtype=np.float64) / _fastest(multiply, share)
            reached = best.get(precision, {"flops": 0.0})["flops"]
            if flops > reached:
                best[precision] = {"flops": float(flops), "how": f"{how}, {' x '.join(map(str, shape))}"}
            if flops < max(reached, best["fp32"]["flops"]) / HOPELESS:
                hopeless.add(how)  # PyTorch's int8 without VNNI, and bfloat16 that is emulated: seconds for a product
    return best


def _products(shape: tuple[int, int, int], threads: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    rows, inner, outer = shape
    random = np.random.default_rng(0)
    left, right = random.standard_normal((rows, inner), np.float32), random.standard_normal((inner, outer), np.float32)
    first, second = torch.from_numpy(left), torch.from_numpy(right)
    yield "fp32", f"PyTorch {torch.__version__} mm", lambda: torch.mm(first, second)
    yield "fp32", f"ONNX Runtime {onnxruntime.__version__} MatMul", _ort("MatMul", left, right, threads)
    narrow, others = first.bfloat16(), second.bfloat16()
    yield "bf16", f"PyTorch {torch.__version__} mm", lambda: torch.mm(narrow, others)
    codes = random.integers(0, 255, (rows, inner), np.uint8)
    for kind in (np.int8, np.uint8):
        weights = random.integers(0, 120, (inner, outer)).astype(kind)
        how = f"ONNX Runtime {onnxruntime.__version__} MatMulInteger, uint8 x {np.dtype(kind).name}"
        yield "int8", how, _ort("MatMulInteger", codes, weights, threads)
    signed = torch.from_numpy(random.integers(-120, 120, (rows, inner)).astype(np.int8))
    weights8 = torch.from_numpy(random.integers(-120, 120, (inner, outer)).astype(np.int8))
    yield "int8", f"PyTorch {torch.__version__} _int_mm", lambda: torch._int_mm(signed, weights8)


def _ort(operator: str, left: np.ndarray[Any, Any], right: np.ndarray[Any, Any], threads: int) -> Callable[[], object]:
    kind = helper.np_dtype_to_tensor_dtype(left.dtype)
    output = TensorProto.FLOAT if left.dtype == np.float32 else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(operator, ["left", "right"], ["product"])],
        "product",
        [helper.make_tensor_value_info("left", kind, left.shape)],
        [helper.make_tensor_value_info("product", output, (left.shape[0], right.shape[1]))],
        [numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def _fastest(multiply: Callable[[], object], seconds: float) -> float:
    """The shortest time of one product, over repetitions that fill `seconds`; one at least."""
    shortest, ends = float("inf"), time.perf_counter() + seconds
    while shortest == float("inf") or time.perf_counter() < ends:
        started = time.perf_counter()
        multiply()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=read_seconds, default=6.0, help="for all of it")
    options = parser.parse_args(argv)
    peak = measure_peak(threads=options.threads, seconds=options.seconds)
    for precision, best in peak.items():
        print(f"{precision}: {best['flops'] / 1e9:.0f} Gop/s ({best['how']})")
    print(json.dumps(peak))


if __name__ == "__main__":
    main()
