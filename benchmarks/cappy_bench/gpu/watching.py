"""Watches a GPU through nvidia-smi while something runs.

Also reads which attention kernels ONNX Runtime took. Without nvidia-smi the result is empty; that is not an error. No
setting of a GPU is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

STATE: Mapping[str, tuple[str, Callable[[list[float]], float]]] = {
    "sm_mhz": ("clocks.sm", statistics.median),
    "watts": ("power.draw", statistics.median),
    "celsius": ("temperature.gpu", max),
    "mib": ("memory.used", max),
}
"""What is sampled: our names, nvidia-smi's, and what sums the samples up."""
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


def first_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """Ask the driver where CUDA's first GPU is; nvidia-smi numbers GPUs otherwise, and hides none.

    >>> first_gpu()
    '0000:3B:00.0'
    """
    device, place = ctypes.c_int(), ctypes.create_string_buffer(32)
    try:
        cuda = load("libcuda.so.1")
        refused = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
        refused = refused or cuda.cuDeviceGetPCIBusId(place, len(place), device)
    except (OSError, AttributeError):  # no driver, or one without these functions
        return None
    return None if refused else place.value.decode()


@contextlib.contextmanager
def watched(gpu: str | None) -> Iterator[dict[str, Any]]:
    """Sample a GPU while the block runs; what was seen is in the dict behind it, empty if nothing was.

    >>> with watched(first_gpu()) as seen:
    ...     run()
    >>> seen
    {'samples': 12, 'sm_mhz': 1980.0, 'watts': 412.5, 'celsius': 61.0, 'mib': 9421.0}
    """
    seen: dict[str, Any] = {}
    tool = shutil.which("nvidia-smi")
    if tool is None or gpu is None:
        yield seen
        return
    query = ",".join(theirs for theirs, _ in STATE.values())
    command = [tool, f"--id={gpu}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    command.append(f"--loop-ms={MILLISECONDS}")
    with tempfile.TemporaryFile("w+") as file:
        sampler = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)  # noqa: S603
        try:
            yield seen
        finally:
            sampler.terminate()
            sampler.wait()
            file.seek(0)
            seen |= _summarise(file.read())


def _summarise(samples: str) -> dict[str, Any]:
    """Summarise nvidia-smi's lines: medians of clock and power, the highest temperature and memory."""
    rows = [fields for line in samples.splitlines() if len(fields := line.split(",")) == len(STATE)]
    if not rows:
        return {}
    columns = {name: _numbers(row[place] for row in rows) for place, name in enumerate(STATE)}
    return {"samples": len(rows), **{name: STATE[name][1](found) if found else None for name, found in columns.items()}}


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
