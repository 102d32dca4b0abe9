"""What the machine offers, read from trees that look like the /proc and /sys of machines and containers."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.cpu.cores import cpu_flags, cpu_name, parse_cpu_max, physical_cores, quota_cores, usable_cores

microseconds = st.integers(1, 10**9)

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni
vmx flags\t: vnmi ept

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd40\n"


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


def write_cpus(root: Path, cores: Iterable[tuple[int, ...]]) -> None:
    """One CPU for every (package, core), (package, core, die) or (package, core, die, cluster)."""
    for cpu, ids in enumerate(cores):
        names = ("physical_package_id", "core_id", "die_id", "cluster_id")
        for name, value in zip(names, ids, strict=False):
            write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/{name}", f"{value}\n")


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The CPUs that the process may run on: fill it."""
    cpus: set[int] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus, raising=False)
    return cpus


@given(quota=microseconds, period=microseconds)
def test_a_quota_is_max_divided_by_period(quota: int, period: int) -> None:
    assert parse_cpu_max(f"{quota} {period}\n") == quota / period


@given(period=microseconds, no_limit=st.sampled_from(["max", "-1", "0"]))
def test_max_is_no_limit_nor_is_what_is_not_positive(period: int, no_limit: str) -> None:
    assert parse_cpu_max(f"{no_limit} {period}\n") is None
    assert parse_cpu_max(f"{period} {no_limit}\n") is None


@given(text=st.text() | st.lists(st.integers()).map(lambda numbers: " ".join(map(str, numbers))))
def test_any_text_is_a_limit_or_none(text: str) -> None:
    limit = parse_cpu_max(text)
    assert limit is None or limit > 0


@pytest.mark.parametrize("text", ["", "max", "100000", "1 2 3", "1.5 1", f"{10**400} 1", f"{'9' * 5000} 1"])
def test_what_no_kernel_writes_is_no_limit(text: str) -> None:
    assert parse_cpu_max(text) is None


def test_a_path_of_the_host_leads_to_the_top_of_the_mount(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/system.slice/docker-4f1c.scope\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000\n")
    assert quota_cores(root=tmp_path) == 2


@pytest.mark.parametrize("tightest", ["a", "a/b", "a/b/c"])
def test_the_tightest_limit_of_the_cgroup_and_its_ancestors_counts(tmp_path: Path, tightest: str) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b/c\n")
    for folder in ("a", "a/b", "a/b/c"):
        write(tmp_path, f"sys/fs/cgroup/{folder}/cpu.max", f"{300000 if folder == tightest else 800000} 100000\n")
    assert quota_cores(root=tmp_path) == 3


def test_limits_of_other_cgroups_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a\n")
    write(tmp_path, "sys/fs/cgroup/a/cpu.max", "max 100000\n")
    for folder in ("a/child", "sibling"):
        write(tmp_path, f"sys/fs/cgroup/{folder}/cpu.max", "100000 100000\n")
    assert quota_cores(root=tmp_path) is None


def test_nothing_outside_the_mount_is_read(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/../outside\n")
    write(tmp_path, "sys/fs/outside/cpu.max", "100000 100000\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "400000 100000\n")
    assert quota_cores(root=tmp_path) == 4


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
@pytest.mark.parametrize("folder", ["", "docker/4f1c/"])
def test_version_1_has_its_limit_in_two_files(tmp_path: Path, controllers: str, folder: str) -> None:
    write(tmp_path, "proc/self/cgroup", f"11:cpuset:/\n4:{controllers}:/docker/4f1c\n0::/\n")
    write(tmp_path, f"sys/fs/cgroup/{controllers}/{folder}cpu.cfs_quota_us", "250000\n")
    write(tmp_path, f"sys/fs/cgroup/{controllers}/{folder}cpu.cfs_period_us", "100000\n")
    assert quota_cores(root=tmp_path) == 2.5


def test_minus_one_is_no_limit_in_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:cpu,cpuacct:/\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert quota_cores(root=tmp_path) is None


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "0:\n", "3:memory:/a\n"])
def test_a_list_of_cgroups_without_ours_sets_no_limit(tmp_path: Path, text: str) -> None:
    write(tmp_path, "proc/self/cgroup", text)
    write(tmp_path, "sys/fs/cgroup/memory/a/cpu.max", "100000 100000\n")
    assert quota_cores(root=tmp_path) is None


def test_smt_siblings_count_once(tmp_path: Path) -> None:
    write_cpus(tmp_path, [(0, 0), (0, 1), (1, 0), (1, 1)] * 2)
    assert physical_cores(range(8), root=tmp_path) == 4
    assert physical_cores([0, 4], root=tmp_path) == 1
    assert physical_cores([0, 2], root=tmp_path) == 2


def test_core_ids_may_repeat_in_dies_and_clusters(tmp_path: Path) -> None:
    write_cpus(tmp_path, [(0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 1)])
    assert physical_cores(range(4), root=tmp_path) == 3


@pytest.mark.parametrize("ids", [(-1, 0), (0, -1), (0,), ()])
def test_a_cpu_of_unknown_topology_is_a_core(tmp_path: Path, ids: tuple[int, ...]) -> None:
    write_cpus(tmp_path, [ids] * 3)
    assert physical_cores(range(3), root=tmp_path) == 3


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("50000 100000", 1), ("150000 100000", 1), ("299999 100000", 2), ("900000 100000", 4), ("max 100000", 4)],
)
def test_usable_cores_are_the_quota_rounded_down_but_no_more_than_there_are(
    tmp_path: Path, allowed: set[int], cpu_max: str, cores: int
) -> None:
    allowed.update(range(8))
    write_cpus(tmp_path, [(0, core) for core in range(4)] * 2)
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", cpu_max)
    assert usable_cores(root=tmp_path) == cores


def test_only_cores_that_the_process_may_run_on_are_usable(tmp_path: Path, allowed: set[int]) -> None:
    allowed.update({1, 3, 5})
    write_cpus(tmp_path, [(0, core) for core in range(4)] * 2)
    assert usable_cores(root=tmp_path) == 2


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_without_affinity_every_cpu_is_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert usable_cores(root=tmp_path) == cores


def test_this_machine_has_a_name_and_a_core() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert cpu_name() or not (platform.processor() or platform.machine())


def test_the_first_processor_gives_name_and_flags(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", X86)
    assert cpu_name(root=tmp_path) == "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz"
    assert cpu_flags(root=tmp_path) == {"fpu", "sse2", "avx2", "avx512f", "avx512_vnni"}


def test_arm_has_features_and_no_model_name(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", ARM)
    assert cpu_name(root=tmp_path) == (platform.processor() or platform.machine())
    assert cpu_flags(root=tmp_path) == {"fp", "asimd", "asimddp", "i8mm"}


@pytest.mark.parametrize(("processor", "name"), [("arm", "arm"), ("", "arm64")])
def test_without_cpuinfo_the_platform_names_the_processor_and_flags_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: str, name: str
) -> None:
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert cpu_name(root=tmp_path) == name
    assert cpu_flags(root=tmp_path) == frozenset()


def test_an_unreadable_file_is_as_if_it_were_not_there(tmp_path: Path, allowed: set[int]) -> None:
    allowed.update({0, 1})
    for path in ("proc/cpuinfo", "proc/self/cgroup", "sys/devices/system/cpu/cpu0/topology/core_id"):
        (tmp_path / path).mkdir(parents=True)  # reading a folder is an OSError, for root too
    assert usable_cores(root=tmp_path) == 2
    assert cpu_flags(root=tmp_path) == frozenset()
