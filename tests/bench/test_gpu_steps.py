"""The GPU check's decisions and figures, one by one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cappy_bench.gpu.check import GROUPS, NOT_ASKED, all_steps, exit_status, why_not, why_unusable
from cappy_bench.gpu.drills import expect
from cappy_bench.gpu.host import TorchSession, load_torch
from cappy_bench.gpu.plan import CheckFailed
from cappy_bench.gpu.questions import time_doubling
from cappy_bench.gpu.results import make_cell, summary
from cappy_bench.gpu.throughput import score_in_rows, time_in_turns
from cappy_bench.gpu.watching import FACTS, attention_kernels, first_gpu, gpu_facts, watched
from cappy_bench.peers.pytorch import runs
from cappy_engine import Scorer
from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.cpu.kernels import find_kernels
from cappy_engine.errors import DeviceUnavailable, ScoringError
from cappy_engine.inputs import full_batch
from cappy_engine.session import open_session
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint
from tests.support.installations import GOOD, fake_load
from tests.support.places import ROOT

BUS = "0000:3b:00.0"
SHAPE = {"hidden_size": 8, "intermediate_size": 32, "layers": 2}


def test_the_most_valuable_steps_come_first() -> None:
    names = [step.name for step in all_steps(open_bundle(EMBEDDED))]
    first = ["open/cuda/fp16", "open/cuda/fp32", "attention/kernels", "throughput/cuda/mixed", "parity/reference"]
    assert names[:7] == [*first, "parity/cuda/fp16", "parity/cuda/fp32"]
    needing = [step.device for step in all_steps(open_bundle(EMBEDDED)) if step.group != "drill"]
    assert needing == sorted(needing)  # CUDA's, then TensorRT's


def test_every_step_has_a_name_of_its_own_and_a_group_that_can_be_asked_for() -> None:
    steps = all_steps(open_bundle(EMBEDDED))
    assert len({step.name for step in steps}) == len(steps)
    assert {step.group for step in steps} == set(GROUPS)


def test_a_step_runs_only_where_nothing_is_missing_while_there_is_time() -> None:
    step = next(step for step in all_steps(open_bundle(EMBEDDED)) if step.device == "tensorrt")
    nothing = dict.fromkeys(("cuda", "tensorrt"))
    assert why_not(step, nothing, [], 1.0) is None
    assert why_not(step, nothing, [step.group], 1.0) is None
    assert why_not(step, nothing, ["drill"], 1.0) == NOT_ASKED
    assert why_not(step, {**nothing, "tensorrt": "no TensorRT"}, ["drill"], 1.0) == "no TensorRT"
    assert why_unusable(GOOD) == nothing


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [("ok", None, 0), ("skipped", NOT_ASKED, 0), ("skipped", "no time", 1), ("failed", "wrong", 1)],
)
def test_the_exit_status_is_0_only_if_all_that_was_asked_for_is_ok(
    status: str, reason: str | None, expected: int
) -> None:
    assert exit_status([{"status": "ok", "reason": None}, {"status": status, "reason": reason}]) == expected


def test_a_drill_takes_only_the_error_that_it_expects() -> None:
    def refuse() -> None:
        raise DeviceUnavailable("gives wrong scores: 3")

    assert expect(DeviceUnavailable, "wrong scores", refuse)["message"] == "gives wrong scores: 3"
    with pytest.raises(CheckFailed, match="ScoringError with '' was expected, and DeviceUnavailable came"):
        expect(ScoringError, "", refuse)
    with pytest.raises(CheckFailed, match="and DeviceUnavailable came"):
        expect(DeviceUnavailable, "no driver", refuse)
    with pytest.raises(CheckFailed, match="and nothing was raised"):
        expect(DeviceUnavailable, "", lambda: None)


def test_turns_are_reversed_and_what_cannot_run_is_named() -> None:
    ticks = iter(range(100))
    order: list[str] = []

    def break_down() -> None:
        raise MemoryError("too large")

    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": break_down}
    seconds, failed = time_in_turns(runs, runs=2, clock=lambda: float(next(ticks)))
    assert "".join(order[-4:]) == "abba"
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert failed == {"c": "MemoryError: too large"}


def test_what_did_not_run_has_no_figure_rather_than_zero() -> None:
    cell = make_cell("cuda fp16", [64] * 8, [], SHAPE)
    assert {name: value for name, value in cell.items() if value is None}.keys() == {
        "runs", "seconds", "fastest", "slowest", "pairs_per_second", "tokens_per_second", "tflops"
    }  # fmt: skip


def test_a_cell_has_the_median_of_its_runs_and_the_figures_that_follow() -> None:
    """An operation is a multiplication or an addition: by hand for two layers of 8, and 32 in the feed-forward."""
    cell = make_cell("cuda fp16", [64, 16], [0.5, 2.0, 0.25, 1.0, 4.0], SHAPE)
    assert (cell["rows"], cell["length"], cell["tokens"], cell["runs"]) == (2, None, 80, 5)
    assert (cell["seconds"], cell["fastest"], cell["slowest"]) == (1.0, 0.25, 4.0)
    assert (cell["pairs_per_second"], cell["tokens_per_second"]) == (2.0, 80.0)
    products, attention = 2 * 80 * (4 * 8 * 8 + 2 * 8 * 32), 2 * 2 * (64 * 64 + 16 * 16) * 8
    assert cell["tflops"] == pytest.approx(2 * (products + attention) / 1e12)
    assert make_cell("cuda fp16", [64] * 8, [1.0], SHAPE)["length"] == 64


@pytest.mark.parametrize(("precision", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_pytorchs_peer_has_sdpa_and_the_checkpoints_weights(
    checkpoint: Path, precision: str, kind: torch.dtype
) -> None:
    module, loaded = load_torch(checkpoint, precision), load_model(open_checkpoint(checkpoint))
    assert module.config._attn_implementation == "sdpa"
    assert not module.training
    weights = loaded.state_dict()
    for name, weight in module.state_dict().items():
        if weight.is_floating_point():
            assert weight.dtype == kind
            torch.testing.assert_close(weight, weights[name].to(kind), rtol=0, atol=0)
    inputs = full_batch(2, 16, pad_token_id=1)
    np.testing.assert_allclose(TorchSession(module).run(inputs), runs(loaded)(inputs), rtol=0, atol=0.03)


def test_batches_are_doubled_until_the_memory_ends_and_each_is_timed_three_times() -> None:
    seen: list[int] = []

    def run(rows: int) -> None:
        seen.append(rows)
        if rows == 32:
            raise MemoryError("all of it is taken")

    ticks = iter(range(100))
    seconds, ended = time_doubling(run, most=1000, passes=3, clock=lambda: float(next(ticks)))
    assert seen == [8] * 4 + [16] * 4 + [32]
    assert seconds == {8: [1.0] * 3, 16: [1.0] * 3}
    assert ended == "32 pairs did not run (MemoryError: all of it is taken)"
    assert time_doubling(lambda rows: None, most=9, passes=1)[1] == "all pairs are one batch of 9"


def test_pairs_in_batches_of_rows_get_their_own_scores() -> None:
    pairs = [("Is the sky blue?", "Yes " * count) for count in (3, 40, 1, 7, 7)]
    with Scorer.open(EMBEDDED, device="cpu") as scorer:
        expected = scorer.score(pairs)
    tokenizer = PairTokenizer.from_file(EMBEDDED / "tokenizer.json", max_length=512)
    session = open_session(open_bundle(EMBEDDED).model("int8"), threads=1, kernels=find_kernels().chosen)
    pad_token_id = open_bundle(EMBEDDED).manifest.pad_token_id
    found = score_in_rows(session, tokenizer, pairs, 2, pad_token_id=pad_token_id)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpu-h200-large.json", "gpu-h200-cappy-mini.json"])
def test_committed_results_are_still_read(name: str) -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    text = summary(document)
    assert all(step["name"] in text for step in document["steps"])
    assert ("Pairs/s (TFLOP/s), medians:" in text) == (name == "gpu-h200-large.json")


def test_what_nvidia_smi_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with watched(BUS) as nothing:
        pass
    assert (nothing, gpu_facts()) == ({}, [])
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"""#!/bin/sh
case "$*" in
    *--id={BUS}*--loop-ms=*) echo "1980, 400.5, 61, 900"; echo "1200, 300.5, 65, [N/A]"; exec /bin/sleep 60 ;;
    *) echo "{", ".join(FACTS)}" ;;
esac
"""
    )
    tool.chmod(0o755)
    with watched(BUS) as seen:
        time.sleep(0.3)
    assert seen == {"samples": 2, "sm_mhz": 1590.0, "watts": 350.5, "celsius": 65.0, "mib": 900.0}
    assert gpu_facts() == [{name: name for name in FACTS}]
    with watched(None) as unknown:
        pass
    assert unknown == {}


def test_the_gpu_that_is_watched_is_cudas_first_whatever_number_nvidia_smi_gives_it() -> None:
    def place_of(target: Any, size: int, device: Any) -> int:
        target.value = BUS.encode()[: size - 1]
        return int(device.value != 7)

    def get(target: Any, ordinal: int) -> int:
        target._obj.value = 7 + ordinal
        return 0

    def refuse(*_: Any) -> int:
        return 100

    cuda = {"cuInit": lambda flags: 0, "cuDeviceGet": get, "cuDeviceGetPCIBusId": place_of}
    assert first_gpu(lambda name: SimpleNamespace(**cuda)) == BUS
    for name in cuda:
        assert first_gpu(lambda _, name=name: SimpleNamespace(**{**cuda, name: refuse})) is None  # type: ignore[misc]
    assert first_gpu(lambda name: SimpleNamespace()) is None
    assert first_gpu(fake_load()) is None


def test_attention_kernels_are_counted_by_operator_type_and_kernel() -> None:
    line = "\x1b[36mOperator={} Node=layer.{}/attention DataType=fp16 SdpaKernel={}\x1b[0m\n"
    names = [("PackedAttention", "EFFICIENT_ATTENTION"), ("PackedMultiHeadAttention", "FLASH_ATTENTION")]
    output = "".join(line.format(name, layer, kernel) for name, kernel in names for layer in range(2)) + "other\n"
    assert attention_kernels(output) == {
        "PackedAttention fp16 EFFICIENT_ATTENTION": 2,
        "PackedMultiHeadAttention fp16 FLASH_ATTENTION": 2,
    }
