"""`cappy doctor` tells what the processor offers, and of GPUs only where somebody wants one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cappy_engine.cli import machine
from cappy_engine.cli.main import main
from cappy_engine.cli.text import describe_kernels
from cappy_engine.cpu.kernels import Kernels, find_kernels
from cappy_engine.cpu.processor import Processor, describe_processor, read_processor
from cappy_engine.gpu.installation import Gpu, Installation
from cappy_engine.native.build import Built
from cappy_engine.session import load_runtime

XEON = Processor("Xeon", cores=2, cpus=8, quota=2.5, flags=frozenset({"avx2", "avx512f", "avx512_vnni", "fpu"}))
BARE = Installation(
    runtime_packages={"onnxruntime": "1.32.0"},
    providers=("CPUExecutionProvider",),
    driver=None,
    driver_problem="libcuda.so.1: cannot open",
    gpus=(),
    missing_libraries={},
    onnxruntime="1.32.0",
    needed_libraries={},
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Installation]:
    """What the doctor finds installed: BARE, or what a test puts in its place."""
    found = {"here": BARE}
    monkeypatch.setattr(machine, "inspect_installation", lambda **asked: found["here"])
    return found


def test_a_processor_is_described_with_what_its_instructions_are_good_for() -> None:
    lines = describe_processor(XEON).splitlines()
    assert lines[0].split(maxsplit=1) == ["CPU", "Xeon"]
    assert lines[1].split(maxsplit=1) == ["cores", "2 usable of 8 CPUs, limited to 2.5 CPUs by its container"]
    assert lines[2].split(maxsplit=1) == ["instructions", "AVX2, AVX-512, AVX-512 VNNI"]
    assert "int8 (with kernels 2.8 to 4.0 times as fast as fp32" in lines[3]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [({"avx2"}, "1.3 to 2.0 times as fast as fp32 on 2 cores without VNNI"), (set(), "compare int8 with fp32")],
)
def test_without_8_bit_products_int8_is_praised_as_far_as_it_was_measured(flags: set[str], advice: str) -> None:
    text = describe_processor(dataclasses.replace(XEON, flags=frozenset(flags), quota=None))
    assert advice in text
    assert "VNNI," not in text
    assert "container" not in text


@pytest.mark.parametrize(
    ("name", "flags", "is_told"),
    [
        ("Intel(R) Xeon(R) Processor", {"hypervisor", "avx512_fp16"}, True),
        ("Intel(R) Xeon(R) Processor", {"hypervisor", "avx512_fp16", "amx_int8"}, False),
        ("Intel(R) Xeon(R) Processor", {"hypervisor"}, False),
        ("Intel(R) Xeon(R) Processor", {"avx512_fp16"}, False),
        ("AMD EPYC", {"hypervisor", "avx512_fp16"}, False),
    ],
)
def test_amx_that_a_virtual_machine_hides_is_told(name: str, flags: set[str], is_told: bool) -> None:
    text = describe_processor(dataclasses.replace(XEON, name=name, flags=XEON.flags | flags))
    assert ("AMX           hidden by this virtual machine" in text) == is_told


def test_the_processor_of_this_machine_has_cores() -> None:
    found = read_processor()
    assert 1 <= found.cores <= found.cpus


def test_the_doctor_is_short_about_gpus_that_nobody_asked_for(
    installed: dict[str, Installation], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert read_processor().name in out
    assert "ONNX Runtime  onnxruntime 1.32.0" in out
    assert "libcuda" not in out
    assert "MISSING" not in out
    assert out.splitlines()[-1].startswith("GPU           none was asked for")


@pytest.mark.parametrize(
    ("kernels", "shown"),
    [
        (Kernels(Path("library.so"), "avx512", ""), ["avx512; compiled by zig 0.17.1"]),
        (
            Kernels(Path("library.so"), "avx2", "avx512 failed its test: Linear differs from numpy"),
            ["avx2 (avx512 failed its test: Linear differs from numpy); compiled by zig 0.17.1"],
        ),
        (
            Kernels(None, "", "ziglang is not installed"),
            [
                "none: ziglang is not installed",
                "int8 takes two to three times as long without them; docs/deployment.md, Kernels, says how to get them",
            ],
        ),
    ],
)
def test_the_doctor_tells_of_kernels_or_why_there_are_none_and_what_that_costs(
    kernels: Kernels, shown: list[str]
) -> None:
    lines = describe_kernels(kernels, Built("x86_64", "", compiler="zig 0.17.1")).splitlines()
    assert lines[0].startswith("kernels ")
    assert [line.removeprefix("kernels").strip() for line in lines] == shown


def test_the_kernels_of_this_machine_are_really_looked_at(
    installed: dict[str, Installation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    assert f"\nkernels       {find_kernels().told}" in capsys.readouterr().out
    monkeypatch.setenv("CAPPY_KERNELS", "none")
    assert main(["doctor"]) == 0
    assert "\nkernels       none: they were switched off by CAPPY_KERNELS=none\n" in capsys.readouterr().out
    monkeypatch.setenv("CAPPY_KERNELS", "avx1024")
    assert main(["doctor"]) == 0
    assert "avx1024" in capsys.readouterr().out


def test_a_gpu_that_is_there_is_named(installed: dict[str, Installation], capsys: pytest.CaptureFixture[str]) -> None:
    gpu = Gpu(name="NVIDIA H100", compute_capability="9.0", memory_bytes=2**36)
    installed["here"] = dataclasses.replace(BARE, driver="13.0", gpus=(gpu,))
    assert main(["doctor"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("GPU           NVIDIA H100; 'cappy doctor --device cuda'")


@pytest.mark.parametrize(("device", "status"), [("cpu", 0), ("cuda", 1), ("tensorrt", 1)])
def test_a_device_that_is_asked_for_gives_all_and_an_exit_status(
    device: str, status: int, installed: dict[str, Installation], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--device", device]) == status
    out = capsys.readouterr().out
    assert "MISSING  driver    libcuda.so.1: cannot open" in out
    assert "auto takes cpu: " in out.splitlines()[-1]


def test_onnxruntime_gpu_is_as_good_as_asking(
    installed: dict[str, Installation], capsys: pytest.CaptureFixture[str]
) -> None:
    installed["here"] = dataclasses.replace(BARE, runtime_packages={"onnxruntime-gpu": "1.32.0"})
    assert main(["doctor"]) == 0
    assert "MISSING  driver" in capsys.readouterr().out


def test_a_missing_onnx_runtime_is_the_finding(
    installed: dict[str, Installation], capsys: pytest.CaptureFixture[str]
) -> None:
    installed["here"] = dataclasses.replace(BARE, runtime_packages={}, providers=(), onnxruntime=None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "MISSING       package: ONNX Runtime is not installed" in out
    assert "fix: " in out


def test_the_runtime_of_this_machine_is_really_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert load_runtime().__version__ in capsys.readouterr().out
