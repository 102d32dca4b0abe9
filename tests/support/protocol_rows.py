"""Make rows of the paper's two protocols, as `cappy render` and `cappy sample` write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

DECODINGS = ["beam", "sampling", "sampling", "top-k"]


def choice(dataset: str, index: int, label: object, *, template: str = "t", response: str = "r") -> Row:
    """A candidate of PromptSource's protocol."""
    return {
        "dataset_name": dataset,
        "template_name": template,
        "example_idx": index,
        "instruction": f"{dataset} {template} {index}",
        "response": response,
        "label": label,
    }


def samples(task: str, texts: Sequence[str], references: Sequence[str], log_likelihoods: Sequence[float]) -> Row:
    """An example of the BIG-Bench protocol, with four samples."""
    return {
        "dataset": task,
        "instruction": f"{task}: which dogs?",
        "references": list(references),
        "samples": list(texts),
        "decodings": DECODINGS,
        "log_likelihoods": list(log_likelihoods),
        "token_counts": [len(text.split()) + 1 for text in texts],
    }


GOOD = samples("alpha", ["the dogs", "dogs", "cats", ""], ["the dogs"], [-1.0, -2.0, -0.5, -3.0])


def lines_of(rows: Sequence[Row]) -> list[bytes]:
    """The rows as lines of JSON Lines."""
    return [json.dumps(row).encode() + b"\n" for row in rows]


def write(folder: Path, rows: Sequence[Row], name: str = "tasks.jsonl") -> Path:
    """Write rows into a file of `folder`, which is made; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"".join(lines_of(rows)))
    return folder
