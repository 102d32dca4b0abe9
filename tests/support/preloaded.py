"""Run Python programs in processes that are forked from one which has imported PyTorch and others already.

`preloaded` is a folder with a `cappy` and a `python`, which takes `-m MODULE`, `-c CODE`, `-` or a script. What they
start is a process of its own, with its own arguments, environment, folder and streams, which signals end. It imports
afresh what is not in IMPORTS. Only the seconds that these imports take in every process are spent once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

IMPORTS = (
    "onnx scipy.optimize scipy.stats sklearn.metrics torch torch._dynamo torch.distributed.tensor "
    "torch.nn.attention.flex_attention torch.onnx"
).split()
"""None of these reads the environment but for threads, as transformers and the hub's client do, or starts a thread, as
onnxruntime does: a forked process does not have it, and would wait for its end."""

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


def main() -> None:
    """Fork a process for each connection, until the standard input ends."""
    for name in IMPORTS:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread is not forked"
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        while select.select([0, listening.fileno()], [], [])[0] == [listening.fileno()]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                return _serve(connection)
            connection.close()
            _forget_ended(os.WNOHANG)
    return _forget_ended(0)


def _forget_ended(options: int) -> None:
    """Take notice of the processes that have ended, and wait for the others unless `options` say no."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _serve(connection: socket.socket) -> None:
    """Run the program that is asked for in one more process; tell its number, and how it ends."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        arguments, folder, environment = json.loads(file.read(int.from_bytes(size, "big")))
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
