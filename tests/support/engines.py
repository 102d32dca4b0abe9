"""A runtime that keeps engines as ONNX Runtime does, and the facts of one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cappy_engine.gpu.engines import engine_key

FACTS: dict[str, Any] = {
    "model_sha256": ["ab" * 32, "cd" * 32],
    "precision": "fp16",
    "profile": "1 to 4 x 16",
    "options": {"trt_fp16_enable": "True"},
    "gpu": {"name": "some GPU", "compute_capability": "9.0", "memory_bytes": 2**30},
    "versions": {"tensorrt": "10.13", "onnxruntime": "1.31.1", "driver": "13.0"},
}
KEY = engine_key(FACTS)
ENGINE = "model_sm90.engine"


class Runtime:
    """Keeps engines as ONNX Runtime does: takes the one of the right name, whatever its weights, else builds it.

    A "session" is the engine's content; `found` is what lay in the folder each time one was opened.
    """

    def __init__(self, weights: str = "weights") -> None:
        self.weights = weights
        self.found: list[list[str]] = []

    def session(self, folder: Path) -> str:
        self.found.append(sorted(path.name for path in folder.iterdir()))
        engine = folder / ENGINE
        if not engine.exists():
            engine.write_text(f"engine of {self.weights}")
            (folder / "model.timing").write_text("timing")
        return engine.read_text()


def kept(root: Path) -> set[str]:
    """The names of all in `root` but for the locks."""
    return {path.name for path in root.iterdir() if path.suffix != ".lock"}
