"""What is asked for is what runs, or an error says why not; what auto took is told, with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import MODEL_FILES, open_bundle
from cappy_engine.cpu import kernels
from cappy_engine.cpu.built import why_no_library
from cappy_engine.cpu.cores import usable_cores
from cappy_engine.cpu.kernels import VARIABLE, Kernels, find_kernels
from cappy_engine.errors import BundleError, PrecisionUnavailable
from cappy_engine.native.build import LIBRARY, SOURCES
from cappy_engine.native.library import NativeLibrary
from cappy_engine.options import Mode, Precision
from tests.support.bundles import change_manifest, copy_bundle, keep_precisions, with_value
from tests.support.installations import needs_cpu_package
from tests.support.places import TINY_PRECISIONS, parity_pairs

TOLERANCE = 1e-5
FEW = parity_pairs()[::6]


@needs_cpu_package
def test_auto_takes_the_cpu_and_fp32_here_and_says_why(bundle: Path) -> None:
    with Scorer.open(str(bundle)) as opened:
        info = opened.info
    assert (info.bundle, info.device, info.precision) == (str(bundle), "cpu", "fp32")
    assert info.device_reason == "auto: this ONNX Runtime has no CUDA provider"
    assert info.precision_reason == "auto: the first of fp32, int8, fp16 in the bundle"
    assert (info.threads, info.max_batch_tokens, info.max_length) == (usable_cores(), 512, 512)
    assert info.padding == "removed"


@pytest.mark.parametrize("precision", TINY_PRECISIONS)
def test_what_is_asked_for_is_what_runs(bundle: Path, precision: Precision, tmp_path: Path) -> None:
    with Scorer.open(bundle, device="cpu", precision=precision, threads=1, max_batch_tokens=99) as opened:
        info = opened.info
        scores = opened.score(FEW)
    assert (info.device, info.device_reason) == ("cpu", "asked for")
    assert (info.precision, info.precision_reason) == (precision, "asked for")
    assert (info.threads, info.max_batch_tokens) == (1, 99)
    assert info.padding == ("avoided" if precision == "fp16" else "removed")  # fp16's graph computes padding
    copy = copy_bundle(tmp_path / "copy")  # in which no other model can run
    for other in {*TINY_PRECISIONS} - {precision}:
        (copy / MODEL_FILES[other]).write_bytes(b"\0" * (copy / MODEL_FILES[other]).stat().st_size)
    with Scorer.open(copy, device="cpu", precision=precision, threads=1, max_batch_tokens=99) as opened:
        np.testing.assert_array_equal(opened.score(FEW), scores)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_the_bundle_lacks_is_refused(tmp_path: Path, precision: Precision) -> None:
    fp32_bundle = keep_precisions(copy_bundle(tmp_path / "fp32"), "fp32")
    with pytest.raises(PrecisionUnavailable, match=f"has no {precision} model for cpu, only fp32; export it"):
        Scorer.open(fp32_bundle, precision=precision)
    with Scorer.open(fp32_bundle, precision="auto") as opened:
        assert opened.info.precision == "fp32"


@pytest.mark.parametrize("mode", ["latency", "throughput", "both"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_mode_gives_the_same_scores(bundle: Path, mode: Mode, precision: Precision) -> None:
    with (
        Scorer.open(bundle, device="cpu", precision=precision, threads=1) as one,
        Scorer.open(bundle, device="cpu", precision=precision, threads=2, mode=mode) as opened,
    ):
        assert (opened.info.mode, opened.info.mode_reason) == (mode, "asked for")
        np.testing.assert_allclose(opened.score(FEW), one.score(FEW), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux to count threads")
def test_sessions_have_the_threads_that_their_mode_says(bundle: Path) -> None:
    """One for each of several batches, or all for one; not counted are those of Python, and the caller's own."""
    code = """
import pathlib, sys, threading
from cappy_engine import Scorer
pairs = [("Is the sky blue?", f"I would say so{' indeed' * count}.") for count in range(80)]
def count():
    return len(list(pathlib.Path("/proc/self/task").iterdir())) - threading.active_count()
with Scorer.open(sys.argv[1], device="cpu", threads=1) as scorer:
    scorer.score(pairs)
    before = count()
    for mode in ("latency", "throughput", "both"):
        with Scorer.open(sys.argv[1], device="cpu", threads=4, mode=mode) as opened:
            opened.score(pairs)
            print(mode, count() - before)
"""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    started = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], check=True, capture_output=True, text=True, env=environment
    )
    assert started.stdout == "latency 3\nthroughput 0\nboth 3\n"


@pytest.mark.slow
def test_every_session_has_the_kernels_that_its_scorer_tells_of() -> None:
    chosen = find_kernels().chosen
    if chosen is None:
        pytest.skip(f"needs the native library: {find_kernels().why_not}")
    native = NativeLibrary(chosen.path)
    for mode, sessions in (("latency", 1), ("throughput", 1), ("both", 2)):
        before = native.registrations
        with Scorer.open(device="cpu", threads=2, mode=cast(Mode, mode)) as opened:
            opened.score(FEW)
            assert opened.info.kernels == find_kernels().told
        assert native.registrations == before + sessions


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it does not exist"):
        Scorer.open(tmp_path / "nowhere")


def test_a_bundle_from_before_the_operators_runs_without_kernels_and_says_so(bundle: Path) -> None:
    with Scorer.open(bundle, device="cpu", precision="int8") as opened:
        assert opened.info.kernels == "none: the model was exported before there were any; export it again"


def test_a_model_without_operators_takes_no_kernels_and_says_so(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "copy")
    change_manifest(copy, with_value({"operators": {}}, "graphs", "fp16"))
    with Scorer.open(copy, device="cpu", precision="fp16") as opened:
        assert opened.info.kernels == "none: the model has none of their operators"


def test_bf16_tells_why_a_better_set_is_not_used_and_that_it_is_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_bundle(tmp_path / "copy")
    change_manifest(copy, with_value({"operators": {"Bf16Linear": 1}}, "graphs", "bf16"))
    problem = "avx512 failed its test: it does"
    for used, told in (("avx2", f"avx2 ({problem}; {kernels.WIDENED})"), ("amx", f"amx ({problem})")):
        monkeypatch.setattr(kernels, "find_kernels", lambda used=used: Kernels(tmp_path / LIBRARY, used, problem))
        assert kernels.choose_kernels(open_bundle(copy), "bf16").told == told


def test_a_library_of_other_sources_is_there_but_not_used_which_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if reason := why_no_library():
        pytest.skip(f"needs the native library: {reason}")
    for name in ("build.json", LIBRARY):
        shutil.copy(SOURCES / name, tmp_path)
    (tmp_path / "changed.cpp").touch()
    assert "sources changed" in kernels._find("auto", tmp_path / LIBRARY).told
    assert "the kernels are there but are not used" in caplog.text


@pytest.mark.slow
def test_kernels_that_are_switched_off_leave_the_functions_which_score_the_same_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """cappy-mini has the operators. In int8 a value between two steps may be rounded to either, so scores differ."""
    found = {}
    for asked in ("none", "auto"):
        monkeypatch.setenv(VARIABLE, asked)
        with caplog.at_level("INFO", "cappy_engine"), Scorer.open(device="cpu") as opened:
            assert opened.info.kernels == find_kernels().told
            assert f"kernels for int8 on the CPU: {find_kernels().told}" in caplog.text
            found[asked] = opened.score(FEW)
    assert (
        "CPU: none: they were switched off by CAPPY_KERNELS=none (int8 takes two to three times as long" in caplog.text
    )
    np.testing.assert_allclose(found["auto"], found["none"], atol=0.05)
