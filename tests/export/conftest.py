"""Give the exporter's tests a checkpoint, the bundle that is exported from it here, and its fused graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.graphs.optimum import build_fused_graph
from tests.support.cores import one_core
from tests.support.exported import bundle, checkpoint, gpu_bundle
from tests.support.preloaded import preloaded

__all__ = ["bundle", "checkpoint", "fused", "gpu_bundle", "one_core", "preloaded"]


@pytest.fixture(scope="session")
def fused(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the fused graph of the tiny checkpoint, from which its fp16 is made."""
    path = tmp_path_factory.mktemp("fused") / "fused.onnx"
    _, facts = build_fused_graph(open_checkpoint(checkpoint), path)
    assert (facts["written_by"], facts["unpadded"]) == ("optimum", False)
    return path
