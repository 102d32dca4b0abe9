"""A scorer where its process has no more: no main thread any more, so that no pool may be asked, or no more files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import TINY

SCRIPT = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from cappy_engine import Scorer

PAIRS = [("Is the sky blue?", f"I would say so{' indeed' * (count % 30)}.") for count in range(1100)]  # in three parts
path, mode, way = sys.argv[1:]
scorer = Scorer.open(path, device="cpu", precision="int8", threads=2, mode=mode)
wanted = scorer.score(PAIRS)

def takes_work(pool):
    try:
        pool.submit(int).result()
    except RuntimeError:
        return False
    return True

def late():
    while takes_work(ThreadPoolExecutor(1)):
        time.sleep(0.01)
    assert abs(scorer.score(PAIRS) - wanted).max() < 1e-5
    with Scorer.open(path, device="cpu", precision="int8", threads=2, mode=mode) as other:
        assert abs(other.score(PAIRS) - wanted).max() < 1e-5
    print("the same", flush=True)

if way == "thread":
    threading.Thread(target=late).start()
elif way == "pool":
    ThreadPoolExecutor(1).submit(late)
else:
    atexit.register(late)
"""


@pytest.mark.parametrize("mode", ["latency", "throughput", "both"])
@pytest.mark.parametrize("way", ["thread", "pool", "atexit"])
def test_scores_are_the_same_when_the_main_thread_has_ended(mode: str, way: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, TINY, mode, way], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("the same\n", 0), done.stderr


WITHOUT_FILES = """
import resource, sys
from cappy_engine import CappyError, Scorer

scorer = Scorer.open(sys.argv[1], device="cpu", precision="int8", threads=2, mode="both")
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
print(len(scorer.score([("Is the sky blue?", "indeed " * count) for count in range(400)])))
try:
    Scorer.open(sys.argv[1], device="cpu")
except CappyError as error:
    print(error)
"""


def test_too_few_files_are_not_taken_for_a_changed_bundle(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_FILES)
    done = subprocess.run([sys.executable, script, TINY], capture_output=True, text=True, check=False)
    shortage = f"{TINY}/manifest.json cannot be read (Too many open files); this process needs more\n"
    assert (done.stdout, done.returncode) == (f"400\n{shortage}", 0), done.stderr
    assert "slower: onnx/model_quantized.onnx" in done.stderr
    assert "changed since" not in done.stderr


FORKED_WHILE_OPENING = """
import os, signal, sys, threading
from cappy_engine import Scorer

def open_again_and_again():
    while True:
        Scorer.open(sys.argv[1], device="cpu", precision="int8", threads=1).close()

threading.Thread(target=open_again_and_again, daemon=True).start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        sys.exit(0)
    if os.waitpid(child, 0)[1]:
        print("a child did not end", flush=True)
        break
os._exit(0)
"""


def test_a_child_that_was_forked_while_another_thread_opened_a_bundle_ends(tmp_path: Path) -> None:
    """That thread held the lock of a file which it hashed: in the child nobody gives it back."""
    script = tmp_path / "script.py"
    script.write_text(FORKED_WHILE_OPENING)
    done = subprocess.run([sys.executable, script, TINY], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
