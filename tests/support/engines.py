"""A runtime that keeps engines as ONNX Runtime does, and the facts of one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cappy_engine.gpu.engines import engine_facts, engine_key

GPU = {"name": "some GPU", "compute_capability": "9.0", "driver": "580.95"}
VERSIONS = {"tensorrt": "10.13", "onnxruntime": "1.31.1"}
OPTIONS = {"trt_fp16_enable": "True", "trt_engine_cache_path": "/here", "trt_timing_cache_path": "/here"}
SAME: dict[str, Any] = {
    "model_sha256": ["ab" * 32, "cd" * 32],
    "precision": "fp16",
    "profile_text": "input_ids:1x16",
    "options": OPTIONS,
    "gpu": GPU,
    "versions": VERSIONS,
}
FACTS = engine_facts(**SAME)
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


def kept(root: Path) -> list[str]:
    """The names of all in `root` but for the locks."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")
