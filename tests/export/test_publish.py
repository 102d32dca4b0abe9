"""A bundle appears complete or not at all: nothing half-written is left, and nothing else is replaced."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cappy_engine.bundle import open_bundle
from cappy_engine.cli.main import main
from cappy_engine.errors import CheckpointError, OutputError, ParityError
from cappy_export import ExportOptions, export, pipeline
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.checkpoints.refusals import refusing
from tests.support.bundles import copy_bundle
from tests.support.checkpoints import copy, edit


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STEPS = [
    "cpu_models.build_graph",
    "cpu_models.convert_to_half",
    "cpu_models.quantize",
    "pipeline.prove",
    "pipeline.require",
    "manifest.write_json",
    "pipeline.publish",
]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_no_bundle_and_no_litter(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"cappy_export.{step}", fail)
    with pytest.raises(OSError, match="no space left"):
        export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("fp32", "fp16", "int8")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("said", ["building", "quantising", "scoring 279 pairs in fp32", "scoring 279 pairs in int8"])
def test_kill_9_leaves_no_bundle_and_the_next_export_works(
    checkpoint: Path, preloaded: Path, tmp_path: Path, said: str
) -> None:
    command = [str(preloaded / "cappy"), "export", str(checkpoint), str(tmp_path / "bundle")]
    command += ["--precision", "fp32", "--precision", "int8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # until it has ended, and with it the program that it stands for
            if line.startswith(said):
                time.sleep(0.05)
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    assert main(command[1:]) == 0
    open_bundle(tmp_path / "bundle")


def test_force_never_replaces_what_is_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a bundle"):
        export(checkpoint, folder, force=True)
    assert (folder / "chapter.txt").read_text() == "years of work"


def test_a_checkpoint_is_never_replaced_by_its_own_bundle(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "models" / "copy"))
    for target in (copy, copy.parent):
        (target / "manifest.json").write_text("{}")
        with pytest.raises(OutputError, match="is, holds or lies in the input"):
            export(copy, target, force=True)
    assert (copy / "model.safetensors").exists()


def test_a_checkpoint_in_the_hubs_cache_is_never_replaced_by_its_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    copy = Path(shutil.copytree(checkpoint, cache / "tiny"))
    (cache / "manifest.json").write_text("{}")
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda source, revision: open_checkpoint(copy))
    with pytest.raises(OutputError, match="is, holds or lies in the input"):
        export("someone/tiny", cache, force=True)
    assert (copy / "model.safetensors").exists()


@pytest.mark.slow
def test_a_bundle_that_appears_during_the_export_is_kept(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def say(text: str) -> None:
        if text.startswith("scoring 279 pairs in fp32"):
            copy_bundle(target, source=bundle)

    with pytest.raises(OutputError, match="exists"):
        export(checkpoint, target, say=say)
    assert tree(target) == tree(bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_the_old_bundle_is_put_back_if_the_new_one_cannot_take_its_name(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    copy = copy_bundle(tmp_path / "bundle", source=bundle)
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


def test_a_place_where_nothing_can_be_written_is_found_before_pytorch_scores(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "score_with_torch", lambda *_, **__: pytest.fail("minutes of work come first"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        export(checkpoint, tmp_path / "file" / "bundle")


def test_a_full_disk_is_found_before_pytorch_scores(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(pipeline, "score_with_torch", lambda *_, **__: pytest.fail("minutes of work come first"))
    with pytest.raises(
        OutputError, match=r"has 0\.3 MB left, and the fp32 model alone takes 0\.\d MB; free some space"
    ):
        export(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_asks_for_more_than_the_disk_has_is_said_not_to_fit(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(vocab_size=2**31 - 1))
    for options in (ExportOptions(), ExportOptions(precisions=("fp16",)), ExportOptions(targets=("cuda",))):
        with pytest.raises(CheckpointError, match=r"the weights do not fit config\.json"):
            export(folder, tmp_path / "bundle", options)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        Exception("Disk quota exceeded (os error 122)"),
    ],
)
def test_a_disk_that_is_full_later_is_not_the_tokenizers_fault(error: Exception) -> None:
    """The last two are what the tokenizers library raises."""
    with pytest.raises(OSError, match=r"No space|quota"), refusing("the tokenizer cannot be put into a bundle"):
        raise error


@pytest.mark.slow
def test_what_a_killed_export_left_is_pointed_out(checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / ".bundle.partial-abc"
    left.mkdir()
    said: list[str] = []
    export(checkpoint, tmp_path / "bundle", say=said.append)
    assert any(str(left) in text for text in said)
    assert left.exists()


@pytest.mark.slow
def test_sigterm_leaves_nothing_at_all(checkpoint: Path, preloaded: Path, tmp_path: Path) -> None:
    command = [str(preloaded / "cappy"), "export", str(checkpoint), str(tmp_path / "bundle")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("building"):
                process.terminate()
    assert process.returncode == 128 + signal.SIGTERM, "".join(told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_existing_bundle_is_kept_without_force(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle", source=bundle)
    before = tree(copy)
    with pytest.raises(OutputError, match="exists; choose another name, or replace it with --force"):
        export(checkpoint, copy)
    assert tree(copy) == before


@pytest.mark.slow
def test_force_replaces_only_by_a_proven_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle", source=bundle)
    before = tree(copy)
    with pytest.raises(ParityError):
        export(checkpoint, copy, ExportOptions(limits=("fp32.max_error=1e-12",)), force=True)
    assert tree(copy) == before
    export(checkpoint, copy, force=True)
    assert open_bundle(copy).manifest.precisions == ("fp32",)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
