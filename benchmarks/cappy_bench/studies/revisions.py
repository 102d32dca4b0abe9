"""Compares this engine with an earlier revision of it, in turn, on the same pairs: did anything get worse?

    python -m cappy_bench.studies.revisions REVISION CHECKPOINT [--precision fp32 --precision int8] [--rounds 5]

The revision's own code, from git, compiles its kernels, exports its bundle, and scores with it, with the packages of
this environment. Both engines stay open in processes of their own. In each round each scores `interactive` and `bulk`,
as in `cappy bench run`; who is first changes from round to round, and one round before them warms up. `ratio` is how
many times as fast the code of today is: the median of the rounds' ratios. The revision's bundle is kept in --work, by
commit. Today's is exported anew each time, since today's code may not be committed.

The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cappy_bench
from cappy_bench.machine import describe_machine
from cappy_bench.peers.peer import Model
from cappy_bench.peers.process import Worker, WorkerProcess, program
from cappy_bench.peers.specs import SPECS
from cappy_bench.speed.texts import choose_pool
from cappy_bench.speed.workloads import Sizes, Workload, make_workloads
from cappy_engine.cpu.cores import usable_cores
from cappy_engine.tokenizer import PairTokenizer

HERE = Path(cappy_bench.__path__[0]).parents[1]
PACKAGES = ("engine", "export", "benchmarks")


def commit_of(revision: str) -> str:
    """Name the commit that git knows by `revision`: a branch or HEAD~1 is another one tomorrow.

    Raises subprocess.CalledProcessError, after git's own words, if there is none.

        >>> commit_of("v0.1.0")
        '2d385c069a0b'
    """
    command = ["git", "-C", str(HERE), "rev-parse", "--verify", "--short=12", f"{revision}^{{commit}}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()  # noqa: S603


def _take_commit(commit: str, folder: Path) -> Path:
    """Write a commit's files into a folder, once, and compile its kernels."""
    if not (folder / "taken").exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["git", "-C", HERE, "archive", commit], check=True, stdout=subprocess.PIPE)  # noqa: S603, S607
        subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)  # noqa: S603, S607
        subprocess.run([sys.executable, folder / "engine/cappy_engine/native/build.py"], check=True, stdout=sys.stderr)  # noqa: S603
        (folder / "taken").touch()
    return folder


def _environment_of(source: Path) -> dict[str, str]:
    """The environment in which Python imports the packages of `source`."""
    threads = str(usable_cores())
    return {
        "PYTHONPATH": os.pathsep.join(str(source.resolve() / name) for name in PACKAGES),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads),
    }


def _export(source: Path, checkpoint: Path, bundle: Path, precisions: Sequence[str]) -> None:
    """Export the checkpoint with the code of `source`, unless there is a bundle."""
    if not (bundle / "manifest.json").exists():
        chosen = [word for precision in precisions for word in ("--precision", precision)]
        command = [sys.executable, "-P", "-m", "cappy_engine", "export", str(checkpoint), str(bundle), *chosen]
        subprocess.run(command, check=True, env={**os.environ, **_environment_of(source)}, stdout=sys.stderr)  # noqa: S603


def open_worker(source: Path, bundle: Path, precision: str) -> Worker:
    """Open the bundle with the code of `source`, in a process of its own. Raises RunnerFailed.

    >>> open_worker(HERE, EMBEDDED, "int8").ask({"do": "score", "requests": [[["a", "b"]]]})
    """
    model = Model(bundle=bundle, folder=bundle.parent, threads=usable_cores())
    command = [*program(SPECS[0], Path()), precision, model.to_json()]
    worker = WorkerProcess(command, environment=_environment_of(source), log=bundle.parent / f"{precision}.log")
    worker.ask({"do": "open"})
    return worker


def compare(workers: Mapping[str, Worker], workload: Workload, rounds: int) -> dict[str, Any]:
    """Measure both in turn; returns seconds a round of each, the ratio, and how far their scores are apart.

    >>> compare({"before": before, "now": now}, workload, rounds=5)["ratio"]
    1.02
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    scores: dict[str, list[list[float]]] = {}
    # workers of earlier revisions read "pad_to"; those of today do not
    message = {"do": "score", "requests": workload.requests, "pad_to": None}
    for turn in range(rounds + 1):
        for name in sorted(workers, reverse=turn % 2 == 1):
            found = workers[name].ask(message)
            scores[name] = found["scores"]
            if turn:
                seconds[name].append(statistics.median(found["seconds"]))
    before, now = (np.concatenate(scores[name]) for name in ("before", "now"))
    return {
        "workload": workload.name,
        "seconds": seconds,
        "ratio": statistics.median(b / n for b, n in zip(seconds["before"], seconds["now"], strict=True)),
        "largest_difference": float(np.abs(before - now).max()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", action="append", help="default: fp32 and int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interactive", type=int, default=32, help="pairs that are scored one by one")
    parser.add_argument("--bulk", type=int, default=128, help="pairs that are scored in one call")
    parser.add_argument("--data", type=Path, help="texts, as of cappy bench run")
    parser.add_argument("--work", type=Path, default=Path("bench/revisions"))
    options = parser.parse_args(argv)
    precisions = options.precision or ["fp32", "int8"]
    commit = commit_of(options.revision)
    sources = {"before": _take_commit(commit, options.work / commit / "source"), "now": HERE}
    name = "-".join([options.checkpoint.resolve().name, *precisions])
    bundles = {"before": options.work / commit / name / "bundle", "now": options.work / "now" / name / "bundle"}
    shutil.rmtree(bundles["now"], ignore_errors=True)
    for name, source in sources.items():
        _export(source, options.checkpoint, bundles[name], precisions)
    tokenizer = PairTokenizer.from_file(bundles["now"] / "tokenizer.json", max_length=512)
    pairs, texts = choose_pool(None, options.data, seed=0)
    sizes = Sizes(options.interactive, 0, 0, options.bulk, 0)
    workloads = make_workloads(pairs, tokenizer, sizes, seed=0)
    rows = []
    for precision in precisions:
        with contextlib.ExitStack() as stack:
            workers = {}
            for name, source in sources.items():
                workers[name] = open_worker(source, bundles[name], precision)
                stack.callback(workers[name].close)
            rows += [{"precision": precision, **compare(workers, one, options.rounds)} for one in workloads]
    print("precision  workload     before ms     now ms  ratio  scores differ by")
    for row in rows:
        before, now = (statistics.median(row["seconds"][name]) * 1e3 for name in ("before", "now"))
        print(
            f"{row['precision']:<9}  {row['workload']:<11}  {before:>9.2f}  {now:>9.2f}  {row['ratio']:>5.2f}  "
            f"{row['largest_difference']:.1e}"
        )
    print(json.dumps({"machine": describe_machine(), "texts": texts, "before": commit, "rows": rows}))


if __name__ == "__main__":
    main()
