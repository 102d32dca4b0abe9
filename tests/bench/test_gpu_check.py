"""The day of the GPU, rehearsed without one: the whole command runs on a machine where the CPU stands in for it."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_bench.gpu.check import GROUPS, NOT_ASKED, NOT_EXPORTED, main
from cappy_engine.bundle import EMBEDDED, MODEL_FILES
from cappy_export.proof.reference import Reference
from tests.support.bundles import copy_bundle, read_manifest, write_manifest
from tests.support.gpu_checks import NO_GPU, CacheByName, CacheOfHalf, FakeMachine, Ran
from tests.support.installations import NO_DRIVER, changed
from tests.support.places import MINI

pytestmark = pytest.mark.slow

NO_TENSORRT = changed(missing_libraries={"libonnxruntime_providers_tensorrt.so": ("libnvinfer.so.10",)})


def test_where_all_is_well_every_step_is_ok_and_every_figure_is_there(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check()
    assert {step["name"]: (step["status"], step["reason"]) for step in ran.document["steps"]} == {
        step["name"]: ("ok", None) for step in ran.document["steps"]
    }
    assert ran.status == 0
    assert ran.document["is_complete"]
    assert {step["name"].partition("/")[0] for step in ran.document["steps"]} == {"preflight", *GROUPS}
    for step in ran.document["steps"]:
        if step["name"].startswith("parity/") and step["name"] not in ("parity/reference", "parity/tensorrt/int8"):
            assert step["figures"]["max_error"] < 5e-3
            assert (step["figures"]["limits"] is None) == ("pytorch" in step["name"])
        for cell in (step["figures"] or {}).get("cells", ()):
            assert min(cell["pairs_per_second"], cell["tokens_per_second"], cell["tflops"]) > 0
    cells = [cell for length in (64, 512) for cell in ran.step(f"throughput/cuda/{length}")["figures"]["cells"]]
    shapes = {(cell["length"], cell["rows"]) for cell in cells}
    assert shapes == {(64, 1), (64, 8), (512, 1)}
    assert ran.step("open/tensorrt/fp16/first")["figures"]["engines_built"] == 4
    assert ran.step("open/tensorrt/fp16/again")["figures"]["engines_built"] == 0
    assert ran.step("attention/kernels")["attention"] == {"PackedMultiHeadAttention fp16 FLASH_ATTENTION": 1}
    assert ran.step("attention/speed")["figures"]["difference"] < 1e-2
    assert [cell["batch"] for cell in ran.step("questions/cuda-fp16")["figures"]["sizes"]] == [8, 16, 32]
    assert "Pairs/s (TFLOP/s), medians:" in ran.printed
    assert "pytorch bf16, here, batches of" in ran.printed
    assert "in the lengths assumed for Natural Questions\n" in ran.printed
    assert "What is missing" not in ran.printed


def test_scores_that_the_canary_does_not_show_fail_the_parity_with_their_error(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["parity"], error=0.25)
    step = ran.step("parity/cuda/fp32")
    assert step["status"] == "failed"
    assert step["figures"]["max_error"] == pytest.approx(0.25, abs=1e-3)
    assert "max error 0.25 is above 0.0001" in step["reason"]
    assert step["reason"] in ran.printed
    assert ran.step("throughput/cuda/64") == {
        "name": "throughput/cuda/64", "status": "skipped", "seconds": None, "reason": NOT_ASKED, "figures": None
    }  # fmt: skip
    assert ran.status == 1


def test_drills_alone_end_in_their_errors(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["drill"])
    assert ran.status == 0, ran.printed
    errors = {
        step["name"]: (step["figures"] or {}).get("error")
        for step in ran.document["steps"]
        if step["name"].startswith("drill/")
    }
    assert errors == {
        "drill/model-byte": "BundleError",
        "drill/wrong-canary": "DeviceUnavailable",
        "drill/hidden-gpu": "DeviceUnavailable",
        "drill/tf32-not-switched-off": "DeviceUnavailable",
        "drill/unknown-shape": "ScoringError",
        "drill/engine-byte": None,
        "drill/swapped-weights": "DeviceUnavailable",
    }
    again = gpu_check("--keep-engines", "--force", only=["drill"])  # beside engines of an earlier check
    assert again.status == 0, again.printed


def test_a_machine_that_refuses_nothing_fails_its_drills(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["drill"], is_careless=True)
    drills = [step for step in ran.document["steps"] if step["name"].startswith("drill/")]
    assert {step["status"] for step in drills} == {"failed"}
    assert "and nothing was raised" in ran.step("drill/hidden-gpu")["reason"]
    assert ran.status == 1


def test_engines_that_are_found_by_name_fail_their_drills(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["drill"], cache=CacheByName)
    assert ran.step("drill/swapped-weights")["status"] == "failed"
    assert "nothing was raised" in ran.step("drill/swapped-weights")["reason"]
    assert ran.step("drill/engine-byte")["status"] == "failed"
    assert ran.step("drill/wrong-canary")["status"] == "ok"


def test_a_step_that_crashes_stops_no_other(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["profile"], crashes_at="profile/cuda-fp16")
    crashed = ran.step("profile/cuda-fp16")
    assert crashed["status"] == "failed"
    assert crashed["reason"] == "its process ended with status -11: first line | illegal memory access"
    assert crashed["figures"] is None
    assert ran.step("profile/pytorch-fp16")["status"] == "ok"
    assert ran.status == 1


def test_without_a_gpu_all_is_skipped_with_the_reason_and_nothing_was_measured(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(installation=NO_GPU)
    preflight, *others = ran.document["steps"]
    assert preflight["status"] == "failed"
    assert {step["status"] for step in others} == {"skipped"}
    assert {step["reason"] for step in others} == {preflight["reason"]}
    assert NO_DRIVER in preflight["reason"]
    assert {(step["seconds"], step["figures"]) for step in others} == {(None, None)}
    assert "What is missing:" in ran.printed
    assert "fix: install the NVIDIA driver" in ran.printed
    assert "Pairs/s" not in ran.printed
    assert ran.status == 1


def test_without_tensorrt_what_needs_only_cuda_runs(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["open"], installation=NO_TENSORRT)
    assert ran.step("open/cuda/fp16")["status"] == "ok"
    assert ran.step("open/tensorrt/fp16/first")["status"] == "skipped"
    assert "libnvinfer.so.10" in ran.step("open/tensorrt/fp16/first")["reason"]
    assert ran.status == 1


def test_a_bundle_without_tensorrts_models_is_not_asked_for_them(
    gpu_check: Callable[..., Ran], gpu_bundle: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tmp_path / "cuda-only", source=gpu_bundle)
    document = read_manifest(bundle)
    del document["targets"]["tensorrt"]
    write_manifest(bundle, document)
    ran = gpu_check("--bundle", str(bundle), only=["open"], installation=NO_TENSORRT)
    assert ran.step("open/cuda/fp16")["status"] == "ok"
    assert ran.step("open/tensorrt/fp16/first")["reason"] == NOT_EXPORTED
    assert ran.status == 0


def test_when_the_time_is_used_up_the_rest_is_skipped_and_says_so(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check("--max-seconds", "0", only=["drill"])
    assert ran.step("drill/model-byte")["reason"] == "the time was used up (--max-seconds)"
    assert ran.status == 1


def test_engines_that_were_kept_are_no_first_opening(gpu_check: Callable[..., Ran], tmp_path: Path) -> None:
    assert gpu_check(only=["open"]).step("open/tensorrt/fp16/first")["figures"]["opened_seconds"] > 0
    manifests = sorted(tmp_path.glob("work/cache/engines/*/manifest.json"))
    of_fp16 = [path.parent for path in manifests if json.loads(path.read_text())["facts"]["precision"] == "fp16"]
    for lost in (0, 1):
        for folder in of_fp16[:lost]:
            shutil.rmtree(folder)
        kept = gpu_check("--keep-engines", "--force", only=["open"]).step("open/tensorrt/fp16/first")
        note = f"not measured: {4 - lost} of 4 engines were there already"
        expected = {"opened_seconds": None, "engines_built": lost, "note": note}
        assert (kept["status"], kept["figures"]) == ("ok", expected)


def test_engines_that_are_not_kept_fail_their_openings_whatever_others_are_there(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["open"], cache=CacheOfHalf)
    for step in ran.document["steps"]:
        if step["name"].startswith("open/tensorrt/"):
            is_kept = "/fp16/" in step["name"]
            reason = None if is_kept else "0 of 4 engines were kept, so every start builds the others"
            assert (step["status"], step["reason"]) == ("ok" if is_kept else "failed", reason)


def test_the_command_on_a_machine_without_a_gpu_names_the_driver(tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("needs a machine without a CUDA driver")
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "cappy_bench.gpu.check", "--checkpoint", str(MINI), "--bundle", str(EMBEDDED)]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work"), "--out", str(out)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == document
    assert document["steps"][0]["status"] == "failed"
    assert {step["status"] for step in document["steps"][1:]} == {"skipped"}
    assert "driver: libcuda.so.1" in done.stdout
    assert "fix: install the NVIDIA driver" in done.stdout


def test_two_checks_share_no_folder_of_work(
    checkpoint: Path, gpu_bundle: Path, gpu_reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machine = FakeMachine(gpu_reference, gpu_bundle / MODEL_FILES["fp16"], installation=NO_GPU).machine
    for out in ("first.json", "second.json"):
        main(["--checkpoint", str(checkpoint), "--bundle", str(gpu_bundle), "--out", out], machine=machine)
    assert {path.name for path in tmp_path.iterdir()} == {"first.json", "first-work", "second.json", "second-work"}


def test_a_profile_says_what_ran_and_fails_where_nothing_was_seen(gpu_check: Callable[..., Ran]) -> None:
    ran = gpu_check(only=["profile"])
    assert ran.step("profile/cuda-fp16")["reason"] is None
    figures = ran.step("profile/cuda-fp16")["figures"]["shapes"][0]
    assert figures["by_kind"] == pytest.approx({"matrix products": 3e-6, "attention": 1e-6})
    assert figures["busy_seconds"] == pytest.approx(4e-6)
    blind = gpu_check("--force", only=["profile"], has_profiler=False)
    assert "the profiler saw no kernel" in blind.step("profile/cuda-fp16")["reason"]
