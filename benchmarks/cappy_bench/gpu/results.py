"""Writes the results of a GPU check: cells, published rerankers beside ours, the summary.

Pure: the document in, text out. Where nothing was measured there is None, never 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cappy_bench.speed.figures import useful_flops
from cappy_bench.speed.markdown import error, markdown, number

Figures = dict[str, Any]
Entry = Mapping[str, Any]

OURS = ("cuda fp16", "tensorrt fp16", "tensorrt int8")
TORCH = ("pytorch fp16", "pytorch bf16")
USUAL_ROWS = 32
"""What sentence-transformers' CrossEncoder puts into a batch unless it is told otherwise."""
IN_USUAL_ROWS = f", {USUAL_ROWS} a batch"
CONTESTANTS = (*OURS, *TORCH, *(f"{name}{IN_USUAL_ROWS}" for name in TORCH))
ON_CUDA = ("cuda fp16", *TORCH)
"""The contestants of the steps that need no TensorRT."""
RERANKERS = (
    ("ettin-reranker-17m-v1", 17, 7517),
    ("ettin-reranker-32m-v1", 32, 6602),
    ("ettin-reranker-68m-v1", 68, 4913),
    ("ms-marco-MiniLM-L4-v2", 19, 4029),
    ("ms-marco-MiniLM-L6-v2", 22, 3817),
    ("ms-marco-MiniLM-L12-v2", 33, 3311),
    ("ettin-reranker-150m-v1", 150, 3237),
    ("bge-reranker-base", 278, 2858),
    ("mxbai-rerank-xsmall-v1", 70, 2636),
    ("mxbai-rerank-base-v1", 184, 1953),
    ("ettin-reranker-400m-v1", 400, 1738),
    ("bge-reranker-large", 560, 1659),
    ("bge-reranker-v2-m3", 568, 1569),
    ("gte-reranker-modernbert-base", 150, 1418),
    ("granite-embedding-reranker-english-r2", 150, 1404),
    ("ettin-reranker-1b-v1", 1000, 928),
    ("mxbai-rerank-large-v1", 435, 867),
    ("mxbai-rerank-base-v2", 494, 809),
    ("mxbai-rerank-large-v2", 1500, 387),
)
"""Million parameters and pairs a second of sentence-transformers' authors (`questions.py` has the protocol)."""


def make_cell(contestant: str, lengths: Sequence[int], seconds: Sequence[float], shape: Mapping[str, int]) -> Figures:
    """Derive one contestant's figures on rows of these `lengths`; no `seconds` if it failed.

    >>> make_cell("cuda fp16", [64] * 8, [0.5], {"hidden_size": 8, "intermediate_size": 32, "layers": 2})["rows"]
    8
    """
    cell: Figures = {
        "contestant": contestant,
        "length": lengths[0] if len(set(lengths)) == 1 else None,
        "rows": len(lengths),
        "tokens": sum(lengths),
        "runs": len(seconds) or None,
    }
    derived = ("seconds", "fastest", "slowest", "pairs_per_second", "tokens_per_second", "tflops")
    if not seconds:
        return {**cell, **dict.fromkeys(derived)}
    middle = statistics.median(seconds)
    values = (middle, min(seconds), max(seconds), len(lengths) / middle, sum(lengths) / middle)
    return {**cell, **dict(zip(derived, (*values, useful_flops(shape, lengths) / middle / 1e12), strict=True))}


def summary(document: Mapping[str, Any]) -> str:
    """Write all of it as text: steps, missing parts, throughput, published rerankers.

    >>> print(summary(document))
    """
    steps = document["steps"]
    gpus = ", ".join(gpu["name"] for gpu in document["machine"]["gpus"]) or "no GPU"
    parts = [f"{document['title']}: {gpus}, {document['machine']['cpu']}, commit {document['commit'] or 'unknown'}"]
    took = ["-" if step["seconds"] is None else f"{step['seconds']:.1f}" for step in steps]
    rows = [(step["name"], step["status"], seconds, _outcome(step)) for step, seconds in zip(steps, took, strict=True)]
    parts.append(markdown(("step", "status", "seconds", "outcome"), rows))
    lacking = [
        f"  {device}: {finding['name']}: {finding['detail']}\n    fix: {finding['fix']}"
        for device, findings in ((steps[0]["figures"] or {}).get("findings") or {}).items()
        for finding in findings
        if not finding["is_ok"]
    ]
    if lacking:
        parts.append("\n".join(["What is missing:", *lacking]))
    tables = (_watched_table(steps), _throughput_table(steps), _questions_table(steps))
    return "\n\n".join([*parts, *(table for table in tables if table)])


def _outcome(step: Entry) -> str:
    if step["reason"]:
        return str(step["reason"])
    figures = step["figures"] or {}
    if "max_error" in figures:
        kept = figures["winner_agreement"]
        winners = "" if kept is None else f", winners kept {kept:.1%}"
        errors = f"max error {error(figures['max_error'])}, mean {error(figures['mean_error'])}"
        return f"{errors}, Spearman {figures['spearman']:.5f}{winners}{'' if figures['limits'] else ' (no limit)'}"
    if "opened_seconds" in figures:
        built = figures["engines_built"]
        engines = "" if built is None else f", {built} engines built"
        return str(figures["note"] or f"opened in {figures['opened_seconds']:.1f} s{engines}")
    return str(figures.get("outcome") or "")


def _throughput_table(steps: Sequence[Entry]) -> str:
    """Write pairs per second and TFLOP/s of every shape; wrong scores are named."""
    wrong = {
        step["name"].removeprefix("parity/").replace("/", " ")
        for step in steps
        if step["name"].startswith("parity/") and step["status"] == "failed"
    }
    measured = [step for step in steps if step["name"].startswith("throughput/") and step["figures"]]
    measured.sort(key=lambda step: step["name"].endswith("/mixed"))  # the mixed workload stands last
    cells = [cell for step in measured for cell in step["figures"].get("cells", ())]
    if not cells:
        return ""
    shapes = dict.fromkeys((cell["length"], cell["rows"]) for cell in cells)
    # CUDA's fp16 is measured beside PyTorch first, and then again beside TensorRT.
    by_place = {(cell["length"], cell["rows"], cell["contestant"]): cell for cell in reversed(cells)}
    rows = [
        (str(length or "mixed"), str(count), *(_speed(by_place.get((length, count, name))) for name in CONTESTANTS))
        for length, count in shapes
    ]
    names = [f"{name} (PARITY FAILED)" if name in wrong else name for name in CONTESTANTS]
    return "Pairs/s (TFLOP/s), medians:\n\n" + markdown(("length", "rows", *names), rows)


def _watched_table(steps: Sequence[Entry]) -> str:
    """Write nvidia-smi's figures of the GPU for each step, and which attention kernels ran."""
    rows = []
    for step in steps:
        seen, kernels = step.get("gpu"), step.get("attention")
        if seen or kernels:
            names = ("sm_mhz", "watts", "celsius", "mib")
            told = [number(seen[name]) if seen and seen[name] is not None else "-" for name in names]
            rows.append((step["name"], *told, ", ".join(kernels or ())))
    header = ("step", "SM MHz", "W", "hottest C", "most MiB", "attention kernels")
    return "The GPU meanwhile (medians of nvidia-smi):\n\n" + markdown(header, rows) if rows else ""


def _questions_table(steps: Sequence[Entry]) -> str:
    """Write the published rerankers and ours by their speed, fastest first."""
    measured = [step["figures"] for step in steps if step["name"].startswith("questions/") and step["figures"]]
    if not measured:
        return ""
    best = [figures["best"] for figures in measured]
    ours = [(f"{cell['contestant']}, here, batches of {cell['batch']}", "", cell["pairs_per_second"]) for cell in best]
    theirs = [(name, f"{millions} M", speed) for name, millions, speed in RERANKERS]
    rows = [(name, size, number(speed)) for name, size, speed in sorted(ours + theirs, key=lambda row: -row[2])]
    title = f"Natural Questions' protocol, beside published figures (one H100, bf16). Our pairs: {measured[0]['pairs']}"
    return f"{title}\n\n" + markdown(("model", "parameters", "pairs/s"), rows)


def _speed(cell: Figures | None) -> str:
    if cell is None or cell["seconds"] is None:
        return "-"
    latency = f", {1000 * cell['seconds']:.2f} ms" if cell["rows"] == 1 else ""
    return f"{number(cell['pairs_per_second'])} ({number(cell['tflops'])}{latency})"
