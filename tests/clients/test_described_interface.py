"""schemathesis: requests made of /openapi.json are answered as it says, also the ones that it says are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.clients.conftest import KEY, Server

CHECKS_LEFT_OUT = "positive_data_acceptance"
"""Some rules are not JSON Schema's: as many texts as texts, no more tokens than the model takes."""


def test_no_answer_is_an_error_of_the_server_or_of_another_shape(server: Server, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text('[parameters]\n"path.name" = "cappy-mini"\n', encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{server.url}/openapi.json",
        *("--header", f"Authorization: Bearer {KEY}"),
        *("--exclude-checks", CHECKS_LEFT_OUT),
        *("--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "10"),
        *("--workers", "2"),
        *("--request-timeout", "10"),
        "--generation-deterministic",
        "--continue-on-failure",
        "--no-color",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 17" in done.stdout
