"""The export as a whole: nothing unproven is written, nothing half-written is left, and the proof can be repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from cappy_engine import Scorer
from cappy_engine.bundle import open_bundle
from cappy_engine.cli.main import main
from cappy_engine.errors import BundleError, ExportError, ParityError
from cappy_export import export, pipeline, verify
from cappy_export.proof.limits import LIMITS, Limits
from cappy_export.proof.pairs import default_pairs

PAIRS = default_pairs()[:40]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def perturb(path: Path, amount: float) -> None:
    """Add `amount` to one row of the first layer's value weights in an ONNX file."""
    model = onnx.load(path)
    names = ("roberta.encoder.layer.0.attention.self.value.matrix", "Attention_0_qkv_weight")
    entry = next(entry for entry in model.graph.initializer if entry.name in names)
    weights = numpy_helper.to_array(entry).copy()
    weights[:, -1] += amount
    entry.CopyFrom(numpy_helper.from_array(weights, entry.name))
    onnx.save(model, path)


def test_the_manifest_tells_all(bundle: Path, checkpoint: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    assert document["schema_version"] == 1
    assert document["precisions"] == ["fp32", "fp16", "int8"]
    assert document["source"]["name"] == checkpoint.name
    assert document["source"]["format"] == "safetensors"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(document["source"]["files"])
    assert {"torch", "transformers", "optimum", "onnx", "onnxruntime", "python"} <= set(document["versions"])
    assert document["model"] | {"max_length": 512, "pad_token_id": 1, "layers": 2} == document["model"]
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == set(document["files"]) | {"manifest.json"}
    pairs = document["parity"]["pairs"]
    assert pairs["count"] >= 256
    assert (pairs["shortest"], pairs["longest"]) == (4, 512)
    assert pairs["truncated"] > 0
    for precision, limits in LIMITS.items():
        row = document["parity"]["precisions"][precision]
        assert row["batch_shapes"] > 10
        assert limits.max_error is None or row["max_error"] <= limits.max_error
        assert row["spearman"] > 0.95
    assert str(Path.home()) not in (bundle / "manifest.json").read_text()


def test_other_tools_are_told_to_give_the_raw_score(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    assert list(config["id2label"]) == ["0"]


@pytest.mark.parametrize("kind", ["bin", "msgpack"])
def test_every_format_exports_to_the_same_graph_and_scores(
    checkpoint: Path, bundle: Path, tmp_path: Path, kind: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(
        checkpoint, copy, ignore=shutil.ignore_patterns("model.safetensors", "pytorch_model.bin" * (kind != "bin"))
    )
    manifest = export(copy, tmp_path / "bundle")
    assert manifest["source"]["format"] == kind
    first, second = (
        {entry.name: entry.SerializeToString() for entry in onnx.load(path / "onnx/model.onnx").graph.initializer}
        for path in (bundle, tmp_path / "bundle")
    )
    assert first == second
    with Scorer.open(bundle, precision="fp32") as one, Scorer.open(tmp_path / "bundle") as other:
        np.testing.assert_array_equal(one.score(PAIRS), other.score(PAIRS))


def test_only_what_was_asked_for_is_in_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle", precisions=["int8"])
    assert [path.name for path in (tmp_path / "bundle" / "onnx").iterdir()] == ["model_quantized.onnx"]
    with Scorer.open(tmp_path / "bundle") as scorer:
        assert scorer.info.precision == "int8"


def test_a_smaller_max_length_is_kept_in_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle", max_length=64)
    with Scorer.open(tmp_path / "bundle") as scorer:
        scored = scorer.score_pairs([("word " * 500, "yes")])
    assert scored.token_counts.tolist() == [64]
    assert scored.truncated.tolist() == [True]
    assert json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())["model_max_length"] == 64


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_perturbed_weight_is_a_parity_error_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Break each converter on purpose, as a wrong export would."""
    name = {"fp32": "build_graph", "fp16": "convert_to_half", "int8": "quantize"}[precision]
    right = getattr(pipeline, name)

    def wrong(source: Any, path: Path, *others: Any, **options: Any) -> Any:
        facts = right(source, path, *others, **options)
        if precision == "int8":
            right(_perturbed(source), path)
        else:
            perturb(path, 0.05)
        return facts

    def _perturbed(path: Path) -> Path:
        broken = shutil.copyfile(path, path.with_name("broken.onnx"))
        perturb(broken, 5.0)
        return broken

    monkeypatch.setattr(pipeline, name, wrong)
    with pytest.raises(ParityError, match=f"{precision}: ") as caught:
        export(checkpoint, tmp_path / "bundle", precisions=[precision])
    assert caught.value.report["precisions"][precision]["worst"]
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_the_report_of_a_failed_parity(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["export", str(checkpoint), str(tmp_path / "bundle"), "--limit", "fp32.max_error=1e-12"])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == ""
    assert "is above 1e-12" in captured.err
    assert "worst pairs, fp32" in captured.err
    assert list(tmp_path.iterdir()) == []


STEPS: list[str] = ["build_graph", "convert_to_half", "quantize", "_prove", "require", "_write_manifest", "publish"]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_no_bundle_and_no_litter(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pipeline, step, fail)
    with pytest.raises(OSError, match="no space left"):
        export(checkpoint, tmp_path / "bundle", precisions=["fp32", "fp16", "int8"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("said", ["building", "quantising", "scoring 279 pairs in fp32", "scoring 279 pairs in int8"])
def test_kill_9_leaves_no_bundle_and_the_next_export_works(checkpoint: Path, tmp_path: Path, said: str) -> None:
    command = [sys.executable, "-m", "cappy_engine", "export", str(checkpoint), str(tmp_path / "bundle")]
    command += ["--precision", "fp32", "--precision", "int8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(said):
                time.sleep(0.05)
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    assert main(command[3:]) == 0
    open_bundle(tmp_path / "bundle")


def test_an_int8_export_proves_the_fp32_graph_it_is_made_from(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error far below what int8 is allowed, in a graph that is not in the bundle."""
    right = getattr(pipeline, "build_graph")  # noqa: B009

    def wrong(source: Any, path: Path) -> Any:
        facts = right(source, path)
        perturb(path, 0.01)
        return facts

    monkeypatch.setattr(pipeline, "build_graph", wrong)
    with pytest.raises(ParityError, match="fp32: max error"):
        export(checkpoint, tmp_path / "bundle", precisions=["int8"])


def test_tokens_unlike_those_of_transformers_are_an_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(pipeline, "score_with_torch")  # noqa: B009

    def longer(*args: Any, **options: Any) -> Any:
        reference = right(*args, **options)
        reference.token_counts[7] += 1
        return reference

    monkeypatch.setattr(pipeline, "score_with_torch", longer)
    with pytest.raises(ExportError, match="tokenises 1 pairs unlike transformers"):
        export(checkpoint, tmp_path / "bundle")


def test_force_never_replaces_what_is_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work")
    with pytest.raises(ExportError, match="is no bundle"):
        export(checkpoint, folder, force=True)
    assert (folder / "chapter.txt").read_text() == "years of work"


def test_a_checkpoint_is_never_replaced_by_its_own_bundle(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "models" / "copy"))
    for target in (copy, copy.parent):
        (target / "manifest.json").write_text("{}")
        with pytest.raises(ExportError, match="is or holds the checkpoint"):
            export(copy, target, force=True)
    assert (copy / "model.safetensors").exists()


def test_a_bundle_that_appears_during_the_export_is_kept(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def say(text: str) -> None:
        if text.startswith("scoring 279 pairs in fp32"):
            shutil.copytree(bundle, target)

    with pytest.raises(ExportError, match="exists"):
        export(checkpoint, target, say=say)
    assert tree(target) == tree(bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_the_old_bundle_is_put_back_if_the_new_one_cannot_take_its_name(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    right = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise error
        return right(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)):
        export(checkpoint, copy, force=True)
    assert tree(copy) == tree(bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_killed_export_left_is_pointed_out(checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / ".bundle.partial-abc"
    left.mkdir()
    said: list[str] = []
    export(checkpoint, tmp_path / "bundle", say=said.append)
    assert any(str(left) in text for text in said)
    assert left.exists()


def test_a_checkpoint_that_changes_during_the_export_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))

    def say(text: str) -> None:
        if text.startswith("scoring 279 pairs in fp32"):
            (copy / "tokenizer_config.json").write_text("{}")

    with pytest.raises(ExportError, match="changed during the export"):
        export(copy, tmp_path / "bundle", say=say)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_sigterm_leaves_nothing_at_all(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cappy_engine", "export", str(checkpoint), str(tmp_path / "bundle")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("building"):
                process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_kept_without_force(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    before = tree(copy)
    with pytest.raises(ExportError, match="exists; choose another name, or replace it with --force"):
        export(checkpoint, copy)
    assert tree(copy) == before


def test_force_replaces_only_by_a_proven_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    before = tree(copy)
    with pytest.raises(ParityError):
        export(checkpoint, copy, force=True, limits={"fp32": Limits(max_error=1e-12)})
    assert tree(copy) == before
    export(checkpoint, copy, force=True)
    assert open_bundle(copy).manifest.precisions == ("fp32",)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("precisions", [[], ["fp64"], "fp32"])
def test_unknown_precisions_are_refused(checkpoint: Path, tmp_path: Path, precisions: Any) -> None:
    with pytest.raises(ValueError, match="precisions must be a list from fp32, fp16, int8"):
        export(checkpoint, tmp_path / "bundle", precisions=precisions)


def test_verify_repeats_the_proof(checkpoint: Path, bundle: Path) -> None:
    said: list[str] = []
    parity = verify(bundle, checkpoint, say=said.append)
    recorded = json.loads((bundle / "manifest.json").read_text())["parity"]
    assert parity["pairs"] == recorded["pairs"]
    for precision in ("fp32", "fp16", "int8"):
        assert parity["precisions"][precision]["max_error"] == pytest.approx(
            recorded["precisions"][precision]["max_error"], abs=1e-6
        )
    assert not any(text.startswith("note") for text in said)


def test_verify_with_another_checkpoint_fails_and_says_why(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["classifier.out_proj.bias"] += 0.01
    save_file(weights, other / "model.safetensors")
    said: list[str] = []
    with pytest.raises(ParityError, match="fp32: max error"):
        verify(bundle, other, precisions=["fp32"], say=said.append)
    assert any("is not, file for file, the checkpoint" in text for text in said)


def test_verify_refuses_a_damaged_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    perturb(copy / "onnx" / "model.onnx", 0.1)
    with pytest.raises(BundleError, match=r"onnx/model\.onnx"):
        verify(copy, checkpoint)


def test_the_users_pairs_prove_the_export(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"instruction": f"Is {n // 2} even?", "response": ["yes", "no"][n % 2]} for n in range(256)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = export(checkpoint, tmp_path / "bundle", pairs=path)
    pairs = manifest["parity"]["pairs"]
    assert (pairs["name"], pairs["count"], pairs["groups"]) == ("mine.jsonl", 256, 128)


def test_scores_that_hardly_vary_are_pointed_out(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat = Path(shutil.copytree(checkpoint, tmp_path / "flat"))
    weights = load_file(flat / "model.safetensors")
    weights["classifier.out_proj.weight"] *= 1e-4
    save_file(weights, flat / "model.safetensors")
    export(flat, tmp_path / "bundle")
    assert "the scores hardly vary" in caplog.text


def test_only_what_is_kept_is_written_but_all_of_it_is_proven(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export(checkpoint, tmp_path / "bundle", precisions=["fp32", "fp16", "int8"], keep=["int8"])
    assert manifest["precisions"] == ["int8"]
    assert list(manifest["parity"]["precisions"]) == ["fp32", "fp16", "int8"]
    assert [path.name for path in (tmp_path / "bundle" / "onnx").iterdir()] == ["model_quantized.onnx"]
    assert open_bundle(tmp_path / "bundle").manifest.document == manifest
    with pytest.raises(ExportError, match="cannot keep fp16 of fp32; name it as a precision too"):
        export(checkpoint, tmp_path / "other", keep=["fp16"])
    assert not (tmp_path / "other").exists()
