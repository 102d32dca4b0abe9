"""Two network namespaces are two machines for Ray: each has an address, processes and a temporary folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clusters.conftest import CAPPY, FILES, ROWS, STARTS, check_same, children_of, command, done_in, kill_when

pytestmark = pytest.mark.slow
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 6379


@dataclass(frozen=True)
class Machine:
    """A network namespace, and the words that run a command in it."""

    name: str
    address: str

    @property
    def into(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def start(self, script: str) -> None:
        """Run a script that starts Ray; what it mounts is there for it and its children only."""
        for _ in range(STARTS):
            found = subprocess.run([*self.into, "sh", "-ec", script], capture_output=True, text=True, check=False)
            if found.returncode == 0:
                return
            self.kill()
        raise AssertionError(found.stdout + found.stderr)

    def kill(self) -> None:
        """Kill all processes that run here."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self) -> set[int]:
        """List the processes that run here."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return set(map(int, found.stdout.split()))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """Make two namespaces with a cable between them, and start a node of one cluster in each."""
    head, other = (Machine(f"cappy-{os.getpid()}-{place}", address) for place, address in enumerate(ADDRESSES))
    try:
        try:
            for machine in (head, other):
                ip("netns", "add", machine.name)
            ip("-n", head.name, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other.name)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}")
        for machine in (head, other):
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "cable")
            for link in ("cable", "lo"):
                ip("-n", machine.name, "link", "set", link, "up")
        yield from _started(head, other, tmp_path_factory.mktemp("ray"))
    finally:
        for machine in (head, other):
            if Path("/run/netns", machine.name).exists():
                machine.kill()
            subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True, check=False)


def _started(head: Machine, other: Machine, folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Start Ray; the other machine has a folder of its own where the head has Ray's."""
    ray, own = CAPPY.with_name("ray"), folder / "own"
    temporary = Path("/tmp", f"cappy-ray-{os.getpid()}")
    temporary.mkdir()
    own.mkdir()
    start = f"exec {ray} start --num-cpus 1 --disable-usage-stats"
    at_head = f"--head --port {PORT} --include-dashboard=false --temp-dir {temporary}"
    try:
        head.start(f"{start} {at_head} --node-ip-address {head.address}")
        at_other = f"--address {head.address}:{PORT} --node-ip-address {other.address}"
        other.start(f"mount --bind {own} {temporary}; {start} {at_other}")
        yield head, other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def test_two_machines_score_what_one_does_and_nothing_is_lost_with_a_worker_of_the_other(
    machines: tuple[Machine, Machine], samples: Path, local: Path, tmp_path: Path
) -> None:
    head, other = machines
    out, partial = tmp_path / "scored", tmp_path / "scored.partial"
    job = command("score", samples, "-o", out, "--ray", f"{head.address}:{PORT}", into=head.into)
    killed = kill_when(
        lambda: done_in(partial) >= 3 and bool(children_of(other.processes())),
        lambda: children_of(other.processes())[0],
        job,
    )
    before = done_in(partial)
    _, told = job.communicate(timeout=300)
    assert job.returncode == 0, told
    assert before < FILES, "the worker was killed when all was done"
    assert not Path(f"/proc/{killed}").exists()
    assert f"{ROWS * FILES} pairs scored" in told
    check_same(samples, out, local)
