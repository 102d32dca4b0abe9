"""Make a tiny checkpoint and its bundle with the real exporter, once for all processes of a test run.

A conftest.py that imports these fixtures gives them to the tests of its room.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_bench.make_checkpoint import make_checkpoint
from cappy_engine.storage import locked
from cappy_export import ExportOptions, export


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Give the folder `name` of this test run; the first process that asks for it lets `make` write it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has a folder in it
    made, making = folder / "made-once" / name, folder / "making" / name
    for parent in (made.parent, making.parent):
        parent.mkdir(exist_ok=True)
    with locked(folder / f"{name}.lock", wait=True):
        if not made.exists():
            make(making)
            making.rename(made)
    return made


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a RoBERTa of 2 layers with one label, in all three formats. It is read-only."""

    def make(folder: Path) -> None:
        make_checkpoint(folder, size="tiny", formats=["safetensors", "bin", "msgpack"])

    return made_once(tmp_path_factory, "tiny", make)


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the bundle of `checkpoint` in fp32, fp16, bf16 and int8. It is read-only: copy it to break it."""

    def make(folder: Path) -> None:
        export(checkpoint, folder, ExportOptions(precisions=("fp32", "fp16", "bf16", "int8")))

    return made_once(tmp_path_factory, "tiny-exported", make)


@pytest.fixture(scope="session")
def gpu_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the bundle of `checkpoint` for the CPU and both GPU targets, in every precision that each runs."""

    def make(folder: Path) -> None:
        export(
            checkpoint, folder, ExportOptions(precisions=("fp32", "fp16", "int8"), targets=("cpu", "cuda", "tensorrt"))
        )

    return made_once(tmp_path_factory, "tiny-for-gpus", make)
