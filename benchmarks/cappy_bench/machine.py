"""Describes the machine and the code that a figure was measured with.

    python -m cappy_bench.machine

prints the kind of this machine's processor: results of different kinds have files of their own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cappy_engine.cpu.cores import cpu_flags, cpu_name
from cappy_engine.cpu.processor import INSTRUCTION_SETS

NUMBERS = {
    "cpu_family": ("cpu family", "CPU implementer"),
    "cpu_model": ("model", "CPU part"),
    "cpu_stepping": ("stepping", "CPU revision"),
}
"""How Linux calls them on x86, and on ARM."""
CODE = (".py", ".mjs", ".so")
CODE_PLACES = tuple(
    f":(top){place}" for place in ("engine", "export", "benchmarks/cappy_bench", "pyproject.toml", "constraints.txt")
)
"""What a figure depends on, as git names it: a report that was written since makes no code another."""


def describe_machine() -> dict[str, Any]:
    """Describe the processor, its cores and telling instruction sets, memory and system.

    >>> describe_machine()["cores"]
    2
    """
    return {
        "cpu": cpu_name(),
        **processor_numbers(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": sorted(cpu_flags() & set(INSTRUCTION_SETS)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def processor_numbers(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Read what tells the first processor from others of its name; empty where Linux does not say.

    Virtual machines give processors of several generations one name.

    >>> processor_numbers()
    {'cpu_family': '25', 'cpu_model': '17', 'cpu_stepping': '1'}
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    told = {key.strip(): value.strip() for key, _, value in lines}
    found = {name: [told[key] for key in keys if key in told] for name, keys in NUMBERS.items()}
    return {name: values[0] for name, values in found.items() if values}


def cpu_kind(machine: Mapping[str, Any]) -> str:
    """Name the kind of a machine's processor: its name, and the best of its instruction sets for matrix products.

    Virtual machines of one name may differ in these.

    >>> cpu_kind({"cpu": "Intel(R) Xeon(R) Processor @ 2.50GHz", "instruction_sets": ["avx2", "avx512_vnni"]})
    'Intel Xeon Processor @ 2.50GHz, AVX-512 VNNI'
    """
    name = re.sub(r"\((R|TM)\)", "", machine["cpu"], flags=re.IGNORECASE)
    best = [text for flag, text in INSTRUCTION_SETS.items() if flag in machine["instruction_sets"]][-1:]
    return ", ".join([name, *best])


def file_word(kind: str) -> str:
    """Write the kind of a processor as a part of a file's name.

    >>> file_word("Intel Xeon Processor @ 2.50GHz, AVX-512 VNNI")
    'intel-xeon-2.50ghz-avx-512-vnni'
    """
    words = re.findall(r"[a-z0-9.]+", kind.lower())
    return "-".join(word for word in words if word not in ("cpu", "processor")) or "unknown"


def current_commit() -> str | None:
    """Name the commit of this code, with "-dirty" where code was changed since; None where it is not in a checkout.

    Read it before anything is measured: it may be another one at the end.

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
    commit = done.stdout.strip()
    changed = [git, "--no-optional-locks", "status", "--porcelain", "--", *CODE_PLACES]
    done = subprocess.run(changed, cwd=here.parent, capture_output=True, text=True, check=False)  # noqa: S603
    return f"{commit}-dirty" if done.stdout.strip() else commit


def code_digest(packages: Sequence[Path]) -> str:
    """Tell code from other code: the files of `packages`, and the versions of all that is installed beside them.

    A commit is not enough: code is also measured before it is committed.

    >>> code_digest([Path("engine/cappy_engine")])[:8]
    '5f0c2f11'
    """
    digest = hashlib.sha256(repr(sorted((one.name, one.version) for one in metadata.distributions())).encode())
    for package in packages:
        for path in sorted(path for ending in CODE for path in package.rglob(f"*{ending}")):
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(file_word(cpu_kind(describe_machine())))
