"""What machine this is: what a figure means nothing without."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

TELLING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""Instruction sets that decide how fast a matrix product is, by Linux's names."""


def describe_machine() -> dict[str, Any]:
    """The processor, its cores and telling instruction sets, memory and system."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": sorted(instruction_sets() & set(TELLING)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def instruction_sets() -> set[str]:
    """The processor's instruction sets by Linux's names; empty where the system does not tell."""
    return set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def available_bytes() -> int:
    """Memory that processes can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not tell MemAvailable")


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
