"""Start Ray clusters on this machine, and Parquet files for them. `make others` runs these tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "disabled",
}
pytest.importorskip("ray")

ROWS, FILES = 200, 24
CAPPY = Path(sys.executable).with_name("cappy")


STARTS = 4
"""How often a node is started: Ray gives it 30 seconds, also where all cores are busy."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Start two nodes with one core each."""
    from ray.cluster_utils import Cluster

    for left in reversed(range(STARTS)):
        made = Cluster()
        try:
            made.add_node(num_cpus=1, include_dashboard=False)
            made.add_node(num_cpus=1)
            break
        except Exception:  # Ray raises no other
            made.shutdown()
            if not left:
                raise
    yield made
    made.shutdown()


@pytest.fixture(scope="session")
def connection(cluster: Any) -> Iterator[None]:
    """Connect this process to the cluster."""
    import ray

    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write Parquet files of pairs, in two folders."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("files") / "samples"
    (folder / "more").mkdir(parents=True)
    for number in range(FILES):
        ids = list(range(number * ROWS, (number + 1) * ROWS))
        columns = {
            "id": ids,
            "instruction": [f"Is {each} a large number?" for each in ids],
            "response": [f"No, {each % 7} is not." for each in ids],
        }
        pq.write_table(pa.table(columns), folder / ("more" if number % 2 else "") / f"{number:02}.parquet")
    return folder


def children_of(parents: set[int]) -> list[int]:
    """List the processes that hold an actor which scores slices, and were started by one of `parents`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if parent in parents and b"SliceActor" in command:
            found.append(int(folder.name))
    return found


def done_in(folder: Path) -> int:
    """Count the slices that are done."""
    return len(list(folder.rglob(".*.done.json")))


def kill_when(is_time: Callable[[], bool], victim: Callable[[], int], command: subprocess.Popen[str]) -> int:
    """Kill a process when it is time, while the command runs; returns which one that was."""
    end = time.monotonic() + 240
    while not is_time():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < end, "nothing was scored"
        time.sleep(0.01)
    killed = victim()
    os.kill(killed, signal.SIGKILL)
    return killed


def command(*arguments: str | Path, into: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start `cappy ARGUMENTS`, behind the words of another command."""
    return subprocess.Popen(
        [*into, str(CAPPY), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def check_same(samples: Path, out: Path, local: Path) -> None:
    """Check that a folder has the rows of the files once, in order, with the scores of a local run to the last bit."""
    import pyarrow.parquet as pq

    names = sorted(path.relative_to(samples) for path in samples.rglob("*.parquet"))
    assert len(names) == FILES
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == names
    for name in names:
        found, expected = pq.read_table(out / name), pq.read_table(local / name)
        assert found["id"].to_pylist() == pq.read_table(samples / name)["id"].to_pylist()
        assert found.equals(expected), f"{name}: {found['score']} and {expected['score']}"


@pytest.fixture(scope="session")
def local(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score the files in one process."""
    from cappy_engine.cli.main import main

    out = tmp_path_factory.mktemp("local") / "scored"
    assert main(["score", str(samples), "-o", str(out), "--threads", "1", "--quiet"]) == 0
    return out
