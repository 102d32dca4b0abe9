"""The manifest tells all of an export, and names the files that are there."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import MODEL_FILES, open_bundle
from cappy_engine.errors import BundleError, ExportError
from cappy_engine.tokenizer import PairTokenizer
from cappy_export import ExportOptions, export
from cappy_export.proof.limits import LIMITS
from cappy_export.proof.pairs import default_pairs
from tests.support.bundles import flip_byte
from tests.support.places import write_short_parity_pairs


def test_the_manifest_tells_all(bundle: Path, checkpoint: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    assert document["schema_version"] == 1
    assert document["precisions"] == ["fp32", "fp16", "bf16", "int8"]
    assert document["source"]["name"] == checkpoint.name
    assert document["source"]["format"] == "safetensors"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(document["source"]["files"])
    made_with = {"torch", "transformers", "tokenizers", "optimum", "onnx", "onnxruntime", "numpy", "python"}
    assert made_with <= set(document["versions"])
    assert datetime.fromisoformat(document["created"]).utcoffset() == timedelta(0)
    assert document["model"] | {"max_length": 512, "pad_token_id": 1, "layers": 2} == document["model"]
    assert document["score"] == {"labels": 1, "activation": None, "told_by": None}
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == set(document["files"]) | {"manifest.json"}
    pairs = document["parity"]["pairs"]
    assert pairs["count"] >= 256
    assert (pairs["shortest"], pairs["longest"]) == (4, 512)
    tokenizer = PairTokenizer.from_file(bundle / "tokenizer.json", max_length=512)
    assert pairs["truncated"] == np.count_nonzero(tokenizer.encode(default_pairs()).truncated) > 0
    unpadded = {precision: graph["unpadded"] for precision, graph in document["graphs"].items()}
    assert unpadded == {"fp32": True, "fp16": False, "bf16": True, "int8": True}
    for precision, limits in LIMITS.items():
        row = document["parity"]["precisions"][precision]
        assert row["batch_shapes"] > 10
        assert limits.max_error is None or row["max_error"] <= limits.max_error
        assert row["spearman"] > 0.95
    assert str(Path.home()) not in (bundle / "manifest.json").read_text()


@pytest.mark.slow
def test_only_what_is_kept_is_written_but_all_of_it_is_proven(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(precisions=("fp32", "fp16", "int8"), keep=("int8",))
    manifest = export(checkpoint, tmp_path / "bundle", options)
    assert manifest["precisions"] == ["int8"]
    assert list(manifest["graphs"]) == ["int8"]
    assert list(manifest["parity"]["precisions"]) == ["fp32", "fp16", "int8"]
    assert [path.name for path in (tmp_path / "bundle" / "onnx").iterdir()] == ["model_quantized.onnx"]
    assert open_bundle(tmp_path / "bundle").manifest.document == manifest
    with pytest.raises(ExportError, match="cannot keep fp16 of fp32; name it as a precision too"):
        ExportOptions(keep=("fp16",))


@pytest.mark.slow
def test_a_model_that_changes_after_its_proof_is_never_served(checkpoint: Path, tmp_path: Path) -> None:
    """The manifest has the digests of what was proven, not of what was there in the end."""

    def say(text: str) -> None:
        if text.endswith("pairs in int8"):
            (model,) = tmp_path.glob(f".bundle.*/{MODEL_FILES['fp32']}")
            flip_byte(model, model.stat().st_size // 2)

    pairs = write_short_parity_pairs(tmp_path / "pairs.jsonl")
    export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("fp32", "int8"), pairs=pairs), say=say)
    with pytest.raises(BundleError, match=rf"{MODEL_FILES['fp32']} .*is not the file that was exported"):
        Scorer.open(tmp_path / "bundle", precision="fp32")
