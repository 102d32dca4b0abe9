"""Give the GPU's tests a bundle for GPUs, and a folder for engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine.bundle import Bundle
from cappy_engine.gpu.engines import EngineCache
from tests.support.engines import FACTS, KEY, Runtime
from tests.support.gpus import write_gpu_bundle


@pytest.fixture
def sealed(tmp_path: Path) -> Bundle:
    """Give a sealed bundle with models for CUDA and TensorRT, which only a fake can open."""
    return write_gpu_bundle(tmp_path / "bundle")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Name the folder where engines are kept."""
    return tmp_path / "cache" / "engines"


@pytest.fixture
def folder(root: Path) -> Path:
    """Name the folder of an engine that is kept under KEY."""
    EngineCache(root).open(FACTS, Runtime().session)
    return root / KEY
