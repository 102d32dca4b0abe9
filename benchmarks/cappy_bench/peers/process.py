"""Runners in processes of their own: started, asked one JSON line at a time, ended."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from cappy_bench.peers import Spec
from cappy_bench.peers.peer import Model

ROOT = Path(__file__).resolve().parents[3]
LONGEST_ANSWER_SECONDS = 1800.0
LAST_LINES = 3

Message = Mapping[str, Any]


class RunnerFailed(Exception):
    """A runner cannot be started, answered with an error, too late or not at all; the message is the exact reason."""


class Worker(Protocol):
    """The seam that tests fake: one runner's process."""

    def ask(self, message: Message) -> dict[str, Any]:
        """Send one message and wait for the answer (`cappy_bench.peers.worker`). Raises RunnerFailed."""

    def close(self) -> None:
        """End the process; it gives its memory back."""


class WorkerProcess:
    """A runner's process; what it prints on standard error goes to `log`."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603, the command is ours
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **environment},
                text=True,
                encoding="utf-8",
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process was started without pipes")
        self._questions = self._process.stdin
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def ask(self, message: Message) -> dict[str, Any]:
        """Send one message and wait for the answer.

        Raises RunnerFailed with the runner's own error, or the last lines of its log if it died.
        """
        try:
            self._questions.write(json.dumps(message) + "\n")
            self._questions.flush()
            line = self._answers.get(timeout=LONGEST_ANSWER_SECONDS)
        except (BrokenPipeError, queue.Empty) as error:
            self.close()
            raise RunnerFailed(f"no answer within {LONGEST_ANSWER_SECONDS:.0f} s: {self._last_lines()}") from error
        if not line:
            raise RunnerFailed(f"ended with status {self._process.wait()}: {self._last_lines()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunnerFailed(in_short(str(answer["error"])))
        return answer

    def close(self) -> None:
        """End the process."""
        try:
            self._questions.close()
            self._process.wait(timeout=20)
        except BrokenPipeError:  # it is dead already
            self._process.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self, answers: IO[str]) -> None:
        for line in answers:
            self._answers.put(line)
        self._answers.put("")

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return in_short(" | ".join(lines[-LAST_LINES:]))


def in_short(reason: str) -> str:
    """A tool's error on one line, not too long, with paths from the repository on: results are read elsewhere."""
    return " ".join(reason.replace(f"{ROOT}{os.sep}", "").split())[:600]


def current_commit() -> str | None:
    """The commit that is checked out; None where there is no repository."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)  # noqa: S607
    return done.stdout.strip() or None


def start_worker(spec: Spec, model: Model) -> WorkerProcess:
    """Start a runner's process in its environment. Raises RunnerFailed, with what to do, if that is not set up."""
    variables = {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(model.threads)),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"),
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("engine", "export", "benchmarks")),
        "NODE_PACKAGES": str(environment_folder("node") / "node_modules"),
    }
    paths = {name: str(getattr(model, name).resolve()) for name in ("checkpoint", "bundle", "folder")}
    described = json.dumps({**paths, "threads": model.threads, "max_length": model.max_length})
    command = [*program(spec), spec.precision, described]
    return WorkerProcess(command, environment=variables, log=model.folder / f"{spec.name}.log")


def program(spec: Spec) -> list[str]:
    """The command that runs a runner's module, without its arguments. Raises RunnerFailed if it is not installed."""
    if spec.environment == "main":
        return [sys.executable, "-m", "cappy_bench.peers.worker", spec.module]
    folder = environment_folder(spec.environment)
    if not (folder / "ready").exists():
        raise RunnerFailed(f"its environment is not installed: make {folder.name}/ready")
    if spec.environment == "node":
        return ["node", str(Path(__file__).parent / spec.module)]
    return [str(folder / "bin" / "python"), "-m", "cappy_bench.peers.worker", spec.module]


def environment_folder(name: str) -> Path:
    """Where the environment `name` is installed by make."""
    return ROOT / f".venv-bench-{name}"
