"""What most tests need: a tiny checkpoint of Cappy's shape, its bundle in every precision, the real data if present."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cappy_bench.make_checkpoint import make_checkpoint
from cappy_export import export
from tests.support.places import DATA


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `cappy tune` found on this machine must not decide what the tests see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPPY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa of 2 layers with one label, in all three formats."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "tiny", size="tiny", formats=["safetensors", "bin", "msgpack"]
    )


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `checkpoint` in fp32, fp16 and int8. Treat it as read-only; copy it to break it."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    export(checkpoint, path, precisions=["fp32", "fp16", "int8"])
    return path


@pytest.fixture(scope="session")
def roberta_tokenizer_files() -> Path:
    """The folder of the genuine RoBERTa tokenizer; skips where the data is not present."""
    folder = DATA / "roberta-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"needs the genuine RoBERTa tokenizer in {folder}")
    return folder
