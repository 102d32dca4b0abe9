"""Writes the results of a GPU check: cells, published figures beside ours, the summary.

Pure: the document in, text out. Where nothing was measured there is None, never 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
DEMOBERT = "NVIDIA's demoBERT (TensorRT), BERT-large, A100-40GB"
MLPERF = "MLPerf Inference v3.1 (MLCommons), BERT-large, one H100, tokenisation not timed"


@dataclass(frozen=True)
class Published:
    """A figure of others: latency or pairs per second, maybe at a shape."""

    source: str
    precision: str | None
    length: int | None
    rows: int | None
    milliseconds: float | None = None
    pairs_per_second: float | None = None


PUBLISHED = (
    Published(DEMOBERT, "fp16", 128, 1, milliseconds=1.54),
    Published(DEMOBERT, "fp16", 128, 128, pairs_per_second=2629),
    Published(DEMOBERT, "fp16", 384, 1, milliseconds=2.96),
    Published(DEMOBERT, "fp16", 384, 128, pairs_per_second=823),
    Published(DEMOBERT, "int8", 128, 1, milliseconds=1.23),
    Published(DEMOBERT, "int8", 128, 128, pairs_per_second=5122),
    Published(DEMOBERT, "int8", 384, 1, milliseconds=2.55),
    Published(DEMOBERT, "int8", 384, 128, pairs_per_second=1460),
    Published(f"{MLPERF}, offline, 99% of the accuracy", None, None, None, pairs_per_second=9102),
    Published(f"{MLPERF}, offline, 99.9% of the accuracy", None, None, None, pairs_per_second=7878),
    Published(f"{MLPERF}, server", None, None, None, pairs_per_second=7004),
)
"""On other machines, with BERT-large, which has the layers of cappy-large: a scale, not a race."""
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


def cells_of(steps: Iterable[Entry], *, is_mixed: bool) -> list[Figures]:
    """Gather the cells of the throughput steps, of the mixed workload or single lengths.

    >>> cells_of([], is_mixed=True)
    []
    """
    return [
        cell
        for step in steps
        if step["name"].startswith("throughput/") and step["figures"] is not None
        for cell in step["figures"].get("cells", ())
        if step["name"].endswith("/mixed") == is_mixed
    ]


def beside_published(steps: Sequence[Entry]) -> Figures | None:
    """Put every published figure beside ours at the nearest shape.

    None where nothing of ours was measured. A figure that names no shape stands beside the mixed workload.

        >>> beside_published([]) is None
        True
    """
    single = [cell for cell in cells_of(steps, is_mixed=False) if _is_ours(cell)]
    mixed = [cell for cell in cells_of(steps, is_mixed=True) if _is_ours(cell)]
    if not single and not mixed:
        return None
    return {"rows": [{**asdict(entry), "ours": _nearest(entry, single, mixed)} for entry in PUBLISHED]}


def summary(document: Mapping[str, Any]) -> str:
    """Write all of it as text: steps, missing parts, throughput, published figures.

    >>> print(summary(document))
    """
    steps = document["steps"]
    gpus = ", ".join(gpu["name"] for gpu in document["machine"]["gpus"]) or "no GPU"
    parts = [f"{document['title']}: {gpus}, {document['machine']['cpu']}, commit {document['commit'] or 'unknown'}"]
    rows = [(step["name"], step["status"], _seconds(step["seconds"]), _outcome(step)) for step in steps]
    parts.append(markdown(("step", "status", "seconds", "outcome"), rows))
    lacking = [
        f"  {device}: {finding['name']}: {finding['detail']}\n    fix: {finding['fix']}"
        for device, findings in ((steps[0]["figures"] or {}).get("findings") or {}).items()
        for finding in findings
        if not finding["is_ok"]
    ]
    if lacking:
        parts.append("\n".join(["What is missing:", *lacking]))
    tables = (_watched_table(steps), _throughput_table(steps), _questions_table(steps), _published_table(steps))
    return "\n\n".join([*parts, *(table for table in tables if table)])


def _is_ours(cell: Figures) -> bool:
    return cell["contestant"] in OURS and cell["seconds"] is not None


def _nearest(entry: Published, single: Sequence[Figures], mixed: Sequence[Figures]) -> Figures | None:
    """Find our fastest cell at the nearest shape.

    Of two as near it takes the longer and the smaller batch, which flatter less.
    """
    length, rows = entry.length, entry.rows
    if length is None or rows is None:
        found = max(mixed, key=lambda cell: float(cell["pairs_per_second"]), default=None)
    else:
        found = min(
            (cell for cell in single if cell["contestant"].endswith(str(entry.precision))),
            key=lambda cell: (abs(cell["length"] - length), -cell["length"], abs(cell["rows"] - rows), cell["seconds"]),
            default=None,
        )
    if found is None:
        return None
    kept = {name: found[name] for name in ("contestant", "length", "rows", "pairs_per_second")}
    return {**kept, "milliseconds": 1000 * found["seconds"] if length is not None else None}


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
    cells = cells_of(steps, is_mixed=False) + cells_of(steps, is_mixed=True)
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
    """Write what the GPU did in each step, as nvidia-smi saw it, and which attention kernels ran."""
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
    best = [step["figures"]["best"] for step in steps if step["name"].startswith("questions/") and step["figures"]]
    if not best:
        return ""
    ours = [(f"{cell['contestant']}, here, batches of {cell['batch']}", "", cell["pairs_per_second"]) for cell in best]
    theirs = [(name, f"{millions} M", speed) for name, millions, speed in RERANKERS]
    rows = [(name, size, number(speed)) for name, size, speed in sorted(ours + theirs, key=lambda row: -row[2])]
    title = "Natural Questions' protocol, beside published figures (one H100, bf16; our texts have assumed lengths):"
    return f"{title}\n\n" + markdown(("model", "parameters", "pairs/s"), rows)


def _speed(cell: Figures | None) -> str:
    if cell is None or cell["seconds"] is None:
        return "-"
    latency = f", {1000 * cell['seconds']:.2f} ms" if cell["rows"] == 1 else ""
    return f"{number(cell['pairs_per_second'])} ({number(cell['tflops'])}{latency})"


def _published_table(steps: Sequence[Entry]) -> str:
    figures = next((step["figures"] for step in steps if step["name"] == "published"), None)
    if figures is None:
        return ""
    rows = []
    for entry in figures["rows"]:
        ours, unit = entry["ours"], "milliseconds" if entry["milliseconds"] is not None else "pairs_per_second"
        where = "" if ours is None else f"{ours['contestant']}, {ours['rows']} x {ours['length'] or 'mixed'}"
        asked = "" if entry["length"] is None else f"{entry['precision']}, {entry['rows']} x {entry['length']}"
        shown = {"milliseconds": "ms", "pairs_per_second": "/s"}[unit]
        mine = "-" if ours is None or ours[unit] is None else f"{number(ours[unit])} {shown}"
        rows.append((entry["source"], asked, f"{number(entry[unit])} {shown}", mine, where))
    return "Published, on other machines:\n\n" + markdown(("source", "shape", "theirs", "ours here", "at"), rows)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"
