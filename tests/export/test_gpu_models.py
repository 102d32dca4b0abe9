"""Exports for GPUs: proven on the CPU, and refused where they cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from cappy_engine import Scorer
from cappy_engine.bundle import open_bundle
from cappy_engine.canary import read_canary
from cappy_engine.cli.main import main
from cappy_engine.errors import BundleError, DeviceUnavailable, ExportError, ParityError, PrecisionUnavailable
from cappy_engine.tokenizer import PairTokenizer
from cappy_export import ExportOptions, VerifyOptions, export, verify
from cappy_export.graphs.tensorrt import plain_model
from cappy_export.proof.canary import CANARY_PAIRS, canary_rows, canary_tolerance
from cappy_export.proof.limits import LIMITS, Limits
from cappy_export.proof.pairs import default_pairs
from tests.support.bundles import copy_bundle, flip_byte, keep_precisions
from tests.support.places import write_short_parity_pairs

GPU_MODELS = [("cuda", "fp32"), ("cuda", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "int8")]


ALL = ("fp32", "fp16", "int8")


def document_of(bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    return document


def nodes(bundle: Path, file: str, kind: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(bundle / file).graph.node if node.op_type == kind]


@pytest.mark.slow
def test_each_target_has_the_precisions_that_it_runs(gpu_bundle: Path) -> None:
    manifest = open_bundle(gpu_bundle).manifest
    assert manifest.precisions == ALL
    assert manifest.targets == {"cuda": ("fp32", "fp16"), "tensorrt": ALL}
    assert manifest.buckets == (64, 128, 256, 512)
    assert {("cuda", "fp32"), ("cuda", "fp16"), ("cpu", "fp32")} <= manifest.unpadded
    assert not {model for model in manifest.unpadded if model[0] == "tensorrt"}


@pytest.mark.parametrize(("target", "precision"), GPU_MODELS)
def test_every_model_is_proven_within_its_limits(gpu_bundle: Path, target: str, precision: str) -> None:
    row = document_of(gpu_bundle)["parity"]["targets"][target][precision]
    limits = LIMITS[precision]
    assert limits.max_error is None or row["max_error"] <= limits.max_error
    assert limits.min_spearman is None or row["spearman"] >= limits.min_spearman
    assert precision == "fp32" or row["max_error"] > 1e-6  # a conversion that changed nothing would be none


@pytest.mark.parametrize(("target", "precision"), GPU_MODELS)
def test_the_canary_is_of_pytorchs_scores(gpu_bundle: Path, target: str, precision: str) -> None:
    canary = read_canary(document_of(gpu_bundle), target, precision)
    assert len(canary.scores) == CANARY_PAIRS
    assert canary.pairs.lengths.max() == 512
    assert canary.scores.std() > 0.05  # constant scores would not pass for right ones
    with Scorer.open(gpu_bundle, device="cpu", precision="fp32") as scorer:
        every = scorer.score(default_pairs())
    assert all(np.abs(every - score).min() < 1e-4 for score in canary.scores)
    limit = LIMITS[precision].max_error
    row = document_of(gpu_bundle)["parity"]["targets"][target][precision]
    assert canary.tolerance == (limit or pytest.approx(max(2 * row["max_error"], 1e-3)))


def test_the_canary_has_the_tokens_of_its_pairs(gpu_bundle: Path) -> None:
    canary = read_canary(document_of(gpu_bundle), "cuda", "fp32").pairs
    encoded = PairTokenizer.from_file(gpu_bundle / "tokenizer.json", max_length=512).encode(default_pairs())
    known = {ids.tobytes(): types for ids, types in zip(encoded.token_ids, encoded.type_ids, strict=True)}
    for ids, types in zip(canary.token_ids, canary.type_ids, strict=True):
        np.testing.assert_array_equal(types, known[ids.tobytes()])


def test_a_canary_of_pairs_of_one_length_still_has_many() -> None:
    scores = np.random.default_rng(0).permutation(np.linspace(0, 1, 20, dtype=np.float32))
    rows = canary_rows(scores, np.full(20, 7))
    assert len(rows) >= CANARY_PAIRS - 1
    assert {int(scores.argmin()), int(scores.argmax())} <= set(rows)


def test_a_canary_is_of_the_shorter_half_of_the_pairs_and_the_longest() -> None:
    counts = np.random.default_rng(0).permutation(100)
    rows = canary_rows(np.linspace(0, 1, 100, dtype=np.float32), counts)
    assert len(rows) == CANARY_PAIRS
    assert sorted(counts[rows] < 50) == [False] + [True] * (CANARY_PAIRS - 1)
    assert counts[rows].max() == 99


@pytest.mark.parametrize(("error", "tolerance"), [(0.01, 0.04), (0.05, 0.1)])
def test_the_canary_tolerates_what_was_proven_with_kernels_and_without(error: float, tolerance: float) -> None:
    row = {"max_error": 0.02, "without_kernels": {"max_error": error}}
    assert canary_tolerance(row, LIMITS["int8"], spread=0.2) == tolerance


def test_a_canary_is_served_by_whoever_asked_for_no_error_at_all() -> None:
    assert canary_tolerance({"max_error": 0.0}, Limits(max_error=0.0), spread=0.5) == 5e-4


@pytest.mark.parametrize(("spread", "tolerance"), [(1e-3, 1e-6), (1.0, 1e-3), (50.0, 1e-3)])
def test_the_canary_tolerates_a_thousandth_of_a_small_spread_and_no_more_than_a_thousandth(
    spread: float, tolerance: float
) -> None:
    assert canary_tolerance({"max_error": 1e-9}, LIMITS["int8"], spread) == pytest.approx(tolerance)


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_fp16_is_fp16_with_the_head_in_float32(gpu_bundle: Path, target: str) -> None:
    model = onnx.load(gpu_bundle / target / "model_fp16.onnx")
    kinds = {entry.name: entry.data_type for entry in model.graph.initializer if len(entry.dims) == 2}
    assert {kind for name, kind in kinds.items() if "classifier" in name} == {TensorProto.FLOAT}
    assert {kind for name, kind in kinds.items() if "classifier" not in name} == {TensorProto.FLOAT16}
    assert document_of(gpu_bundle)["targets"][target]["graphs"]["fp16"]["overflowing_in_fp32"] == []


def test_int8_for_tensorrt_is_explicit_symmetric_and_per_channel(gpu_bundle: Path) -> None:
    file = "tensorrt/model_int8.onnx"
    model = onnx.load(gpu_bundle / file)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    quantize, dequantize = nodes(gpu_bundle, file, "QuantizeLinear"), nodes(gpu_bundle, file, "DequantizeLinear")
    for node in (*quantize, *dequantize):
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (constants[node.input[1]] > 0).all()
    of_weights = [node for node in dequantize if node.input[0] in constants]
    assert len(of_weights) == document_of(gpu_bundle)["targets"]["tensorrt"]["graphs"]["int8"]["quantized"]
    for node in of_weights:
        assert constants[node.input[0]].dtype == np.int8
        assert constants[node.input[1]].shape == (constants[node.input[0]].shape[1],)
    floats = [node for node in nodes(gpu_bundle, file, "MatMul") if node.input[1] in constants]
    assert not floats  # every product with weights reads int8


def test_gpus_are_refused_here_by_name_and_passed_over_by_auto(gpu_bundle: Path) -> None:
    for device in ("cuda", "tensorrt"):
        with pytest.raises(DeviceUnavailable, match="ExecutionProvider"):
            Scorer.open(gpu_bundle, device=device)
    with Scorer.open(gpu_bundle) as scorer:
        assert scorer.info.device == "cpu"
        assert "no CUDA provider" in scorer.info.device_reason


@pytest.mark.slow
def test_a_bundle_for_gpus_alone_has_nothing_for_the_cpu(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "b", ExportOptions(precisions=("fp16",), targets=("cuda",)))
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.precisions == ()
    assert [name for name in bundle.manifest.files if name.endswith(".onnx")] == ["cuda/model_fp16.onnx"]
    with pytest.raises(PrecisionUnavailable, match=r"no model for cpu; export it with --target cpu"):
        Scorer.open(tmp_path / "b", device="cpu")


@pytest.mark.slow
def test_buckets_follow_the_lengths_of_the_users_pairs(checkpoint: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"instruction": "word " * (place % 20), "response": f"yes, {place}"} for place in range(300)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ExportOptions(targets=("tensorrt",), pairs=pairs, buckets=3, max_length=256)
    buckets = export(checkpoint, tmp_path / "b", options)["targets"]["tensorrt"]["buckets"]
    assert len(buckets) == 3
    assert buckets[-1] == 256
    assert buckets[1] <= 128  # the longest of these pairs


@pytest.mark.slow
def test_wrong_weights_for_a_gpu_are_a_parity_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(config: Any, weights: Any) -> onnx.ModelProto:
        name = "roberta.encoder.layer.1.output.dense.weight"
        return plain_model(config, {**weights, name: weights[name] * 1.05})

    monkeypatch.setattr("cappy_export.gpu_models.plain_model", wrong)
    with pytest.raises(ParityError, match=r"fp32 of tensorrt: max error .* is above 0\.0001"):
        export(checkpoint, tmp_path / "b", ExportOptions(targets=("cpu", "tensorrt")))
    assert not (tmp_path / "b").exists()


def test_a_file_that_the_manifest_does_not_name_is_refused(gpu_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(gpu_bundle, tmp_path / "b")
    (tmp_path / "b" / "cuda" / "model.onnx_data").write_bytes(b"")
    with pytest.raises(BundleError, match=r"holds cuda/model\.onnx_data, which its manifest does not name"):
        open_bundle(tmp_path / "b")


@pytest.mark.slow
def test_verify_measures_the_models_for_gpus_too(gpu_bundle: Path, checkpoint: Path) -> None:
    parity = verify(gpu_bundle, checkpoint)
    assert parity["targets"].keys() == {"cuda", "tensorrt"}
    with pytest.raises(ParityError, match="fp16 of cuda"):
        verify(gpu_bundle, checkpoint, VerifyOptions(limits=("fp16.max_error=1e-9",)))


def test_verify_knows_that_a_gpu_alone_runs_a_precision(gpu_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = keep_precisions(copy_bundle(tmp_path / "b", source=gpu_bundle), "fp32")
    with pytest.raises(ExportError, match=r"'bf16\.max_error=1' changes nothing: measured are fp32, fp16, int8$"):
        verify(copy, checkpoint, VerifyOptions(limits=("bf16.max_error=1",)))


@pytest.mark.slow
def test_verify_refuses_a_damaged_model_for_a_gpu(gpu_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    """However little the damage changes the scores."""
    copy = copy_bundle(tmp_path / "b", source=gpu_bundle)
    flip_byte(copy / "cuda" / "model.onnx", (copy / "cuda" / "model.onnx").stat().st_size // 2)
    with pytest.raises(BundleError, match=r"cuda/model\.onnx .*is not the file that was exported"):
        verify(copy, checkpoint, VerifyOptions(pairs=write_short_parity_pairs(tmp_path / "pairs.jsonl")))


def test_the_command_shows_every_model(gpu_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(gpu_bundle)]) == 0
    shown = capsys.readouterr().out
    for target, precision in GPU_MODELS:
        assert f"  {target} {precision}" in shown
    assert "buckets     64, 128, 256, 512 tokens, for TensorRT" in shown
    assert "run on the CPU provider, with stand-ins" in shown
