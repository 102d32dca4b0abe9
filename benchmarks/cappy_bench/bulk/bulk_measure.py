"""Compares `cappy score` on a file of short pairs with the scorer in memory.

Both get the same pairs. The scorer alone gets samples of them, each in one call: before the file, after it, and every
few seconds in between, while the command is stopped (SIGSTOP). So both meet the same phases of a machine whose speed
changes. The file's seconds are those of the whole process, with its start and the renaming of its output, but without
the stops.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from cappy_bench.bulk.bulk_options import BulkBenchOptions
from cappy_bench.machine import current_commit, describe_machine
from cappy_bench.memory import peak_bytes_of
from cappy_engine.bulk.formats.compression import packer, tables_for
from cappy_engine.bulk.output.places import check_output
from cappy_engine.errors import BenchmarkError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.storage import write_json

WORDS = (
    "a about all an and answer are as at be been but by can city could day did do down each find first "
    "for from good had has have he her him his house how if in into is it its like long look made make "
    "many may more my name new no not now number of on one or other out part people river said see she "
    "sky so some than that the their them then there these they this time to two up use was water way we "
    "were what when which who will with word work would write year you "
).split()
ROWS_AT_A_TIME = 1000
CHOSEN = ("precision", "threads", "mode", "mode_reason", "max_batch_tokens", "kernels")
"""What the scorer chose, as the command does: also whether `cappy tune` told it."""
LOOK_SECONDS = 0.02
WARMING = 200

Say = Callable[[str], object]


def measure_bulk(
    options: BulkBenchOptions, scorer_options: ScorerOptions, words: Sequence[str], *, say: Say
) -> dict[str, Any]:
    """Measure `cappy score` on a file; `words` say as flags what `scorer_options` say. Gives a JSON document.

    Raises BenchmarkError if the command fails, and OutputError if the result would be written over a file.
    """
    commit = current_commit()
    if options.out is not None:
        check_output(options.out, force=options.force)
        options.out.parent.mkdir(parents=True, exist_ok=True)  # not after all was measured
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bulk-", dir=options.work) as folder:
        source, scored = Path(folder) / f"pairs.{options.form}", Path(folder) / f"scored.{options.form}"
        say(f"writing {options.pairs} pairs to {source}")
        write_pairs(source, options)
        say(f"scoring {source} with cappy score, and samples of {options.sample} pairs in memory")
        with Scorer.open_with(options.bundle, scorer_options) as scorer:
            chosen = {name: getattr(scorer.info, name) for name in CHOSEN}
            alone = _Alone(scorer, options)
            alone.take()
            seconds, peak = run_score(source, scored, options, words, alone.take)
            alone.take()
        sizes = source.stat().st_size, scored.stat().st_size
    own = alone.pairs / sum(alone.seconds)
    result = {
        "pairs": options.pairs,
        "format": options.form,
        "seconds": seconds,
        "pairs_per_second": options.pairs / seconds,
        "own_pairs_per_second": own,
        "own_seconds": alone.seconds,
        "own_pairs": alone.pairs,
        "share_of_own": options.pairs / seconds / own,
        "peak_bytes": peak,
        "input_bytes": sizes[0],
        "output_bytes": sizes[1],
        "bundle": str(options.bundle),
        "options": json.loads(scorer_options.to_json()),
        "chosen": chosen,
        "machine": describe_machine(),
        "commit": commit,
    }
    if options.out is not None:
        write_json(options.out, result)
    return result


def rows(options: BulkBenchOptions) -> Iterator[dict[str, str]]:
    """Make pairs of some 10 to 40 tokens, no two alike.

    >>> next(rows(BulkBenchOptions()))["id"]
    '0'
    """
    chance = random.Random(options.seed)  # noqa: S311 - texts, not keys
    for number in range(options.pairs):
        question = " ".join(chance.choices(WORDS, k=chance.randint(4, 20)))
        answer = " ".join(chance.choices(WORDS, k=chance.randint(1, 8)))
        yield {"id": str(number), "instruction": f"Is {question} {number}?", "response": answer}


def write_pairs(path: Path, options: BulkBenchOptions) -> None:
    """Write the pairs in the format that is asked for, some at a time."""
    found = rows(options)
    if options.form == "parquet":
        tables_for(path).write_rows(found, path)
        return
    pack = packer("gz" if path.suffix == ".gz" else "zst" if path.suffix == ".zst" else "", path)
    with path.open("wb") as file:
        if options.form == "csv":
            file.write(b"id,instruction,response\n")
        while part := list(islice(found, ROWS_AT_A_TIME)):
            if options.form == "csv":
                file.write("".join(f"{','.join(row.values())}\n" for row in part).encode())
            else:
                file.write(pack("".join(json.dumps(row) + "\n" for row in part).encode()))


class _Alone:
    """The scorer alone, which gets one sample of the pairs after another.

    >>> _Alone(scorer, BulkBenchOptions()).take()
    """

    def __init__(self, scorer: Scorer, options: BulkBenchOptions) -> None:
        self._scorer = scorer
        self._size = min(options.sample, options.pairs)
        self._rows = chain.from_iterable(rows(options) for _ in count())
        self.seconds: list[float] = []
        scorer.score(self._next(min(self._size, WARMING)))

    def _next(self, size: int) -> list[tuple[str, str]]:
        return [(row["instruction"], row["response"]) for row in islice(self._rows, size)]

    @property
    def pairs(self) -> int:
        """Count the pairs of all samples."""
        return self._size * len(self.seconds)

    def take(self) -> None:
        """Score a sample in one call, and keep its seconds."""
        pairs = self._next(self._size)
        begun = time.perf_counter()
        self._scorer.score(pairs)
        self.seconds.append(time.perf_counter() - begun)


def run_score(
    source: Path, scored: Path, options: BulkBenchOptions, words: Sequence[str], between: Callable[[], None]
) -> tuple[float, int]:
    """Run the command, and stop it now and then for what comes `between`.

    Gives its own seconds, and its peak of memory in bytes. Raises BenchmarkError if it fails.
    """
    command = [sys.executable, "-m", "cappy_engine", "score", str(source), "-o", str(scored)]
    command += ["--bundle", str(options.bundle), "--quiet", "--force", *words]
    if options.window is not None:
        command += ["--window", str(options.window)]
    peak, seconds = 0, 0.0
    went_on = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stderr=errors) as process, contextlib.ExitStack() as at_the_end:  # noqa: S603 - our own command
            at_the_end.callback(process.kill)  # it may be stopped, and would be waited for without end
            while process.poll() is None:
                peak = max(peak, peak_bytes_of(process.pid))  # at its end its parent counts, too
                time.sleep(LOOK_SECONDS)
                if time.perf_counter() - went_on > options.every:
                    process.send_signal(signal.SIGSTOP)
                    seconds += time.perf_counter() - went_on
                    between()
                    process.send_signal(signal.SIGCONT)
                    went_on = time.perf_counter()
        seconds += time.perf_counter() - went_on
        errors.seek(0)
        error = errors.read().decode(errors="replace")
    if process.returncode:
        raise BenchmarkError(f"cappy score ended with {process.returncode}: {error[-500:]}")
    return seconds, peak


def bulk_table(result: dict[str, Any]) -> str:
    """Show a result for people.

    >>> print(bulk_table(result))
    """
    return "\n".join(
        [
            f"{result['pairs']} pairs from {result['format']}, {result['input_bytes'] / 1e6:.1f} MB",
            f"cappy score   {result['pairs_per_second']:.1f} pairs/s in {result['seconds']:.1f} s, all of the process",
            f"scorer alone  {result['own_pairs_per_second']:.1f} pairs/s "
            f"({len(result['own_seconds'])} samples before, between and after, {result['own_pairs']} pairs)",
            f"share         {result['share_of_own']:.3f}",
            f"peak memory   {result['peak_bytes'] / 1e6:.0f} MB",
        ]
    )
