"""Where a checkpoint comes from: a folder, or the hub, from where only the needed files come."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.checkpoints.hub import CROSS_ENCODER_FILES, OTHER_INPUTS
from tests.support.checkpoints import FILES, copy
from tests.support.hub import hub, hub_environment, run_open


def test_safetensors_come_before_bin_before_msgpack(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    for name, file in FILES.items():
        opened = open_checkpoint(folder)
        assert (opened.format, opened.weight_files) == (name, (file,))
        (folder / file).unlink()
    with pytest.raises(
        CheckpointError, match=r"no weights.*model\.safetensors, pytorch_model\.bin, flax_model\.msgpack"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_cannot_name_files_elsewhere(checkpoint: Path, tmp_path: Path, shard: str) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    shutil.copyfile(checkpoint / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_checkpoint(folder)


@pytest.mark.slow
def test_a_hub_id_downloads_one_format_and_is_recorded_with_its_commit(
    checkpoint: Path, preloaded: Path, tmp_path: Path
) -> None:
    def run_export(source: str, bundle: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
        command = [str(preloaded / "cappy"), "export", source, str(bundle)]
        environment = hub_environment(endpoint, tmp_path / "home")
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    asked: list[str] = []
    (repository := tmp_path / "repository").mkdir()
    for path in checkpoint.iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, repository / path.name)
    (repository / "modeling_evil.py").write_text("raise SystemExit")
    with hub({"someone/cappy-tiny": repository}, asked) as endpoint:
        done = run_export("someone/cappy-tiny", tmp_path / "bundle", endpoint)
        assert done.returncode == 0, done.stderr
        missing = run_export("someone/else", tmp_path / "other", endpoint)
    source = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["source"]
    assert (source["name"], source["format"]) == ("someone/cappy-tiny", "bin")
    assert source["revision"] == "0123456789abcdef0123456789abcdef01234567"
    fetched = {path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
    assert "pytorch_model.bin" in fetched
    assert not fetched & {"flax_model.msgpack", "modeling_evil.py"}
    assert missing.returncode == 1
    assert "neither a local folder nor a hub checkpoint" in missing.stderr


@pytest.mark.slow
def test_offline_a_downloaded_checkpoint_is_used_with_its_commit_and_others_are_errors(
    checkpoint: Path, preloaded: Path, tmp_path: Path
) -> None:
    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "home"
    with hub({"someone/cappy-tiny": checkpoint}, []) as endpoint:
        (online,) = run_open(
            preloaded / "python", ("someone/cappy-tiny", None), environment=hub_environment(endpoint, home)
        )
    offline = hub_environment(endpoint, home, offline=True)
    name = "someone/cappy-tiny"
    asked = ((name, None), (name, commit), (name, "v2"), ("someone/else", None))
    found = run_open(preloaded / "python", *asked, environment=offline)
    assert found[:2] == [online, online]
    assert online[:2] == [commit, ["model.safetensors"]]
    assert "someone/cappy-tiny at revision v2 is not downloaded, and HF_HUB_OFFLINE is set" in found[2]
    assert "someone/else is not downloaded, and HF_HUB_OFFLINE is set; unset it, download it first" in found[3]


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_known_for_one(preloaded: Path, tmp_path: Path) -> None:
    (repository := tmp_path / "repository").mkdir()
    (repository / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (repository / "adapter_model.safetensors").write_bytes(b"")
    with hub({"someone/adapter": repository}, []) as endpoint:
        environment = hub_environment(endpoint, tmp_path / "home")
        (found,) = run_open(preloaded / "python", ("someone/adapter", None), environment=environment)
    assert "someone/adapter holds an adapter of PEFT" in found


@pytest.mark.slow
def test_files_that_tell_of_more_than_the_model_come_from_the_hub(
    checkpoint: Path, preloaded: Path, tmp_path: Path
) -> None:
    repository, told = copy(checkpoint, tmp_path / "repository"), {"chat_template.jinja", *CROSS_ENCODER_FILES}
    for name in told | set(OTHER_INPUTS):
        (repository / name).write_text("{}")
    with hub({"someone/cappy-tiny": repository}, []) as endpoint:
        environment = hub_environment(endpoint, tmp_path / "home")
        ((_, _, files),) = run_open(preloaded / "python", ("someone/cappy-tiny", None), environment=environment)
    assert told | set(OTHER_INPUTS) <= set(files)


class Leaving(list[str]):
    """What a hub was asked that answers one question, and then no more."""

    def append(self, path: str) -> None:
        super().append(path)
        if len(self) > 1:
            raise ConnectionError("the hub went away")


@pytest.mark.slow
def test_an_older_download_is_not_taken_for_the_commit_that_the_hub_told(
    checkpoint: Path, preloaded: Path, tmp_path: Path
) -> None:
    name, commit, asked = "someone/cappy-tiny", "0123456789abcdef0123456789abcdef01234567", Leaving()
    with hub({name: checkpoint}, []) as endpoint:
        run_open(preloaded / "python", (name, None), environment=hub_environment(endpoint, tmp_path / "home"))
    cache = tmp_path / "home" / "hub" / "models--someone--cappy-tiny"
    (cache / "snapshots" / commit).rename(cache / "snapshots" / ("f" * 40))
    (cache / "refs" / "main").write_text("f" * 40)
    with hub({name: checkpoint}, asked) as endpoint:
        (found,) = run_open(
            preloaded / "python", (name, None), environment=hub_environment(endpoint, tmp_path / "home")
        )
    assert len(asked) > 1
    assert found == f"{name} is at commit {commit}, but only {'f' * 40} is downloaded; run it again"
