"""The export as a whole: nothing unproven is written, and the proof can be repeated."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from cappy_engine import Scorer
from cappy_engine.bundle import open_bundle
from cappy_engine.canary import read_canary
from cappy_engine.cli.main import main
from cappy_engine.errors import BundleError, ExportError, ParityError
from cappy_export import ExportOptions, VerifyOptions, export, pipeline, verify
from cappy_export.proof.limits import LIMITS
from cappy_export.proof.pairs import default_pairs
from cappy_export.proof.reference import score_with_torch
from tests.support.bundles import change_manifest, copy_bundle, with_value
from tests.support.checkpoints import copy, edit
from tests.support.faults import perturb

PAIRS = default_pairs()[:40]


def test_other_tools_are_told_to_give_the_raw_score(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    assert list(config["id2label"]) == ["0"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_carries_a_canary_that_it_passes(bundle: Path, precision: Literal["fp32", "int8"]) -> None:
    document = open_bundle(bundle).manifest.document
    canary = read_canary(document, "cpu", precision)
    row = document["parity"]["precisions"][precision]
    worst = max(each["max_error"] for each in (row, row.get("without_kernels", row)))
    assert canary.tolerance == (LIMITS["fp32"].max_error if precision == "fp32" else max(2 * worst, 1e-3))
    with Scorer.open(bundle, precision=precision) as scorer:
        errors = np.abs(scorer.score_encoded(canary.pairs).scores - canary.scores)
    assert len(errors) > 3
    assert errors.max() <= canary.tolerance


@pytest.mark.slow
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


@pytest.mark.slow
def test_only_what_was_asked_for_is_in_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("int8",)))
    assert [path.name for path in (tmp_path / "bundle" / "onnx").iterdir()] == ["model_quantized.onnx"]
    with Scorer.open(tmp_path / "bundle") as scorer:
        assert scorer.info.precision == "int8"


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "notes"), [(3300, 0), (8000, 1)])
def test_a_tokenizer_of_another_model_is_suspected(checkpoint: Path, tmp_path: Path, rows: int, notes: int) -> None:
    """Parity cannot see it: PyTorch's reference has the same tokenizer. Tables are rounded up by a few rows."""
    folder, name = copy(checkpoint, tmp_path / "copy"), "roberta.embeddings.word_embeddings.weight"
    edit(folder / "config.json", lambda config: config.update(vocab_size=rows))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: weights[name][:1].repeat(rows, 1)}, folder / "model.safetensors")
    said: list[str] = []
    with contextlib.suppress(ParityError):
        export(folder, tmp_path / "bundle", say=said.append)
    found = [text for text in said if text.startswith("note: the tokenizer of copy makes ids up to 3244 of 8000 rows")]
    assert len(found) == notes


@pytest.mark.slow
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


@pytest.mark.slow
def test_tokens_unlike_those_of_transformers_are_an_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longer(*args: Any, **options: Any) -> Any:
        reference = score_with_torch(*args, **options)
        reference.token_counts[7] += 1
        return reference

    monkeypatch.setattr(pipeline, "score_with_torch", longer)
    with pytest.raises(ExportError, match="tokenises 1 pairs unlike transformers"):
        export(checkpoint, tmp_path / "bundle")


@pytest.mark.slow
def test_a_checkpoint_that_changes_during_the_export_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))

    def say(text: str) -> None:
        if text.startswith("scoring 279 pairs in fp32"):
            (copy / "tokenizer_config.json").write_text("{}")

    with pytest.raises(ExportError, match="changed during the export"):
        export(copy, tmp_path / "bundle", say=say)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_verify_repeats_the_proof(checkpoint: Path, bundle: Path) -> None:
    said: list[str] = []
    parity = verify(bundle, checkpoint, say=said.append)
    recorded = json.loads((bundle / "manifest.json").read_text())["parity"]
    assert parity["pairs"] == recorded["pairs"]
    for precision in ("fp32", "fp16", "bf16", "int8"):
        assert parity["precisions"][precision]["max_error"] == pytest.approx(
            recorded["precisions"][precision]["max_error"], abs=1e-6
        )
    assert not any(text.startswith("note") for text in said)


@pytest.mark.slow
def test_verify_with_another_checkpoint_fails_and_says_why(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["classifier.out_proj.bias"] += 0.01
    save_file(weights, other / "model.safetensors")
    said: list[str] = []
    with pytest.raises(ParityError, match="fp32: max error"):
        verify(bundle, other, VerifyOptions(precisions=("fp32",)), say=said.append)
    assert any("is not, file for file, the checkpoint" in text for text in said)


@pytest.mark.parametrize(
    ("value", "keys", "problem"),
    [
        ("sigmoid", ("score", "activation"), "activation 'sigmoid', and the checkpoint has None"),
        (2, ("score", "labels"), "labels 2, and the checkpoint has 1"),
        ("BertModel", ("model", "architecture"), "architecture 'BertModel', and the checkpoint has 'RobertaForS"),
        (513, ("model", "max_length"), "max_length 513, and the checkpoint has 512"),
        (0, ("model", "pad_token_id"), "pad_token_id 0, and the checkpoint has 1"),
    ],
)
def test_verify_refuses_a_manifest_that_says_what_the_checkpoint_does_not(
    value: object, keys: tuple[str, str], problem: str, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    copy = copy_bundle(tmp_path / "bundle", source=bundle)
    change_manifest(copy, with_value(value, *keys))
    with pytest.raises(BundleError, match=f"the manifest of bundle .* has the {problem}.*; export it again from this"):
        verify(copy, checkpoint, VerifyOptions(precisions=("fp32",)))


def test_verify_refuses_a_limit_of_what_it_does_not_measure(checkpoint: Path, bundle: Path) -> None:
    with pytest.raises(ExportError, match=r"limit 'int8\.max_error=1' changes nothing: measured are fp32"):
        verify(bundle, checkpoint, VerifyOptions(precisions=("fp32",), limits=("int8.max_error=1",)))


def test_a_limit_of_winners_needs_pairs_that_compete(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.jsonl"
    rows = ({"instruction": f"Is it {number}?", "response": "Yes"} for number in range(300))
    alone.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    limits, problem = ("int8.min_winner_agreement=0.9",), "min_winner_agreement of int8 cannot be checked: .* 300 pairs"
    with pytest.raises(ExportError, match=problem):
        export(checkpoint, tmp_path / "new", ExportOptions(precisions=("int8",), pairs=alone, limits=limits))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ExportError, match=problem):
        verify(bundle, checkpoint, VerifyOptions(precisions=("int8",), pairs=alone, limits=limits))


@pytest.mark.slow
def test_verify_refuses_a_damaged_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle", source=bundle)
    perturb(copy / "onnx" / "model.onnx", 0.1)
    with pytest.raises(BundleError, match=r"onnx/model\.onnx"):
        verify(copy, checkpoint)


@pytest.mark.slow
def test_the_users_pairs_prove_the_export(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"instruction": f"Is {n // 2} even?", "response": ["yes", "no"][n % 2]} for n in range(256)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = export(checkpoint, tmp_path / "bundle", ExportOptions(pairs=path))
    pairs = manifest["parity"]["pairs"]
    assert (pairs["name"], pairs["count"], pairs["groups"]) == ("mine.jsonl", 256, 128)


@pytest.mark.slow
def test_scores_that_hardly_vary_are_pointed_out(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat = Path(shutil.copytree(checkpoint, tmp_path / "flat"))
    weights = load_file(flat / "model.safetensors")
    weights["classifier.out_proj.weight"] *= 1e-4
    save_file(weights, flat / "model.safetensors")
    export(flat, tmp_path / "bundle")
    assert "the scores hardly vary" in caplog.text


@pytest.mark.slow
def test_scores_around_a_hundred_are_proven_by_their_spread(checkpoint: Path, tmp_path: Path) -> None:
    """The absolute limit refused them for rounding; the report and the manifest say which limit they kept."""
    wide = Path(shutil.copytree(checkpoint, tmp_path / "wide"))
    weights = load_file(wide / "model.safetensors")
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        weights[name] *= 1000
    save_file(weights, wide / "model.safetensors")
    parity = export(wide, tmp_path / "bundle")["parity"]
    std, row = parity["pairs"]["score_std"], parity["precisions"]["fp32"]
    assert std > 100
    assert LIMITS["fp32"].max_error < row["max_error"] <= row["limits"]["max_error"] == 1e-4 * std
    assert verify(tmp_path / "bundle", wide)["precisions"]["fp32"]["limits"] == row["limits"]
