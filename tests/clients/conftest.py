"""Start `cappy serve` for clients that people have. They run in an environment of their own: `make clients`.

CAPPY names the command of the engine's environment. Expected scores are those that its `cappy score` writes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

KEY = "a-key-that-only-these-tests-have"
QUESTION = "What is the capital of the United States?"
DOCUMENTS = [
    "Carson City is the capital city of the American state of Nevada.",
    "Washington, D.C. is the capital of the United States.",
    "Capital punishment has existed in the United States since before it was a country.",
    "Die Hauptstadt der Vereinigten Staaten ist Washington, größer als früher 🙂",
    "Washington, D.C. is the capital of the United States.",
    "I do not know.",
    "word " * 700,
]
"""With one twice, one that no Latin alphabet holds, and one that is too long."""


@dataclass(frozen=True)
class Server:
    """A running server. `scores` are the offline scores of DOCUMENTS, `order` their places, best first."""

    url: str
    scores: list[float]

    @property
    def order(self) -> list[int]:
        return sorted(range(len(self.scores)), key=lambda place: -self.scores[place])

    @property
    def ranked(self) -> list[tuple[int, float]]:
        return [(place, self.scores[place]) for place in self.order]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="session")
def cappy() -> str:
    """Name the command of the environment in which the engine is installed."""
    command = os.environ.get("CAPPY")
    if not command:
        pytest.fail("set CAPPY to the engine's command, as `make clients` does")
    return str(Path(command).absolute())


@pytest.fixture(scope="session")
def server(cappy: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve cappy-mini behind a key, on any free port."""
    folder = tmp_path_factory.mktemp("server")
    keys, log = folder / "keys.txt", folder / "server.log"
    keys.write_text(KEY, encoding="ascii")
    command = [cappy, "serve", "--port", "0", "--api-key-file", str(keys)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            url = _address(process, log)
            yield Server(url, offline_scores(cappy, folder, [(QUESTION, document) for document in DOCUMENTS]))
        finally:
            process.terminate()
            status = process.wait(timeout=30)
    assert status == 0, log.read_text(encoding="utf-8")
    assert "Traceback" not in log.read_text(encoding="utf-8")


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server is ready, and return its address."""
    transport = httpx.HTTPTransport(retries=5)
    with httpx.Client(transport=transport) as client:
        for _ in range(600):
            found = re.search(r"http://[\d.]+:\d+", log.read_text(encoding="utf-8"))
            if found and client.get(f"{found[0]}/ready").status_code == 200:
                return found[0]
            try:
                process.wait(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                continue
    pytest.fail(f"the server is not ready: {log.read_text(encoding='utf-8')}")


def offline_scores(cappy: str, folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """Score pairs with `cappy score`, without a server."""
    source = folder / "pairs.jsonl"
    rows = [{"instruction": instruction, "response": response} for instruction, response in pairs]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = subprocess.run([cappy, "score", str(source)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line)["score"] for line in done.stdout.decode().split("\n")[:-1]]
