"""The proof: what is measured, on which pairs, and of which checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import save_file

from cappy_engine.cli.main import main
from cappy_engine.cpu.kernels import find_kernels
from cappy_engine.errors import BundleError, CheckpointError, ExportError, OutputError, ParityError
from cappy_export import ExportOptions, VerifyOptions, cpu_models, export, pipeline, verify
from cappy_export.adaptation.recipe import AdaptOptions
from cappy_export.adaptation.training import adapt
from cappy_export.precisions.int8 import quantize
from cappy_export.proof.reference import score_checkpoint, score_with_torch
from tests.support.bundles import Change, change_manifest, copy_bundle, with_value, without
from tests.support.checkpoints import copy
from tests.support.colours import colour_examples, weights_of
from tests.support.places import ROOT, TINY


def write_pairs(path: Path, *, longest: int = 1) -> Path:
    """Write 256 pairs, of which the last has so many words."""
    rows = [{"instruction": f"Is {n // 2} even?", "response": ["yes", "no"][n % 2]} for n in range(255)]
    rows.append({"instruction": "word " * longest, "response": "yes"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_a_bundle_is_verified_on_the_users_pairs_cut_where_it_cuts_them(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = (write_pairs(tmp_path / f"{count}.jsonl", longest=count) for count in (1, 100))
    export(checkpoint, tmp_path / "bundle", ExportOptions(max_length=64, pairs=short))
    assert "none of the pairs of 1.jsonl is long enough to be truncated: that is not proven here" in caplog.text
    found = verify(tmp_path / "bundle", checkpoint, VerifyOptions(pairs=long))["pairs"]
    assert (found["name"], found["count"], found["longest"], found["truncated"]) == ("100.jsonl", 256, 64, 1)
    assert "100.jsonl" not in caplog.text


@pytest.mark.slow
def test_operators_that_are_wrong_where_there_are_no_kernels_are_a_parity_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels here do not read the functions that other machines and tools run."""
    if find_kernels().library is None:
        pytest.skip(f"no kernels here: {find_kernels().why_not}")

    def wrong(source: Path, out: Path, *others: Any, **options: Any) -> Any:
        facts = quantize(source, out, *others, **options)
        model = onnx.load(out)
        for function in model.functions:
            for node in function.node:
                if node.op_type == "LayerNormalization":
                    node.op_type = "Identity"
                    del node.input[1:], node.attribute[:]
        onnx.save(model, out)
        return facts

    monkeypatch.setattr(cpu_models, "quantize", wrong)
    with pytest.raises(ParityError, match=r": int8 without kernels: ") as caught:
        export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("int8",)))
    row = caught.value.report["precisions"]["int8"]
    assert row["spearman"] > 0.97 > row["without_kernels"]["spearman"]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_pair_that_is_called_cut_unlike_by_transformers_is_an_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any, **options: Any) -> Any:
        reference = score_with_torch(*args, **options)
        reference.truncated[7] ^= True
        return reference

    monkeypatch.setattr(pipeline, "score_with_torch", other)
    with pytest.raises(ExportError, match="tokenises 1 pairs unlike transformers"):
        export(checkpoint, tmp_path / "bundle")


def test_an_empty_name_is_no_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable that is not set: as a path it is the current folder, which may be one."""
    monkeypatch.chdir(checkpoint)
    train, out = str(ROOT / "docs" / "examples" / "train.jsonl"), str(tmp_path / "out")
    for words in (["export", "", out], ["verify", str(TINY), "--checkpoint", ""], ["adapt", "", train, out]):
        assert main(words) == 1
        assert "an empty name of a checkpoint; is a variable not set?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_command_takes_a_folder_for_the_revision_that_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a local folder; --revision is for hub ids"):
        export(checkpoint, tmp_path / "out", ExportOptions(revision="v2"))
    with pytest.raises(CheckpointError, match="is a local folder; --revision is for hub ids"):
        verify(TINY, checkpoint, VerifyOptions(revision="v2"))
    with pytest.raises(CheckpointError, match="is a local folder; --revision is for hub ids"):
        adapt(checkpoint, colour_examples(8), tmp_path / "out", options=AdaptOptions(revision="v2"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_commands_replace_a_bundle_and_verify_it_as_they_are_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = copy_bundle(tmp_path / "bundle")
    assert main(["export", str(checkpoint), str(old)]) == 1
    assert "exists; choose another name, or replace it with --force" in capsys.readouterr().err
    assert len(list((old / "onnx").iterdir())) > 1
    assert main(["export", str(checkpoint), str(old), "--force"]) == 0
    assert sorted(path.name for path in (old / "onnx").iterdir()) == ["model.onnx"]
    capsys.readouterr()
    words = ["verify", str(old), "--checkpoint", str(checkpoint), "--limit"]
    assert main([*words, "fp32.max_error=0.01", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["precisions"]["fp32"]["limits"]["max_error"] == 0.01
    assert main([*words, "fp32.max_error=1e-12"]) == 1
    assert "is above 1e-12" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_verifies_the_precisions_and_the_pairs_that_it_is_told(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path / "mine.jsonl")
    words = ["verify", str(bundle), "--checkpoint", str(checkpoint), "--precision", "bf16", "--pairs", str(pairs)]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["precisions"]) == ["bf16"]
    assert report["pairs"]["name"] == "mine.jsonl"


def test_the_users_pairs_are_never_replaced_by_the_bundle_that_they_prove(checkpoint: Path, tmp_path: Path) -> None:
    old = copy_bundle(tmp_path / "bundle")
    pairs = write_pairs(old / "mine.jsonl")
    with pytest.raises(OutputError, match=r"is, holds or lies in the input .*mine\.jsonl"):
        export(checkpoint, old, ExportOptions(pairs=pairs), force=True)
    assert pairs.exists()


@pytest.mark.slow
def test_a_checkpoint_whose_scores_are_no_numbers_in_pytorch_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    weights = weights_of(folder)
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        weights[name].fill_(3e38)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"PyTorch itself gives -?(inf|nan) for \d+ pairs, first \("):
        export(folder, tmp_path / "bundle")


@pytest.mark.slow
def test_a_checkpoint_whose_scores_are_all_infinite_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    weights = weights_of(folder)
    for name, value in (("dense.weight", 0), ("dense.bias", 10), ("out_proj.weight", 3e38)):
        weights[f"classifier.{name}"].fill_(value)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"PyTorch itself gives inf for 279 pairs, first \("):
        export(folder, tmp_path / "bundle")
    with pytest.raises(CheckpointError, match=r"PyTorch itself gives inf for 1 pairs, first \('Is it\?', 'Yes'\)"):
        score_checkpoint(folder, [("Is it?", "Yes")])


@pytest.mark.parametrize("change", [without("source"), without("source", "sha256"), with_value([1], "score")])
def test_verify_refuses_a_manifest_that_lacks_what_it_compares(
    checkpoint: Path, bundle: Path, tmp_path: Path, change: Change
) -> None:
    copied = copy_bundle(tmp_path / "bundle", source=bundle)
    change_manifest(copied, change)
    with pytest.raises(
        BundleError, match=r"the manifest of .* does not tell its source \((KeyError|TypeError): .*export it again"
    ):
        verify(copied, checkpoint, VerifyOptions(precisions=("fp32",)))
