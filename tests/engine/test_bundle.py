"""A manifest says what a bundle is: one that says too little, or lies, is an error that names what is wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import MANIFEST, MODEL_FILES, SCHEMA_VERSION, open_bundle, seal
from cappy_engine.errors import BundleError, PrecisionUnavailable
from cappy_engine.storage import sha256_of
from tests.support.bundles import (
    MODELS,
    SMALL_FILES,
    Change,
    change_manifest,
    keep_precisions,
    read_manifest,
    with_value,
    without,
)
from tests.support.places import TINY_PRECISIONS

# A good bundle


def test_a_bundle_opens_with_what_its_manifest_says(bundle: Path) -> None:
    opened = open_bundle(str(bundle))
    assert opened.path == bundle
    assert opened.manifest.precisions == TINY_PRECISIONS
    assert (opened.manifest.max_length, opened.manifest.pad_token_id) == (512, 1)
    assert opened.manifest.document["schema_version"] == SCHEMA_VERSION
    assert opened.file("tokenizer.json") == bundle / "tokenizer.json"
    for precision in TINY_PRECISIONS:
        assert opened.model(precision) == bundle / MODEL_FILES[precision]


def test_the_manifest_names_every_file_with_its_size_and_digest(bundle: Path) -> None:
    entries = open_bundle(bundle).manifest.files
    on_disk = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(entries) == on_disk - {MANIFEST} == {*SMALL_FILES, *MODELS}
    for name, entry in entries.items():
        assert entry.size_bytes == (bundle / name).stat().st_size
        assert entry.sha256 == sha256_of(bundle / name)


def test_a_bundle_may_be_moved_and_hold_notes_beside_its_files(copy: Path) -> None:
    (copy / "README.md").write_text("our own notes")
    moved = copy.rename(copy.with_name("moved"))
    with Scorer.open(moved) as scorer:
        assert scorer.score([("a", "b")]).shape == (1,)


def test_sealing_twice_changes_nothing_and_any_change_breaks_the_seal(bundle: Path) -> None:
    document = read_manifest(bundle)
    assert seal(document) == document
    for key in document.keys() - {"manifest_sha256"}:
        assert seal({**document, key: "something else"}) != {**document, key: "something else"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_neither_sealed_nor_read(copy: Path, value: float) -> None:
    document = {**read_manifest(copy), "x": value}
    with pytest.raises(ValueError, match="JSON"):
        seal(document)
    del document["manifest_sha256"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    forged = {**document, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (copy / MANIFEST).write_text(json.dumps(forged), encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json was changed after the export"):
        open_bundle(copy)


# Paths that are no bundle


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*/nowhere: it does not exist; .*'cappy export'"):
        open_bundle(tmp_path / "nowhere")


def test_a_file_is_no_bundle(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*model\.onnx: not a folder"):
        open_bundle(bundle / MODEL_FILES["fp32"])


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json; make one with 'cappy export'"):
        open_bundle(tmp_path)


# Manifests


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "cannot be read"),
        (b"not json", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b'{"schema_version": 1', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "has no schema_version"),
        (b'"text"', "has no schema_version"),
        (b"null", "has no schema_version"),
        (b"{}", "has no schema_version"),
        (b'{"schema_version": "1"}', "has no schema_version"),
        (b'{"schema_version": 1}', "was changed after the export"),
        (b'{"schema_version": 1, "manifest_sha256": 5}', "was changed after the export"),
        (b'{"schema_version": 1, "x": NaN}', "was changed after the export"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_manifest_is_refused(copy: Path, content: bytes, problem: str) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=rf"manifest\.json.*{problem}"):
        open_bundle(copy)


def test_a_newer_schema_version_is_refused_with_the_advice_to_upgrade(copy: Path) -> None:
    change_manifest(copy, lambda document: document.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(BundleError, match=rf"schema version {SCHEMA_VERSION + 1}.*reads up to 1: upgrade it"):
        open_bundle(copy)


def test_a_value_changed_without_sealing_is_found(copy: Path) -> None:
    document = read_manifest(copy)
    document["model"]["max_length"] = 511
    (copy / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json was changed after the export.*export the bundle again"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["../x", "onnx/../../x", "/etc/passwd", "..", "..\\x", "C:\\x", "a\0b"])
def test_a_manifest_that_names_a_file_outside_of_the_bundle_is_refused(copy: Path, name: str) -> None:
    (copy.parent / "x").write_bytes(b"1234")
    entry = {"sha256": sha256_of(copy.parent / "x"), "bytes": 4}
    change_manifest(copy, lambda document: document["files"].update({name: entry}))
    with pytest.raises(BundleError, match=r"manifest\.json names a file outside of the bundle: ") as caught:
        open_bundle(copy)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "onnx", "x" * 5000])
def test_a_manifest_that_names_what_is_no_file_is_refused(copy: Path, name: str) -> None:
    change_manifest(copy, lambda document: document["files"].update({name: {"sha256": "0" * 64, "bytes": 4}}))
    with pytest.raises(BundleError):
        open_bundle(copy)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(without("files"), id="no files"),
        pytest.param(without("model"), id="no model"),
        pytest.param(without("precisions"), id="no precisions"),
        pytest.param(without("model", "max_length"), id="no maximum length"),
        pytest.param(without("model", "pad_token_id"), id="no pad token"),
        pytest.param(without("files", "config.json", "bytes"), id="a file without size"),
        pytest.param(without("files", "config.json", "sha256"), id="a file without digest"),
        pytest.param(with_value(None, "model", "max_length"), id="maximum length null"),
        pytest.param(with_value("one", "model", "pad_token_id"), id="pad token not a number"),
        pytest.param(with_value([], "model"), id="model a list"),
        pytest.param(with_value(["config.json"], "files"), id="files a list"),
        pytest.param(with_value("0" * 64, "files", "config.json"), id="a file as its digest"),
        pytest.param(with_value(None, "files", "config.json", "sha256"), id="digest null"),
        pytest.param(with_value(None, "precisions"), id="precisions null"),
        pytest.param(lambda document: document.update(precisions=[], targets={}), id="no precisions for any target"),
        pytest.param(
            with_value(["int8"], "targets", "cuda", "precisions"), id="a precision that a target does not run"
        ),
        pytest.param(with_value({"precisions": ["fp32"]}, "targets", "tpu"), id="unknown target"),
        pytest.param(with_value("fp32", "precisions"), id="precisions a string"),
        pytest.param(with_value(["fp64"], "precisions"), id="unknown precision"),
        pytest.param(with_value([["fp32"]], "precisions"), id="nested precisions"),
        pytest.param(with_value([7], "precisions"), id="a number as precision"),
    ],
)
def test_a_sealed_manifest_that_lacks_what_it_needs_is_refused(copy: Path, change: Change) -> None:
    change_manifest(copy, change)
    with pytest.raises(BundleError, match=r"config\.json|manifest\.json"):
        open_bundle(copy)


def test_a_bundle_without_tokenizer_is_not_complete(copy: Path) -> None:
    change_manifest(copy, lambda document: document["files"].pop("tokenizer.json"))
    with pytest.raises(BundleError, match=r"has no tokenizer\.json; it is not complete"):
        Scorer.open(copy)


# Precisions


def test_a_precision_that_is_not_there_is_refused_and_nothing_else_runs(copy: Path) -> None:
    keep_precisions(copy, "fp32", "fp16")
    with pytest.raises(
        PrecisionUnavailable, match="has no int8 model for cpu, only fp32, fp16; export it with --precision"
    ):
        open_bundle(copy).model("int8")
    with pytest.raises(PrecisionUnavailable):
        Scorer.open(copy, precision="int8")


def test_a_precision_whose_file_the_manifest_does_not_list_is_refused(copy: Path) -> None:
    (copy / MODEL_FILES["int8"]).unlink()
    change_manifest(copy, lambda document: document["files"].pop(MODEL_FILES["int8"]))
    with pytest.raises(BundleError, match=r"model_quantized\.onnx"):
        Scorer.open(copy, precision="int8")


@pytest.mark.parametrize(("key", "value"), [("max_length", 2), ("max_length", -1), ("pad_token_id", -7)])
def test_lengths_and_ids_that_cannot_be_are_refused(copy: Path, key: str, value: int) -> None:
    change_manifest(copy, lambda document: document["model"].update({key: value}))
    with pytest.raises(BundleError, match=f"{key} {value}"):
        open_bundle(copy)


def test_the_first_token_may_be_the_one_for_padding(copy: Path) -> None:
    change_manifest(copy, with_value(0, "model", "pad_token_id"))
    assert open_bundle(copy).manifest.pad_token_id == 0


@pytest.mark.parametrize("value", ["false", 1, [False], None])
def test_only_true_says_that_a_graph_computes_nothing_for_padding(copy: Path, value: object) -> None:
    change_manifest(copy, with_value({"unpadded": value}, "graphs", "fp32"))
    assert ("cpu", "fp32") not in open_bundle(copy).manifest.unpadded


def test_a_name_that_is_not_unicode_is_refused(copy: Path) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    change_manifest(copy, lambda document: document["files"].update({"\ud800": entry}))
    with pytest.raises(BundleError, match="outside of the bundle"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000])
def test_a_name_that_no_folder_can_have_is_not_a_bundle(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*: File name too long"):
        open_bundle(tmp_path / name)
