"""Watches a process from outside, by Linux's /proc: its memory, descriptors and CPU time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Sample:
    """The state of a process at a time (`time.perf_counter`); `cpu_seconds` since its start, of all its threads."""

    at: float
    resident_bytes: int
    descriptors: int
    cpu_seconds: float


def sample(pid: int) -> Sample | None:
    """Read the state of a process; None once it has ended, and where there is no /proc.

    >>> sample(os.getpid()).descriptors
    4
    """
    folder = PROC / str(pid)
    try:
        resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        # The name in brackets may hold anything, so the fields are counted from its end: 14 and 15 of proc(5).
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":  # it has ended, and its parent has not asked for its status yet
            return None
        ticks = int(fields[11]) + int(fields[12])
        descriptors = sum(1 for _ in (folder / "fd").iterdir())
        return Sample(time.perf_counter(), resident, descriptors, ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return None


async def watch(pid: int, samples: list[Sample], *, every_seconds: float) -> None:
    """Add samples to `samples` until the task is cancelled or the process has ended.

    >>> task = asyncio.create_task(watch(os.getpid(), [], every_seconds=1.0))
    """
    while (found := sample(pid)) is not None:
        samples.append(found)
        await asyncio.sleep(every_seconds)


def slope(samples: Sequence[Sample], *, warm_up: float = 0.25) -> float | None:
    """Fit a line through the resident memory: bytes a minute, by least squares, without the first part of the time.

    None if fewer than three samples are left.

        >>> slope([Sample(second, 10**8 + second * 100, 4, 0.0) for second in range(60)])
        6000.0
    """
    if not samples:
        return None
    begin = samples[0].at + warm_up * (samples[-1].at - samples[0].at)
    kept = [one for one in samples if one.at >= begin]
    if len(kept) < 3:
        return None
    times = np.array([one.at for one in kept]) - begin
    return float(np.polyfit(times / 60, [one.resident_bytes for one in kept], 1)[0])


def describe_samples(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Say how memory, descriptors and CPU time went; None without samples.

    >>> describe_samples([sample(os.getpid())])["descriptors"]
    {'first': 4, 'last': 4, 'most': 4}
    """
    if not samples:
        return None
    memory, descriptors = [one.resident_bytes for one in samples], [one.descriptors for one in samples]
    per_minute = slope(samples)
    return {
        "samples": len(samples),
        "seconds": round(samples[-1].at - samples[0].at, 1),
        "resident_bytes": {"first": memory[0], "last": memory[-1], "most": max(memory)},
        "resident_bytes_per_minute": None if per_minute is None else round(per_minute),
        "descriptors": {"first": descriptors[0], "last": descriptors[-1], "most": max(descriptors)},
        "cpu_seconds": round(samples[-1].cpu_seconds - samples[0].cpu_seconds, 2),
    }
