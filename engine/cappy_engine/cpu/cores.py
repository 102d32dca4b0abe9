"""Find out what the machine offers this process: cores, the processor's name and its flags.

All of it is read from Linux's /proc and /sys; a file that is missing or unreadable is as if it were not there. Knows
nothing of accelerators, nor of what other processes take from the same cores.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from cappy_engine.errors import is_callers

TOPOLOGY_FILES = ("physical_package_id", "core_id", "die_id", "cluster_id")
"""What tells one core from another; the first two must be known, the others are absent on older kernels.

Package and core alone are not enough: on ARM, core ids start at 0 in every cluster (parse_cluster in the kernel's
drivers/base/arch_topology.c). SMT siblings agree in all four.
"""


def usable_cores(*, root: Path = Path("/")) -> int:
    """Count the physical cores that this process may use all the time; at least 1.

    These are the cores that it may run on, and no more than the CPU quota of its container, rounded down.

        >>> usable_cores()
        2
    """
    cores = physical_cores(_allowed_cpus(), root=root)
    quota = quota_cores(root=root)
    # Rounded down: threads beyond the quota spend it early in each period, and then all of them stand still.
    return max(1, cores if quota is None else min(cores, int(quota)))


def physical_cores(cpus: Iterable[int], *, root: Path = Path("/")) -> int:
    """Count the distinct cores among `cpus`, as Linux numbers them; a CPU of unknown topology is a core."""
    return len({_core_of(cpu, root) for cpu in cpus})


def quota_cores(*, root: Path = Path("/")) -> float | None:
    """Read the CPU quota of this process, in CPUs; None if there is none.

    It is the tightest one of its cgroups and their ancestors.
    """
    # Lines are "hierarchy:controllers:path" (cgroups(7)). A container's own mount starts at its cgroup: with a cgroup
    # namespace the path is "/", without one it is the host's path, which is not below the mount. Either way the limit
    # lies at the top of the mount, the last "ancestor".
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for mount in _mounts_of(controllers):
            limits += [_limit_of(folder) for folder in _with_ancestors(root / "sys/fs/cgroup" / mount, path)]
    return min((limit for limit in limits if limit is not None), default=None)


def parse_cpu_max(text: str) -> float | None:
    """Read the limit of a `cpu.max`, in CPUs; None if it sets no limit, or was not written by a kernel.

    >>> parse_cpu_max("150000 100000")
    1.5
    """
    # "$MAX $PERIOD", both in microseconds, $MAX is "max" for no limit (kernel docs, admin-guide/cgroup-v2, cpu.max).
    try:
        quota, period = (int(word) for word in text.split())
        return quota / period if quota > 0 and period > 0 else None
    except (ValueError, OverflowError):
        return None


def cpu_name(*, root: Path = Path("/")) -> str:
    """Read the processor's model name from /proc/cpuinfo, else (ARM, macOS) from Python's platform module."""
    return _cpuinfo("model name", root=root) or platform.processor() or platform.machine()


def cpu_flags(*, root: Path = Path("/")) -> frozenset[str]:
    """List the first processor's instruction sets as Linux names them (`avx512_vnni`); empty where unknown."""
    return frozenset(_cpuinfo("flags", "Features", root=root).split())  # x86 says flags, ARM says Features


def _allowed_cpus() -> Iterable[int]:
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError) as error:  # macOS, Windows have no such function; a sandbox may refuse the call
        if is_callers(error):
            raise
        return range(os.cpu_count() or 1)


def _core_of(cpu: int, root: Path) -> tuple[str, ...]:
    folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    ids = tuple(_read(folder / name).strip() for name in TOPOLOGY_FILES)
    # A kernel that does not know says package -1 and core 0, for every CPU (kernel docs, admin-guide/cputopology).
    is_known = all(part and not part.startswith("-") for part in ids[:2])
    return ids if is_known else (f"cpu{cpu}",)


def _mounts_of(controllers: str) -> set[str]:
    """List the folders below /sys/fs/cgroup with CPU limits: v2 names no controllers and is mounted there itself."""
    if not controllers:
        return {"."}
    return {"cpu", controllers} if "cpu" in controllers.split(",") else set()


def _with_ancestors(mount: Path, path: str) -> list[Path]:
    """List the folders from the cgroup `path` up to `mount`, and never one outside it."""
    parts = PurePosixPath(path).parts[1:]
    if ".." in parts:  # the cgroup lies outside the namespace's root (cgroup_namespaces(7)), and cannot be seen
        return [mount]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _limit_of(folder: Path) -> float | None:
    if text := _read(folder / "cpu.max"):
        return parse_cpu_max(text)
    # cgroup v1 has the same two numbers in two files, and -1 for no limit (kernel docs, scheduler/sched-bwc).
    return parse_cpu_max(f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}")


def _cpuinfo(*keys: str, root: Path) -> str:
    """Find the first value in /proc/cpuinfo of any of the keys, or an empty string."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys and value.strip():
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if is_callers(error):
            raise
        return ""
