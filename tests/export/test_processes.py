"""Several processes train as one does: the same steps, one error if they cannot, an end for all if one is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cappy_export.adaptation.log import LOG
from tests.support.colours import colour_examples, same_weights, write_examples

pytestmark = pytest.mark.slow

OPTIONS = "--batch-size 16 --epochs 4 --learning-rate 1e-3 --max-batch-tokens 128 --window 64 --log-every 1".split()
"""A step has several batches, and an epoch several windows; dropout is the checkpoint's 0.1."""


THREADS_AT_THE_END = """#!{python}
import atexit, pathlib, sys

def tell():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    print("threads:", *names, file=sys.stderr)

atexit.register(tell)  # it comes after what others registered
from cappy_engine.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Launch:
    """Starts processes that a launcher would start, and waits for them."""

    program: Path
    checkpoint: Path
    folder: Path

    def start(self, out: str, *more: str, processes: int = 2, train: Sequence[str] = ("train.jsonl",)) -> list[Started]:
        """Start a training; the process of rank n reads `train[n]`, or the last of them."""
        port = free_port()
        return [
            self._process(out, train[min(rank, len(train) - 1)], more, rank, processes, port)
            for rank in range(processes)
        ]

    def run(self, out: str, *more: str, processes: int = 2, train: Sequence[str] = ("train.jsonl",)) -> list[str]:
        """Run a training to its end; returns what each process wrote to stderr."""
        started = self.start(out, *more, processes=processes, train=train)
        texts = [each.communicate(timeout=600)[1] for each in started]
        assert [each.returncode for each in started] == [0] * processes, texts
        return texts

    def log(self, out: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / out / LOG).read_text().splitlines()]

    def _process(
        self, out: str, train: str, more: Sequence[str], rank: int, processes: int, port: int
    ) -> subprocess.Popen[str]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        launched = {name: str(value) for name, value in ranks.items()}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(launched if processes > 1 else {})}
        command: list[str | Path] = [self.program, "adapt", self.checkpoint, train, out, *OPTIONS, *more]
        return subprocess.Popen(command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True)


Started = subprocess.Popen[str]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def launch(checkpoint: Path, preloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("processes")
    write_examples(folder / "train.jsonl", colour_examples(60))
    write_examples(folder / "other.jsonl", colour_examples(61))
    return Launch(preloaded / "cappy", checkpoint, folder)


@pytest.fixture(scope="module")
def whole(launch: Launch) -> Path:
    """Give what two processes leave that nobody stopped."""
    launch.run("whole")
    return launch.folder / "whole"


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_take_the_steps_that_one_takes(launch: Launch, whole: Path) -> None:
    launch.run("alone", processes=1)
    one, two = launch.log("alone"), launch.log("whole")
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    for name in ("loss", "gradient_norm", "held_out_loss"):
        first, second = ([entry[name] for entry in log if name in entry] for log in (one, two))
        assert second == pytest.approx(first, rel=1e-4 if name == "gradient_norm" else 1e-5)


def test_a_killed_process_ends_the_other_and_both_go_on_to_the_same_weights(launch: Launch, whole: Path) -> None:
    first, second = launch.start("killed", "--save-every", "3")
    wait_for(lambda: bool(list((launch.folder / "killed.training").glob("step-*"))))
    second.send_signal(signal.SIGKILL)
    told = first.communicate(timeout=300)[1]
    second.communicate()
    assert first.returncode == 1
    assert "another process of this training has ended" in told
    assert "go on with --resume" in told
    texts = launch.run("killed", "--save-every", "3", "--resume")
    assert "going on after step" in texts[0]
    assert same_weights(whole, launch.folder / "killed")


@pytest.mark.parametrize("processes", [1, 3])
def test_a_training_goes_on_in_another_number_of_processes(launch: Launch, whole: Path, processes: int) -> None:
    out = f"then-{processes}"
    first, second = launch.start(out, "--save-every", "3")
    wait_for(lambda: bool(list((launch.folder / f"{out}.training").glob("step-*"))))
    second.send_signal(signal.SIGKILL)
    for each in (first, second):
        each.communicate(timeout=300)
    texts = launch.run(out, "--save-every", "3", "--resume", processes=processes)
    assert "going on after step" in texts[0]
    uninterrupted, found = launch.log("whole"), launch.log(out)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in uninterrupted]
    losses = [[entry["held_out_loss"] for entry in log if "held_out_loss" in entry] for log in (uninterrupted, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_launchers_of_others_start_the_same_training(launch: Launch, whole: Path) -> None:
    """accelerate's launcher sets its own variables and then runs torchrun's, so both are tried here."""
    command: list[str | Path] = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", str(free_port()), "-m", "cappy_engine", "adapt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, launch.checkpoint, "train.jsonl", "accelerated", *OPTIONS],
        cwd=launch.folder,
        env=environment,
        timeout=600,
        check=True,
    )
    assert same_weights(whole, launch.folder / "accelerated")


def test_processes_with_other_data_do_not_begin_and_one_says_why(launch: Launch) -> None:
    started = launch.start("unlike", train=("train.jsonl", "other.jsonl"))
    first, second = [each.communicate(timeout=300)[1] for each in started]
    assert [each.returncode for each in started] == [1, 1], first + second
    assert "process 1 cannot join process 0 (shards was ['train.jsonl'], is ['other.jsonl'])" in first
    assert second == ""
    assert not (launch.folder / "unlike.training").exists()


@pytest.mark.parametrize("others", ["train.jsonl", "other.jsonl"], ids=["to the end", "with an error"])
def test_no_thread_of_gloo_is_left_when_python_ends(launch: Launch, tmp_path: Path, others: str) -> None:
    """One that drops a tensor then aborts the process, once in some hundred times."""
    program = tmp_path / "program"
    program.write_text(THREADS_AT_THE_END.format(python=sys.executable))
    program.chmod(0o700)
    watched = dataclasses.replace(launch, program=program)
    started = watched.start(f"ended-{others}", "--max-steps", "2", train=("train.jsonl", others))
    for each in started:
        told = each.communicate(timeout=300)[1]
        assert each.returncode == (others != "train.jsonl"), told
        threads = told.splitlines()[-1]
        assert threads.startswith("threads: ")
        assert "gloo" not in threads


def test_a_process_whose_others_do_not_come_stops(launch: Launch) -> None:
    (alone, other) = launch.start("alone2", "--wait-seconds", "2")
    other.kill()
    told = alone.communicate(timeout=300)[1]
    other.communicate()
    assert alone.returncode == 1
    assert "of this training" in told
    assert not (launch.folder / "alone2.training").exists()


def test_processes_end_when_the_command_that_started_them_is_killed(launch: Launch) -> None:
    command: list[str | Path] = [launch.program, "adapt", launch.checkpoint, "train.jsonl", "orphans", *OPTIONS]
    started = subprocess.Popen(
        [*command, "--processes", "2", "--save-every", "3"],
        cwd=launch.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: bool(list((launch.folder / "orphans.training").glob("step-*"))))
    assert len(ranks_of("orphans")) == 2
    started.kill()
    started.wait()
    wait_for(lambda: not ranks_of("orphans"))


def test_the_command_starts_its_own_processes_and_says_who_was_killed(launch: Launch, whole: Path) -> None:
    command: list[str | Path] = [
        launch.program,
        "adapt",
        launch.checkpoint,
        "train.jsonl",
        "own",
        *OPTIONS,
        "--processes",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*command, "--save-every", "3"], cwd=launch.folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: bool(list((launch.folder / "own.training").glob("step-*"))))
    os.kill(ranks_of("own")["1"], signal.SIGKILL)
    told = started.communicate(timeout=120)[1]
    assert started.returncode == 1
    assert "process 1 of 2 was ended by SIGKILL, and so were the others; go on with the same command" in told
    subprocess.run([*command, "--save-every", "3", "--resume"], cwd=launch.folder, env=environment, check=True)
    assert same_weights(whole, launch.folder / "own")


def ranks_of(out: str) -> dict[str, int]:
    """Find the processes that train `out`, by their rank."""
    every = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return {rank: each for each in every if (rank := rank_of(each, out)) is not None}


def rank_of(process: int, out: str) -> str | None:
    """Read the rank of a process that trains `out`; None for all others."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    names = dict(each.partition(b"=")[::2] for each in environment)
    return names[b"RANK"].decode() if out.encode() in words and b"RANK" in names else None


def test_killed_at_five_random_moments_it_goes_on_to_the_same_weights(launch: Launch, whole: Path) -> None:
    draw = random.Random(0)
    log = launch.folder / "often.training" / LOG
    for moment in range(5):
        begun = time.time()
        started = launch.start("often", "--save-every", "2", *(["--resume"] if moment else []))
        wait_for(lambda begun=begun: log.exists() and log.stat().st_mtime > begun)  # type: ignore[misc]
        entries = log.read_bytes().count(b"\n") + draw.randrange(4)
        while log.read_bytes().count(b"\n") < entries and started[0].poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.05))
        started[draw.randrange(2)].send_signal(signal.SIGKILL)
        for each in started:
            each.communicate(timeout=120)
        if (launch.folder / "often").exists():
            break
    else:
        launch.run("often", "--save-every", "2", "--resume")
    assert moment, "it ended before anything was killed"
    assert same_weights(whole, launch.folder / "often")
