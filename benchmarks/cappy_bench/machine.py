"""Describes the machine and the code that a figure was measured with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cappy_engine.cpu.cores import cpu_flags, cpu_name

TELLING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""Instruction sets that decide how fast a matrix product is, by Linux's names."""


def describe_machine() -> dict[str, Any]:
    """Describe the processor, its cores and telling instruction sets, memory and system.

    >>> describe_machine()["cores"]
    2
    """
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": sorted(cpu_flags() & set(TELLING)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def current_commit() -> str | None:
    """Name the commit of this code; None where it is not in a checkout.

    >>> current_commit()
    'd113d07b3505'
    """
    git, here = shutil.which("git"), Path(__file__)
    if git is None:
        return None
    # An installed copy may lie inside of somebody's repository, which then does not track it.
    for arguments in (("ls-files", "--error-unmatch", here.name), ("rev-parse", "--short=12", "HEAD")):
        done = subprocess.run([git, *arguments], cwd=here.parent, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            return None
    return done.stdout.strip()
