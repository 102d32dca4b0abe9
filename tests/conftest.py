"""Share what the tests of every room need. A room's own conftest.py says which bundle its tests get."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import DATA

collect_ignore = ["clients", "clusters"]
"""They run in environments of their own, with `make clients` and `make others`."""

LONGEST = (
    "contracts/test_mini.py",
    "contracts/test_docs.py",
    "bench/test_loop.py",
    "export/test_processes.py",
    "bench/test_bench_commands.py",
    "contracts/test_mini_training.py",
    "contracts/test_install.py",
    "contracts/test_gpu_environment.py",
    "export/test_publish.py",
    "bench/test_gpu_check.py",
    "export/test_stopped_training.py",
    "export/test_architectures.py",
    "export/test_families.py",
    "export/test_hub.py",
    "export/test_gpu_models.py",
)
"""The files that take longest (`pytest --durations`). Processes share tests by files: at the end none waits for one."""

# A shell's background job ignores Ctrl-C, nohup's hangups; the commands that a test starts would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the others follow in their order."""
    tests = Path(__file__).parent
    places = {str(tests / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `cappy tune` found on this machine from the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPPY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def roberta_tokenizer_files() -> Path:
    """Give the folder of the genuine RoBERTa tokenizer; skips where the data is not present."""
    folder = DATA / "roberta-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"needs the genuine RoBERTa tokenizer in {folder}")
    return folder
