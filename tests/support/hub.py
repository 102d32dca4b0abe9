"""A hub on this machine, and what `open_checkpoint` makes of it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


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
                    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
                    files = [{"rfilename": path.as_posix()} for path in paths]
                    return self.answer(json.dumps({"id": name, "sha": commit, "siblings": files}).encode())
                prefix = f"/{name}/resolve/{commit}/"
                if self.path.startswith(prefix):
                    return self.answer((folder / self.path.removeprefix(prefix)).read_bytes())
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
