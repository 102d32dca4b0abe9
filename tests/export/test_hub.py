"""Where a checkpoint comes from: a folder, or the hub, from where only the needed files come."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import open_checkpoint
from tests.support.checkpoints import FILES, copy


@contextmanager
def hub(repositories: dict[str, Path], asked: list[str]) -> Iterator[str]:
    """A hub on this machine, as far as its client needs one: lists and serves the files of `repositories`."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            for name, folder in repositories.items():
                if self.path.startswith(f"/api/models/{name}"):
                    files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                    return self.answer(json.dumps({"id": name, "sha": commit, "siblings": files}).encode())
                if self.path.startswith(f"/{name}/resolve/{commit}/"):
                    return self.answer((folder / self.path.rsplit("/", 1)[1]).read_bytes())
            return self.answer(b"Repository not found", status=404)

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hash(body):x}"')
            self.send_header("X-Repo-Commit", commit)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def hub_environment(endpoint: str, home: Path, *, offline: bool = False) -> dict[str, str]:
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **own}


def run_open(python: Path, *asked: tuple[str, str | None], environment: dict[str, str]) -> Any:
    """What `open_checkpoint` says in a process of its own, since the hub's client reads its environment once:
    [commit, weight files, files] for each source and revision, or the error's text.
    """
    code = """
import json, sys
from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import open_checkpoint
def opened(source, revision):
    try:
        found = open_checkpoint(source, revision=revision)
    except CheckpointError as error:
        return str(error)
    return [found.revision, found.weight_files, sorted(path.name for path in found.folder.iterdir())]
print(json.dumps([opened(source, revision) for source, revision in json.loads(sys.argv[1])]))
"""
    command = [str(python), "-c", code, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
