"""Profiles one batch kernel by kernel: how long the GPU computes, with what, and how long it waits for the CPU.

PyTorch's profiler listens to CUDA (CUPTI), and so sees ONNX Runtime's kernels like its own. Profiling slows a run down,
so the time of a run is measured without it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cappy_bench.gpu.plan import Check, CheckFailed
from cappy_bench.gpu.results import Figures
from cappy_bench.gpu.throughput import random_batch, time_shapes, unless_failed
from cappy_engine.session import Inputs, Session

SHAPES = ((1, 64), (128, 128))
"""Rows and tokens: one pair alone, and a full batch."""
RUNS = 10
MOST_KERNELS = 12
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that the GPU runs."""
KINDS = (
    ("attention", ("flash", "fmha", "attention")),
    ("matrix products", ("gemm", "nvjet", "xmma", "cutlass", "cublas", "splitk")),
    ("normalisation", ("layernorm", "layer_norm")),
    ("activation", ("gelu",)),
    ("biases added", ("broadcastbias",)),
    ("copies", ("memcpy", "memset", "copy", "transpose", "cast", "padding")),
)
"""Words in a kernel's name, in lower case, that tell what it does; the first kind that fits."""


def profile_batches(check: Check, *, name: str) -> Figures:
    """Profile one contestant at every shape.

    >>> profile_batches(check, name="cuda fp16")["shapes"][0]["busy_share"]
    """
    session, _ = check.open(name)
    shapes = [(rows, length) for rows, length in SHAPES if rows * length <= check.effort.tokens]
    cells, failed = time_shapes(check, {name: session}, shapes)
    unless_failed({"failed": failed})
    found = []
    for cell in cells:
        rows, length, wall = cell["rows"], cell["length"], cell["seconds"]
        trace = check.work / f"trace-{name.replace(' ', '-')}-{rows}x{length}.json"
        check.machine.trace(partial(_repeat, session, random_batch(check, rows, length)), trace)
        figures = _summarise_trace(_read_events(trace), runs=RUNS)
        if not figures["kernels"]:
            raise CheckFailed(f"the profiler saw no kernel of {rows} x {length}; is CUPTI there?")
        share = figures["busy_seconds"] / wall
        found.append({"rows": rows, "length": length, "seconds": wall, "busy_share": share, **figures})
    told = [
        f"{one['rows']} x {one['length']}: {1000 * one['seconds']:.2f} ms, the GPU computes for "
        f"{1000 * one['busy_seconds']:.2f} ms in {one['kernels']} kernels"
        for one in found
    ]
    return {"shapes": found, "outcome": "; ".join(told)}


def _repeat(session: Session, inputs: Inputs) -> None:
    for _ in range(RUNS):
        session.run(inputs)


def _read_events(trace: Path) -> list[Mapping[str, Any]]:
    """Read the events of a trace in Chrome's format that the GPU ran."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("cat") in ON_GPU]


def _summarise_trace(events: Sequence[Mapping[str, Any]], *, runs: int) -> Figures:
    """Tell what the GPU did in one of `runs` equal runs: seconds in all, by kind, and of the longest kernels."""
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in events:
        kinds[_kind_of(event["name"])] += event["dur"]
        names[event["name"]] += event["dur"]
    scale = 1e-6 / runs
    return {
        "kernels": round(len(events) / runs),
        "busy_seconds": _covered((event["ts"], event["ts"] + event["dur"]) for event in events) * scale,
        "by_kind": {kind: micros * scale for kind, micros in kinds.most_common()},
        "longest": {name: micros * scale for name, micros in names.most_common(MOST_KERNELS)},
    }


def _kind_of(kernel: str) -> str:
    """Tell what a kernel does by its name."""
    lower = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in lower for word in words)), "other")


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Add up the time that spans cover, where they overlap once."""
    total, end = 0.0, float("-inf")
    for begins, ends in sorted(spans):
        total += max(0.0, ends - max(begins, end))
        end = max(end, ends)
    return total
