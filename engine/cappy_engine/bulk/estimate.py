"""Estimate the time, memory and disk that scoring a file takes here.

Rows that are spread over the file are read as a run reads them. What they cost is measured on the scorer, and
multiplied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cappy_engine.bulk.file_windows import most_pairs_of
from cappy_engine.bulk.formats.entries import Entry, Position, Reading, Refused
from cappy_engine.bulk.formats.file_format import format_of
from cappy_engine.bulk.formats.lines import MAX_LINE_BYTES
from cappy_engine.bulk.formats.sources import open_source
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import ScoreTask, Task
from cappy_engine.bulk.windows import WINDOW_BYTES
from cappy_engine.errors import CappyError
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer

SAMPLE_ROWS = 1000
SAMPLE_BYTES = 16 * 2**20
"""A file of lines up to this size is read as a whole; of CSV and of a packed file, this much (unpacked) is."""
PLACES, PLACE_BYTES = 64, 2**14
"""Places of a larger file where rows are read, and how much at each: where rows are short, more of them are read."""
TABLE_PLACES = 8
ADDED_BYTES = {"jsonl": 30, "csv": 25, "parquet": 5}
"""What a row's score takes."""
MEASURED_TOGETHER, WARMING = 125, 64
"""Pairs that are scored in one call, and in the call that is not counted."""
WINDOWS_HELD = 5
PAIR_BYTES = 1500
"""Python's objects of a pair in a window, besides its texts and token ids."""


@dataclass(frozen=True)
class Sample:
    """Rows of a file, and what the whole file holds.

    `places` are the numbers of the places where the `pairs` were read. `rows` is the number of rows that can be scored:
    counted if `is_exact`, else estimated. `is_spread` is False if only the beginning of the file was read. `refused` is
    the number of rows that were read and cannot be scored; `problem` says why the first of them cannot.
    """

    pairs: Sequence[Pair]
    places: npt.NDArray[np.int64]
    rows: int
    is_exact: bool
    is_spread: bool
    refused: int
    problem: str
    row_bytes: float
    input_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What scoring a file takes on this machine.

    `tokens` are those of the sample's pairs, (n,) int64. `tokenize_share` is the part of the time that goes to
    tokenising. `spread` is the relative error of `seconds` that comes from sampling, at 95%; the machine adds its own.
    None is not known.
    """

    sample: Sample
    tokens: npt.NDArray[np.int64]
    truncated_share: float
    tokens_per_second: float
    pairs_per_second: float
    tokenize_share: float
    memory_bytes: int | None
    seconds: float
    spread: float | None


@dataclass
class _Part:
    """Rows that were read from one place on. `end` is where that ended; None if it was the file's end."""

    pairs: list[Pair] = field(default_factory=list)
    size: int = 0
    refused: int = 0
    problem: str = ""
    end: Position | None = None
    total: int | None = None

    @property
    def read(self) -> int:
        """Count the rows."""
        return len(self.pairs) + self.refused


def sample_file(path: Path, task: Task | None = None, *, rows: int = SAMPLE_ROWS) -> Sample:
    """Read rows that are spread over a file. Of CSV, and of a packed file, they are at its beginning.

        >>> sample_file(Path("pairs.jsonl")).rows
        7

    `rows` of them are kept. Raises CappyError for a file without rows that can be scored, and OSError.
    """
    size, kind = path.stat().st_size, format_of(path).kind
    parts = _parts(path, size, Reading(task or ScoreTask()), rows)
    good, read, whole = sum(len(part.pairs) for part in parts), sum(part.read for part in parts), parts[0]
    problem = next((part.problem for part in parts if part.refused), "")
    if not good:
        raise CappyError(f"{path} holds no row that can be scored{problem and f': {problem}'}")
    row_bytes = sum(part.size for part in parts) / read
    is_exact = len(parts) == 1 and whole.end is None
    if kind == "parquet":
        found: float = whole.total or 0
        is_exact = read == found or not problem
    elif len(parts) > 1:
        found = size / row_bytes
    else:
        found = read if whole.end is None else read * (whole.total or 1) / max(1, whole.end.done)
    added = ADDED_BYTES[kind] * found if kind == "parquet" else ADDED_BYTES[kind] * size / row_bytes
    pairs = [pair for part in parts for pair in part.pairs]
    places = np.repeat(np.arange(len(parts)), [len(part.pairs) for part in parts])
    kept = np.arange(min(rows, good)) * good // min(rows, good)
    return Sample(
        pairs=[pairs[place] for place in kept],
        places=places[kept],
        rows=round(found * good / read),
        is_exact=is_exact,
        is_spread=len(parts) > 1 or whole.end is None,
        refused=read - good,
        problem=problem,
        row_bytes=row_bytes,
        input_bytes=size,
        output_bytes=round(size + added),
    )


def estimate(scorer: Scorer, sample: Sample, *, seconds: float = 10.0) -> Estimate:
    """Tell what a whole file takes. Its sample is scored again and again for about `seconds`.

    >>> estimate(scorer, sample_file(Path("pairs.jsonl"))).seconds
    0.2

    What a run's first call makes (sessions, memory) is not counted. Raises what `Scorer.score_pairs` raises.
    """
    pairs = sample.pairs
    scorer.score_pairs(pairs[:WARMING])
    started = time.perf_counter()
    encoded = scorer.encode(pairs)
    tokenizing = time.perf_counter() - started
    scored, scoring, at = 0, 0.0, 0
    step = min(len(pairs), MEASURED_TOGETHER)  # no pair twice in a call: it would be computed once
    while scoring < seconds:
        part = encoded.chosen(np.arange(at, at + step) % len(pairs))
        started = time.perf_counter()
        scorer.score_encoded(part)
        scoring += time.perf_counter() - started
        scored += int(part.lengths.sum())
        at += step
        if at >= len(pairs) and scoring >= seconds / 4:
            break
    rate = scored / scoring
    mean = float(encoded.lengths.mean())
    per_pair = mean / rate + tokenizing / len(pairs)
    return Estimate(
        sample=sample,
        tokens=encoded.lengths,
        truncated_share=float(encoded.truncated.mean()),
        tokens_per_second=rate,
        pairs_per_second=1 / per_pair,
        tokenize_share=tokenizing / len(pairs) / per_pair,
        memory_bytes=_memory(scorer, sample, mean),
        seconds=sample.rows * per_pair,
        spread=_spread(sample, encoded.lengths),
    )


def _parts(path: Path, size: int, reading: Reading, rows: int) -> list[_Part]:
    """Read rows at the places where a file of this format and size is read."""
    form = format_of(path)
    if form.kind == "parquet":
        with open_source(path, reading) as source:
            count = source.total or 0
        if count > rows:
            starts = [count * number // TABLE_PLACES for number in range(TABLE_PLACES)]
            return [_read(path, reading, Position(start, start), most=-(-rows // TABLE_PLACES)) for start in starts]
    if form.kind == "jsonl" and not form.packing and size > SAMPLE_BYTES:
        return [_read(path, reading, start, most_bytes=PLACE_BYTES) for start in _starts(path, size)]
    return [_read(path, reading, Position(), most_bytes=SAMPLE_BYTES)]


def _starts(path: Path, size: int) -> list[Position]:
    """Find the beginnings of lines, spread over a file."""
    starts = [Position()]
    with path.open("rb") as file:
        for number in range(1, PLACES):
            file.seek(size * number // PLACES - 1)
            file.readline(MAX_LINE_BYTES)
            starts.append(Position(file.tell(), 1))
    return starts


def _read(
    path: Path, reading: Reading, start: Position, *, most: int | None = None, most_bytes: int | None = None
) -> _Part:
    """Read rows from a place on, up to a number of rows or bytes."""
    part = _Part()
    with open_source(path, reading) as source:
        part.total = source.total
        for row in source.rows(start):
            if isinstance(row, Entry):
                part.pairs += row.pairs
                part.size += row.size
            elif isinstance(row, Refused):
                part.problem = part.problem or row.error.problem
                part.refused += 1
                part.size += len(row.raw)
            if part.size >= (most_bytes or np.inf) or part.read >= (most or np.inf):
                part.end = source.position() or start
                break
    return part


def _spread(sample: Sample, tokens: npt.NDArray[np.int64]) -> float | None:
    """Tell the relative error of the mean number of tokens, at 95%. Rows of one place are alike."""
    if not sample.is_spread:
        return None
    if len(tokens) >= sample.rows:
        return 0.0
    mean = float(tokens.mean())
    counts = np.bincount(sample.places)
    if np.count_nonzero(counts) == 1:
        return float(1.96 * tokens.std() / mean / len(tokens) ** 0.5)
    sums = np.bincount(sample.places, tokens) - mean * counts
    places = np.count_nonzero(counts)
    return float(1.96 * (np.square(sums).sum() * places / (places - 1)) ** 0.5 / mean / len(tokens))


def _memory(scorer: Scorer, sample: Sample, tokens: float) -> int | None:
    """Add the windows that a run holds to this process's peak memory. None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    pairs = min(sample.rows, most_pairs_of(scorer, RowOptions()), WINDOW_BYTES / sample.row_bytes)
    window = pairs * (PAIR_BYTES + 3 * sample.row_bytes + 16 * tokens)
    return None if peak is None else round(peak + WINDOWS_HELD * window)
