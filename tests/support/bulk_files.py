"""Make files of rows, and score them with a fake scorer, for tests of runs."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk import runs
from cappy_engine.bulk.input_files import Files
from cappy_engine.bulk.resume import side_files
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.bulk.score_file import score_file
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.testing import FakeSession, fake_scorer, score_of
from cappy_engine.tokenizer import PairTokenizer

WINDOW = 8
"""Pairs of a window: files of some dozens of rows have several."""


def pairs_of(count: int) -> list[dict[str, Any]]:
    """Rows whose lengths go up and down, some of them alike."""
    return [
        {"id": str(number), "instruction": f"Où est {number % 17}?", "response": "word " * (number * 37 % 29)}
        for number in range(count)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows in the format of the name."""
    name = path.name
    if name.endswith((".parquet", ".pq")):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=11)
        return path
    if ".csv" in name:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        from cappy_engine.bulk.formats import tables

        content = tables.pack_zstd(content)
    path.write_bytes(content)
    return path


def write_in_tick(path: Path, content: bytes) -> None:
    """Write a file where the clock of the file system has ticks of 10 ms: so has Linux's, at 100 Hz."""
    path.write_bytes(content)
    tick = time.time_ns() // 10**7 * 10**7
    os.utime(path, ns=(tick, tick))


def slow_scorer(tokenizer: PairTokenizer, seconds: float = 0.0) -> Scorer:
    """A fake scorer whose batches take time."""

    def score(ids: Sequence[int]) -> float:
        time.sleep(seconds)
        return score_of(ids)

    return fake_scorer(FakeSession(score), tokenizer=tokenizer)


def run(
    scorer: Scorer, source: Path | Sequence[Path], out: Path, *,
    task: ScoreTask | RankTask | None = None, options: RowOptions | None = None,
    say: Callable[[str], object] = print, **target: Any,
) -> Totals:  # fmt: skip
    """Score or rank files, in small windows."""
    paths = [source] if isinstance(source, Path) else source
    files = Files(paths, task or ScoreTask(), options or RowOptions(window=WINDOW))
    return score_file(scorer, files, Target(out, **target), say=say)


def scores_of(scorer: Scorer, rows: list[dict[str, Any]]) -> list[float]:
    return list(map(float, scorer.score([(row["instruction"], row["response"]) for row in rows])))


class Stop(BaseException):
    """Ends a run at some commit, as a signal would."""


def stopped(patch: pytest.MonkeyPatch, commits: int, work: Callable[[], object]) -> None:
    """Let a run end when it has marked so many windows; the next one is in the partial file already."""
    left = [commits]

    def mark(names: Names, progress: Any) -> None:
        if not left[0]:
            raise Stop
        left[0] -= 1
        written(names, progress)

    written = side_files.mark
    with patch.context() as here:
        here.setattr(runs, "mark", mark)
        with pytest.raises(Stop):
            work()


def killed(work: Callable[[], object], seconds: float) -> bool:
    """Do work in a process of its own that is killed after some time; True if it was not done before."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed"
    return os.WIFSIGNALED(status)
