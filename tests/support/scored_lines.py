"""Make lines of JSON Lines, and score them, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from cappy_engine import Scorer
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.score_file import process_lines
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Progress, Totals

LONG = "The sky is blue, and so on. " * 200
GOOD = b'{"instruction": "q", "response": "a"}\n'


def line_of(**fields: object) -> bytes:
    return json.dumps({"instruction": "q", "response": "a", **fields}).encode() + b"\n"


def many_lines(count: int) -> list[bytes]:
    """Lines whose lengths go up and down, so that batches are out of order."""
    return [
        line_of(id=number, instruction=f"Question {number}?", response="word " * (number * 37 % 53))
        for number in range(count)
    ]


def score_lines(
    scorer: Scorer,
    lines: Iterable[bytes],
    write: Callable[[bytes], object],
    *,
    score_field: str = "score",
    progress: Progress = lambda totals: None,
    **options: Any,
) -> Totals:
    """Score the lines as `cappy score` does those of a pipe; `options` are those of rows."""
    task = ScoreTask(score_field=score_field)
    return process_lines(scorer, lines, write, task, RowOptions(**options), progress=progress)


def written(scorer: Scorer, lines: Iterable[bytes], **options: Any) -> tuple[list[dict[str, Any]], Totals]:
    """The rows that are written for the lines, and their totals."""
    output: list[bytes] = []
    totals = score_lines(scorer, lines, output.append, **options)
    return rows_in(output), totals


def rows_in(output: Iterable[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in b"".join(output).splitlines()]
