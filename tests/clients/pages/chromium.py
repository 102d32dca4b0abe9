"""Start headless Chromium and a server; look at pages as a person would, and hear what the browser complains of."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

SECONDS = 30
EXPECTED = re.compile(r"Failed to load resource: (net::ERR_FAILED|.* a status of (?!404)[45]\d\d)")
"""Chromium says so of each refusal and hang-up; the page says it to the person."""


@contextmanager
def served(cappy: str, log: Path, *options: str) -> Iterator[str]:
    """Run `cappy serve` on a free port of the loopback, and give its address; its log is written to `log`."""
    with log.open("wb") as out:
        server = subprocess.Popen([cappy, "serve", "--port", "0", *options], stdout=out, stderr=out)
    try:
        until = time.monotonic() + SECONDS
        while not (found := re.search(r"serving on (http://\S+)", log.read_text(errors="replace"))):
            is_starting = server.poll() is None and time.monotonic() < until
            assert is_starting, log.read_text(errors="replace")
            time.sleep(0.05)
        yield f"{found[1]}/"
    finally:
        server.terminate()
        server.wait(SECONDS)


def asked(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask the server for a ranking without the page."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}v1/rank", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return dict(json.load(answer))


@contextmanager
def launched() -> Iterator[Browser]:
    """Start Debian's Chromium; as root, which tests in containers are, it has no sandbox."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "no chromium; run apt-get install chromium, or set CHROMIUM to its path"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


def listen(page: Page) -> tuple[list[str], list[str]]:
    """Collect what the browser complains of, and the addresses that it asks."""
    complaints: list[str] = []
    addresses: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
    page.on("request", lambda request: addresses.append(request.url))
    return complaints, addresses
