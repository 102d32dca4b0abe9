"""`cappy inspect` and `cappy slim`: what a bundle holds, and that it holds less and scores the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import MANIFEST, open_bundle
from cappy_engine.cli.main import main
from cappy_engine.errors import BundleError, PrecisionUnavailable
from cappy_engine.slim import slim
from tests.support.bundles import add_file, change_manifest, copy_bundle, read_manifest
from tests.support.command_line import CAPPY, in_shell


def test_inspect_prints_what_the_bundle_is(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for fact in ("RobertaForSequenceClassification, 2 layers", "onnx/model_fp16.onnx", "parity with PyTorch", "int8"):
        assert fact in captured.out


def test_inspect_prints_the_manifest_as_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_manifest(bundle)


# slim


PAIRS = [("Is the sky blue?", "Yes"), ("Is the sky blue?", "No"), ("Où?", "word " * 40)]


def test_what_is_kept_scores_as_before(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parent" / "small"
    assert main(["slim", str(bundle), "--keep", "int8", "--target", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "onnx/model.onnx" in printed
    assert f"wrote {out}" in printed
    small = open_bundle(out).manifest
    assert small.precisions == ("int8",)
    assert not small.targets
    with Scorer.open(bundle, device="cpu", precision="int8") as before, Scorer.open(out) as after:
        assert after.info.precision == "int8"
        assert after.score(PAIRS).tolist() == before.score(PAIRS).tolist()
    assert sorted(path.name for path in (tmp_path / "parent").iterdir()) == ["small"]


def test_nothing_is_removed_from_a_folder_that_a_bundle_links_to(bundle: Path, tmp_path: Path) -> None:
    copy, shared = copy_bundle(tmp_path / "copy"), tmp_path / "shared"
    (copy / "onnx").rename(shared)
    (copy / "onnx").symlink_to(shared)
    before = sorted(shared.iterdir()), read_manifest(copy)
    with pytest.raises(BundleError, match=r"onnx in bundle .* is a link to another folder, in which nothing"):
        slim(copy, precisions=["int8"])
    assert (sorted(shared.iterdir()), read_manifest(copy)) == before
    assert slim(copy, precisions=["int8"], targets=["cpu"], out=tmp_path / "small")["precisions"] == ["int8"]


def test_the_manifest_says_no_more_of_what_was_removed(bundle: Path, tmp_path: Path) -> None:
    before = read_manifest(bundle)
    after = slim(bundle, precisions=["fp32", "fp16"], targets=["cpu", "cuda"], out=tmp_path / "small")
    assert after == read_manifest(tmp_path / "small")
    assert after["precisions"] == list(after["graphs"]) == list(after["parity"]["precisions"]) == ["fp32", "fp16"]
    assert list(after["targets"]) == list(after["parity"]["targets"]) == ["cuda"]
    assert {target: list(found) for target, found in after["canary"]["tolerance"].items()} == {
        "cpu": ["fp32", "fp16"],
        "cuda": ["fp32", "fp16"],
    }
    assert after["canary"]["pairs"] == before["canary"]["pairs"]
    assert after["parity"]["precisions"]["fp32"] == before["parity"]["precisions"]["fp32"]
    assert {name: before["files"][name] for name in after["files"]} == after["files"]
    assert {path.relative_to(tmp_path / "small").as_posix() for path in files_in(tmp_path / "small")} == {
        *after["files"],
        MANIFEST,
    }


def test_without_out_the_bundle_itself_becomes_smaller(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    assert main(["slim", str(copy), "--keep", "fp16", "--target", "cuda"]) == 0
    assert [path.name for path in files_in(copy) if path.suffix == ".onnx"] == ["model_fp16.onnx"]
    manifest = open_bundle(copy).manifest
    assert (manifest.precisions, manifest.targets) == ((), {"cuda": ("fp16",)})
    assert main(["inspect", str(copy)]) == 0


def test_weights_beside_a_model_go_with_it(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    change_manifest(copy, lambda document: add_file(copy, document, "onnx/model.onnx_data", b"weights"))
    assert "onnx/model.onnx_data" in slim(copy, precisions=["fp32"], out=tmp_path / "fp32")["files"]
    assert "onnx/model.onnx_data" not in slim(copy, precisions=["int8"])["files"]
    assert not (copy / "onnx" / "model.onnx_data").exists()


@pytest.mark.parametrize(
    ("options", "status", "problem"),
    [
        ([], 2, "name what is kept: --keep int8, or --target cpu"),
        (["--keep", "fp32,int8"], 2, "repeat the option: --keep fp32 --keep int8"),
        (["--keep", "int8", "--force"], 2, "--force replaces OUT; name it with --out"),
        (["--keep", "int8", "--target", "cuda"], 1, "nothing would be left of bundle"),
        (["--keep", "int8", "--out", "."], 1, ". exists; choose another name, or replace it with --force"),
    ],
)
def test_a_bundle_with_nothing_left_or_over_another_folder_is_refused(
    options: list[str], status: int, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    before = files_in(copy)
    assert main(["slim", str(copy), *options]) == status
    assert problem in capsys.readouterr().err
    assert files_in(copy) == before


def test_what_the_bundle_does_not_have_cannot_be_kept(bundle: Path, tmp_path: Path) -> None:
    slim(bundle, precisions=["fp32"], targets=["cpu"], out=tmp_path / "small")
    with pytest.raises(PrecisionUnavailable, match=r"has no model of the precision 'int8', only fp32 for cpu"):
        slim(tmp_path / "small", precisions=["fp32", "int8"])
    with pytest.raises(PrecisionUnavailable, match=r"has no model of the target 'cuda', only fp32 for cpu"):
        slim(tmp_path / "small", targets=["cuda"])


def test_force_replaces_a_bundle_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, out, notes = copy_bundle(tmp_path / "bundle"), copy_bundle(tmp_path / "old"), tmp_path / "notes"
    notes.mkdir()
    for target, problem in ((out, ""), (notes, "is not a bundle"), (copy, "is, holds or lies in the input")):
        assert main(["slim", str(copy), "--keep", "int8", "--out", str(target), "--force"]) == bool(problem)
        assert problem in capsys.readouterr().err
    assert open_bundle(out).manifest.precisions == ("int8",)
    assert len(open_bundle(copy).manifest.precisions) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "notes", "old"]
    with pytest.raises(ValueError, match="no out was given"):
        slim(copy, precisions=["int8"], force=True)


def test_the_old_bundle_stays_if_the_new_one_cannot_be_made(tmp_path: Path) -> None:
    copy, out = copy_bundle(tmp_path / "bundle"), copy_bundle(tmp_path / "old")
    (copy / "merges.txt").unlink()
    before = read_manifest(out)
    with pytest.raises(BundleError, match=r"merges\.txt"):
        slim(copy, precisions=["int8"], out=out, force=True)
    assert read_manifest(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "old"]


def test_a_damaged_model_is_not_passed_on(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    model = copy / "onnx" / "model_quantized.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"model_quantized\.onnx"):
        slim(copy, precisions=["int8"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_names_are_gone_through_once_and_one_text_is_not_a_list_of_them(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    assert slim(bundle, precisions=iter(["int8"]), targets=iter(["cpu"]), out=out)["precisions"] == ["int8"]  # type: ignore[arg-type]
    for name, wrong in (("precisions", "int8"), ("targets", "cpu"), ("precisions", "")):
        with pytest.raises(ValueError, match=f"{name} must be a list of words, got str"):
            slim(bundle, **{name: wrong}, out=tmp_path / "other")  # type: ignore[arg-type]


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a tmpfs of its own")
def test_a_full_disk_is_an_error_that_names_the_file_on_it(bundle: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = f"{CAPPY} slim {bundle} --out {small}/slim --keep fp32"
    done = in_shell(
        f"unshare -rm bash -c 'mount -t tmpfs -o size=16k tmpfs {small} && {command}; ls -A {small}'", tmp_path
    )
    error = done.stderr.decode()
    if "unshare" in error or "mount:" in error:
        pytest.skip("needs the right to mount")
    assert re.fullmatch(rf"cappy slim: \S+ to {small}/\S+: No space left on device\n", error)
    assert done.stdout == b""


def test_a_manifest_that_cannot_be_written_is_named_and_the_bundle_stays(bundle: Path, tmp_path: Path) -> None:
    copied = copy_bundle(tmp_path / "bundle", source=bundle)
    done = in_shell(f"ulimit -f 1; {CAPPY} slim {copied} --keep fp32", tmp_path)
    assert done.stderr.decode() == f"cappy slim: {copied}/manifest.json: File too large\n"
    assert read_manifest(copied) == read_manifest(bundle)
