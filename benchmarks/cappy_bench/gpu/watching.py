"""Watches a GPU while something runs, through nvidia-smi, and reads which attention kernels ONNX Runtime took.

Without nvidia-smi the result is empty; that is not an error. No setting of a GPU is changed.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

STATE = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu", "mib": "memory.used"}
"""What is sampled: our names, and nvidia-smi's."""
FACTS = (
    *("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem"),
    *("temperature.gpu", "memory.total", "memory.used", "ecc.mode.current", "mig.mode.current", "compute_mode"),
)
MILLISECONDS = 500
DEBUG_LINE = re.compile(r"Operator=(\w+).*? DataType=(\w+) SdpaKernel=(\w+)")
"""What ONNX Runtime prints for each attention if ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO is 1."""


def gpu_facts() -> list[dict[str, str]]:
    """Ask nvidia-smi for driver, clocks, power and memory of every GPU; empty where it cannot be asked.

    >>> gpu_facts()
    []
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(FACTS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(FACTS, row, strict=True)) for row in rows if len(row) == len(FACTS)]


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Sample the first GPU while the block runs; what was seen is in the dict behind it, empty if nothing was.

    >>> with watched() as seen:
    ...     run()
    >>> seen
    {'samples': 12, 'sm_mhz': 1980.0, 'watts': 412.5, 'celsius': 61.0, 'mib': 9421.0}
    """
    seen: dict[str, Any] = {}
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield seen
        return
    query = ["--query-gpu=" + ",".join(STATE.values()), "--format=csv,noheader,nounits", f"--loop-ms={MILLISECONDS}"]
    with tempfile.TemporaryFile("w+") as file:
        sampler = subprocess.Popen([tool, "--id=0", *query], stdout=file, stderr=subprocess.DEVNULL)  # noqa: S603
        try:
            yield seen
        finally:
            sampler.terminate()
            sampler.wait()
            file.seek(0)
            seen |= summarise(file.read())


def summarise(samples: str) -> dict[str, Any]:
    """Summarise nvidia-smi's lines: medians of clock and power, the highest temperature and memory.

    >>> summarise("1980, 412.5, 61, 9421\\n")["watts"]
    412.5
    """
    rows = [fields for line in samples.splitlines() if len(fields := line.split(",")) == len(STATE)]
    if not rows:
        return {}
    columns = {name: _numbers(row[place] for row in rows) for place, name in enumerate(STATE)}
    how: Mapping[str, Callable[[list[float]], float]] = {
        "sm_mhz": statistics.median,
        "watts": statistics.median,
        "celsius": max,
        "mib": max,
    }
    return {"samples": len(rows), **{name: how[name](found) if found else None for name, found in columns.items()}}


def attention_kernels(output: str) -> Mapping[str, int]:
    """Count the attention kernels that ONNX Runtime tells of in a process's output.

    >>> attention_kernels("Operator=PackedAttention Node=layer.0 DataType=fp16 SdpaKernel=EFFICIENT_ATTENTION")
    {'PackedAttention fp16 EFFICIENT_ATTENTION': 1}
    """
    return dict(Counter(" ".join(found) for found in DEBUG_LINE.findall(output)))


def _numbers(fields: Iterable[str]) -> list[float]:
    """Read what is a number; "[N/A]" is not."""
    found = []
    for field in fields:
        with contextlib.suppress(ValueError):
            found.append(float(field))
    return found
