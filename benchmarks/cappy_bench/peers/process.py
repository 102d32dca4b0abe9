"""Starts runners in processes of their own, asks them line by line, and ends them."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Protocol

import cappy_bench
import cappy_engine
import cappy_export
from cappy_bench.peers.peer import Model
from cappy_bench.peers.specs import Spec
from cappy_bench.peers.worker import installed
from cappy_engine.errors import install_hint

ENVIRONMENTS = Path(cappy_bench.__path__[0]) / "environments"
"""What each environment holds: NAME.txt for pip, or NAME/package.json for npm, with how to install it."""
LONGEST_ANSWER_SECONDS = 1800.0
REST_SECONDS = 0.3
"""Before scores are asked for. The threads of the tool before may spin on behind its last request, by some defaults for
0.2 s; the first request of the next one then lacks a core, and takes up to a third longer."""

TELLING = ("CAPPY_", "ORT_", "OMP_")
"""How the names of variables begin that change how fast a runner is, or what it computes."""
UNTOLD = ("CAPPY_CACHE", "CAPPY_SERVE_")
"""Those of them that do not, and may hold a user's paths."""

Message = Mapping[str, Any]


class RunnerFailed(Exception):
    """A runner cannot be started, or answers an error, too late or never.

    The message is the exact reason.
    """


class Worker(Protocol):
    """One runner's process: the seam that tests fake."""

    def ask(self, message: Message) -> dict[str, Any]:
        """Send one message and wait for the answer (`cappy_bench.peers.worker`). Raises RunnerFailed."""

    def close(self) -> None:
        """End the process; it gives its memory back."""


Start = Callable[[Spec, Model], Worker]


class WorkerProcess:
    """A runner's process; it prints its standard error to `log`."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603, the command is ours
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process was started without pipes")
        self._questions = self._process.stdin
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def ask(self, message: Message) -> dict[str, Any]:
        """Send one message and wait for the answer. A rest of REST_SECONDS comes before `score`.

        Raises RunnerFailed with the runner's own error, or the last lines of its log if it died or answered something
        else.
        """
        if message["do"] == "score":
            time.sleep(REST_SECONDS)
        try:
            self._questions.write(json.dumps(message) + "\n")
            self._questions.flush()
        except BrokenPipeError:
            pass  # it died; its status and its last lines, which are waited for below, say why
        try:
            line = self._answers.get(timeout=LONGEST_ANSWER_SECONDS)
        except queue.Empty as error:
            self.close()
            raise RunnerFailed(f"no answer within {LONGEST_ANSWER_SECONDS:.0f} s: {self._last_lines()}") from error
        if not line.endswith("\n"):  # nothing, or it was killed while it wrote
            raise RunnerFailed(f"ended with status {self._process.wait()}: {self._last_lines()}")
        answer = _read(line)
        if answer is None:  # a library printed between the answers
            raise RunnerFailed(
                f"answered no object of JSON: {in_short(line)[:100]!r}; its last lines: {self._last_lines()}"
            )
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
        return last_lines(self._log.read_text(encoding="utf-8", errors="replace"))


def _read(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def in_short(reason: str) -> str:
    """Shorten a tool's error to one line, with paths from the current folder on.

    >>> in_short("no such\\n   model")
    'no such model'
    """
    return " ".join(reason.replace(f"{Path.cwd()}{os.sep}", "").split())[:600]


def last_lines(printed: str) -> str:
    """Shorten what a process printed to its last lines, as `in_short` does.

    >>> last_lines("one\\ntwo\\nthree\\nfour\\n")
    'two | three | four'
    """
    return in_short(" | ".join(printed.strip().splitlines()[-3:]))


def worker_variables(threads: int) -> dict[str, str]:
    """Give the variables that a runner's process has beside those of this one.

    >>> worker_variables(2)["OMP_NUM_THREADS"]
    '2'
    """
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"),
        "TOKENIZERS_PARALLELISM": "true",
    }


def telling_variables(threads: int) -> dict[str, str]:
    """Read the variables that change how a runner computes, as its process has them.

    >>> telling_variables(2)
    {'CAPPY_KERNELS': 'none', 'OMP_NUM_THREADS': '2'}
    """
    whole = {**os.environ, **worker_variables(threads)}
    return {name: whole[name] for name in sorted(whole) if name.startswith(TELLING) and not name.startswith(UNTOLD)}


def start_worker(spec: Spec, model: Model, *, tools: Path) -> WorkerProcess:
    """Start a runner's process in its environment, which lies in the folder `tools`.

    Raises RunnerFailed, with what to do, if that is not set up.

        >>> worker = start_worker(SPECS[0], model, tools=Path())
    """
    variables = worker_variables(model.threads)
    command = [*program(spec, tools), spec.precision, model.to_json()]
    if spec.environment == "node":
        variables["NODE_PACKAGES"] = str(environment_folder("node", tools).resolve() / "node_modules")
    elif spec.environment != "main":
        variables["PYTHONPATH"] = str(link_packages(model.folder.parent / "packages").resolve())
    return WorkerProcess(command, environment=variables, log=model.folder / f"{spec.name}.log")


def program(spec: Spec, tools: Path) -> list[str]:
    """The command that runs a runner's module, without precision and model. Raises RunnerFailed if it is not installed.

    >>> program(SPECS[0], Path())
    ['/usr/bin/python3', '-P', '-m', 'cappy_bench.peers.cappy']
    """
    # -P: what lies in the current folder must not be imported in place of a package.
    module = ["-P", "-m", f"cappy_bench.peers.{spec.module}", *([spec.way] if spec.way else [])]
    if spec.environment == "main":
        missing = [name for name in spec.packages if not _is_installed(name)]
        if missing:
            raise RunnerFailed(f"not installed here: {', '.join(missing)}; {install_hint('bench')}")
        return [sys.executable, *module]
    folder = environment_folder(spec.environment, tools)
    python, packages = folder / "bin" / "python", folder / "node_modules"
    if not (packages if spec.environment == "node" else python).exists():
        raise RunnerFailed(in_short(f"there is no {folder}; how to make it: {_recipe(spec.environment)}"))
    if spec.environment == "node":
        if shutil.which("node") is None:
            raise RunnerFailed("Node is not installed")
        return ["node", str(Path(__file__).parent / spec.module)]
    return [str(python.absolute()), *module]


def environment_folder(name: str, tools: Path) -> Path:
    """Where the environment `name` is installed.

    >>> environment_folder("openvino", Path())
    PosixPath('.venv-bench-openvino')
    """
    return tools / f".venv-bench-{name}"


def environment_versions(name: str, tools: Path) -> dict[str, str]:
    """Read the version of every package in the environment `name`; empty where it is not set up.

    >>> environment_versions("openvino", Path())["openvino"]
    '2026.4.1'
    """
    folder = environment_folder(name, tools)
    if name == "node":
        packages = folder / "node_modules"
        found = [path for depth in ("*", "@*/*") for path in packages.glob(f"{depth}/package.json")]
        versions = {path.parent: json.loads(path.read_text(encoding="utf-8")).get("version") for path in found}
        return {path.relative_to(packages).as_posix(): str(version) for path, version in versions.items()}
    places = [str(place) for place in folder.glob("lib/python*/site-packages")]
    distributions = metadata.distributions(path=places)
    return {str(one.name).replace("_", "-").lower(): str(one.version) for one in distributions}


def link_packages(folder: Path) -> Path:
    """Make a folder with this project's packages alone, for another environment's Python.

    >>> link_packages(Path("bench/packages"))
    PosixPath('bench/packages')
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in (cappy_bench, cappy_engine, cappy_export):
        link = folder / package.__name__
        link.unlink(missing_ok=True)
        link.symlink_to(package.__path__[0], target_is_directory=True)
    return folder


def _recipe(environment: str) -> Path:
    """The file that says how the environment is installed."""
    return ENVIRONMENTS / ("node/package.json" if environment == "node" else f"{environment}.txt")


def _is_installed(package: str) -> bool:
    try:
        return bool(installed(package))
    except metadata.PackageNotFoundError:
        return False
