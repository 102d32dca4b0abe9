"""Name the folders that tests read: the clone, cappy-mini's checkpoint, the tiny bundle, and real data if present."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cappy_engine.options import Precision

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "export" / "cappy_mini" / "checkpoint"
"""The checkpoint of cappy-mini: small, with really trained weights."""
SUPPORT = ROOT / "tests" / "support"
TINY = SUPPORT / "tiny-bundle"
"""A bundle of random weights, for every device. Read-only; `make_tiny_bundle.py` made it."""
TINY_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
"""The CPU's precisions in it: it is older than bf16."""
DATA = Path(os.environ.get("CAPPY_DATA", ROOT.parent / "shared" / "data"))
"""Real data, where present: the genuine RoBERTa tokenizer and PromptSource pairs."""


def parity_pairs() -> list[tuple[str, str]]:
    """Read the exporter's own parity pairs, for tests that run without the exporter."""
    lines = (ROOT / "export" / "cappy_export" / "proof" / "parity_pairs.jsonl").read_text(encoding="utf-8")
    rows = map(json.loads, lines.split("\n")[:-1])
    return [(row["instruction"], row["response"]) for row in rows]


def write_short_parity_pairs(path: Path) -> Path:
    """Write the parity pairs, cut for an export that is to be proven sooner, as JSON Lines; returns `path`."""
    rows = [{"instruction": pair[0][:40], "response": pair[1][:20]} for pair in parity_pairs()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_rows(name: str) -> list[dict[str, Any]]:
    """Read the rows of a packed file of `DATA`; skips the test where it is not there."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
