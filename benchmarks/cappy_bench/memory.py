"""Reads how much memory there is, and how much this process takes.

That is on Linux; other systems tell less.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, ROLLUP = Path("/proc/self/status"), Path("/proc/self/smaps_rollup")
MEMORY = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Read how much memory processes can still take; None where the system does not tell.

    >>> available_bytes()
    8201437184
    """
    return _read(MEMORY, "MemAvailable")


def forget_peak() -> None:
    """Start a new peak of resident memory, where the system can.

    >>> forget_peak()
    """
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def peak_bytes() -> int:
    """Read the most memory that was resident since `forget_peak`.

    Elsewhere than on Linux it is the most since the process began.

    >>> peak_bytes()
    31457280
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _read(STATUS, "VmHWM") or peak


def peak_bytes_of(process: int) -> int:
    """Read the most memory that another process held; 0 where the system does not tell, or the process has ended.

    >>> peak_bytes_of(os.getpid())
    31457280
    """
    try:
        return _read(Path(f"/proc/{process}/status"), "VmHWM") or 0
    except OSError:
        return 0


def resident_bytes() -> int:
    """Read the memory that this process holds now; elsewhere than on Linux, its peak.

    >>> resident_bytes()
    29360128
    """
    return _read(STATUS, "VmRSS") or peak_bytes()


def shared_bytes() -> int:
    """Read the memory that this process holds now. Each page counts once, and a shared page in part.

    `resident_bytes` counts a page as often as it is mapped: weights twice, where two sessions map their file.
    Elsewhere than on Linux it is the same as `resident_bytes`.

    >>> shared_bytes()
    27262976
    """
    return _read(ROLLUP, "Pss") or resident_bytes()


def _read(path: Path, name: str) -> int | None:
    """The bytes of a line such as `VmHWM:  123 kB`."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
