"""Measures what comes before the model, on one core: reading rows of each format, and tokenising their pairs.

    python -m cappy_bench.studies.preparation [--pairs 20000] [--rounds 3]

The pairs are those of `cappy bench bulk`, no two alike. Seconds are those of the process on all cores, and the
tokenizer may use one. Figures are medians of the rounds. The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cappy_bench.bulk.bulk_measure import rows, write_pairs
from cappy_bench.bulk.bulk_options import FORMATS, BulkBenchOptions
from cappy_bench.machine import describe_machine
from cappy_engine.bulk.formats.entries import Position, Reading
from cappy_engine.bulk.formats.sources import open_source
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.testing import fake_scorer


def _measure(options: BulkBenchOptions, rounds: int) -> dict[str, float]:
    """Read and tokenise the pairs; rows and pairs a second, by what is done, and the tokens of a pair."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMATS:
            path = Path(folder) / f"pairs.{form}"
            write_pairs(path, BulkBenchOptions(pairs=options.pairs, form=form))
            found[form] = options.pairs / _seconds(lambda path=path: _read(path), rounds)  # type: ignore[misc]
    pairs = [(row["instruction"], row["response"]) for row in rows(options)]
    scorer = fake_scorer()
    found["tokenise"] = options.pairs / _seconds(lambda: scorer.encode(pairs), rounds)
    found["tokens_per_pair"] = float(scorer.encode(pairs).lengths.mean())
    return found


def _read(path: Path) -> None:
    with open_source(path, Reading(ScoreTask())) as source:
        for _ in source.rows(Position()):
            pass


def _seconds(work: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = _measure(BulkBenchOptions(pairs=options.pairs), options.rounds)
    for name, rate in found.items():
        print(f"{name:<16} {rate:>12,.1f}")
    print(json.dumps({"pairs": options.pairs, **found, "machine": describe_machine()}))


if __name__ == "__main__":
    main()
