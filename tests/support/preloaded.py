"""Run Python programs in processes that are forked from one which has imported PyTorch and others already.

`preloaded` is a folder with a `cappy` and a `python`, which takes `-m MODULE`, `-c CODE`, `-` or a script. What they
start is a process of its own, with its own arguments, environment, folder and streams, which signals end. It imports
afresh what is neither in IMPORTS nor in READERS. Only the seconds that these imports take in every process are spent
once, or once for each environment in which READERS would be others.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

IMPORTS = (
    "onnx scipy.optimize scipy.stats sklearn.metrics torch torch._dynamo torch.distributed.tensor "
    "torch.nn.attention.flex_attention torch.onnx"
).split()
"""None of these reads the environment but for threads, or starts a thread, as onnxruntime does: a forked process does
not have it, and would wait for its end."""

READERS = (
    "accelerate huggingface_hub.hf_api rouge_score.rouge_scorer transformers.generation.utils "
    "transformers.modeling_utils transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto"
).split()
"""These read the environment, such as HF_HOME: only programs to which all that they read is the same find them."""

CLIENT = """\
#!{python} -IS
import array, json, os, signal, socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect({address!r})
message = json.dumps([{program!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
streams = array.array("i", [0, 1, 2])
client.sendmsg([len(message).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
client.sendall(message)
answers = client.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
"""What stands for the program: it passes on signals, and ends as the program does. SIGKILL ends both."""
CAPPY = "import sys; from cappy_engine.cli.main import main; sys.argv[0] = 'cappy'; sys.exit(main())"


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the folder of a `python` and a `cappy` that need not import PyTorch."""
    folder = tmp_path_factory.mktemp("preloaded")
    for name, program in (("python", []), ("cappy", ["-c", CAPPY])):
        client = CLIENT.format(python=sys.executable, address=str(folder / "socket"), program=program)
        (folder / name).write_text(client, encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # else they start threads
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen()
        number = listening.fileno()
        command = [sys.executable, "-P", __file__, str(number)]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=[number]) as process:
            listening.close()  # if the process has ended, whoever asks it hears so
            yield folder
            process.communicate()  # the end of its standard input ends it
    assert process.returncode == 0


@dataclass(frozen=True)
class Request:
    """Ask for a program: JSON of its arguments, folder and environment, the connection to who asks, and its streams."""

    message: bytes
    files: Sequence[int]

    @classmethod
    def receive(cls, source: socket.socket, count: int) -> Request | None:
        """Receive what a client or `pass_on` sends, with `count` files; None if it is gone."""
        head, files, _, _ = socket.recv_fds(source, 8, count)
        size, message = int.from_bytes(head, "big"), b""
        while len(message) < size and (part := source.recv(size - len(message))):  # and nothing of the next request
            message += part
        request = cls(message, files)
        if message and len(message) == size:
            return request
        request.close()
        return None

    def pass_on(self, reader: socket.socket) -> None:
        socket.send_fds(reader, [len(self.message).to_bytes(8, "big")], list(self.files))
        reader.sendall(self.message)

    def read(self) -> tuple[list[str], str, dict[str, str]]:
        arguments, folder, environment = json.loads(self.message)
        return arguments, folder, environment

    def close(self) -> None:
        for number in self.files:
            os.close(number)


@dataclass(frozen=True)
class Reader:
    """Talk to a process that has imported READERS; `read` is what they read of its environment, None where unset."""

    control: socket.socket
    read: Mapping[str, str | None]

    def is_for(self, environment: Mapping[str, str]) -> bool:
        return all(environment.get(name) == value for name, value in self.read.items())


def main() -> None:
    """Pass each request to a reader of its environment, until the standard input ends."""
    _import(IMPORTS)
    readers: list[Reader] = []
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        while select.select([0, listening.fileno()], [], [])[0] == [listening.fileno()]:
            connection, _ = listening.accept()
            asked = Request.receive(connection, 3)
            if asked is None:
                connection.close()
                continue
            request = Request(asked.message, [connection.detach(), *asked.files])
            _, _, environment = request.read()
            reader = next((each for each in readers if each.is_for(environment)), None)
            if reader is None:
                reader = _fork_reader(request, [listening, *(each.control for each in readers)])
                readers.append(reader)
            request.pass_on(reader.control)
            request.close()
    for each in readers:
        each.control.close()
    _forget_ended(0)


def _import(names: Sequence[str]) -> dict[str, str | None]:
    """Import modules for the processes that are forked; returns what they read of the environment."""
    read: dict[str, str | None] = {}
    plain = type(os.environ).__getitem__

    def noting(environment: os._Environ[str], name: str) -> str:
        read[name] = None  # if there is none, the next line raises
        read[name] = value = plain(environment, name)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(os.environ), "__getitem__", noting)
        for name in names:
            importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread is not forked"
    gc.freeze()  # else each process spends seconds at its end on looking for garbage among what was imported here
    return read


def _fork_reader(request: Request, inherited: Sequence[socket.socket]) -> Reader:
    """Fork a process that imports READERS in the environment of `request`, and forks a program for all that it gets."""
    ours, control = socket.socketpair()
    if os.fork():
        control.close()
        with ours.makefile("r", encoding="utf-8") as answer:
            return Reader(ours, json.loads(answer.readline()))
    request.close()
    for each in (ours, *inherited):
        each.close()
    _, _, environment = request.read()
    os.environ.clear()
    os.environ.update(environment)
    read = _import(READERS)
    assert os.environ == environment, "a program gets its own environment, without what was set here"
    control.sendall(json.dumps(read).encode() + b"\n")
    while asked := Request.receive(control, 4):
        if os.fork() == 0:
            control.close()
            _serve(asked)
            raise SystemExit
        asked.close()
        _forget_ended(os.WNOHANG)
    _forget_ended(0)
    os._exit(0)


def _forget_ended(options: int) -> None:
    """Take notice of the processes that have ended, and wait for the others unless `options` say no."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _serve(request: Request) -> None:
    """Run the program that is asked for in one more process; tell its number, and how it ends."""
    arguments, folder, environment = request.read()
    number, *streams = request.files
    connection = socket.socket(fileno=number)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return _run(*arguments)
    for number in (0, 1, 2, *streams):
        os.close(number)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % pid)
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection.fileno()], [], [])[0]:
        os.kill(pid, signal.SIGKILL)  # who asked for it is gone
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % status)
    os._exit(0)


def _run(kind: str, *given: str) -> None:
    """Run a program as `python KIND REST` does, with the folder that Python would put first in `sys.path`."""
    rest = list(given)
    if kind == "-P":
        kind, *rest = rest
    else:
        script = Path(kind).resolve().parent
        sys.path.insert(0, "" if kind in ("-c", "-") else str(Path.cwd() if kind == "-m" else script))
    sys.argv = [*rest] if kind == "-m" else [kind, *(rest[1:] if kind == "-c" else rest)]
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind in ("-c", "-"):
        exec(rest[0] if kind == "-c" else sys.stdin.read(), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
