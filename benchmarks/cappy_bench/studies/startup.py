"""Measures a process until its first score, and what it holds after many: time and memory, for each precision.

    python -m cappy_bench.studies.startup BUNDLE [--rounds 3]

`open` is `Scorer.open` alone, digests included, `ready` the whole process from its start to its first score. The files
are in the system's cache from the first, discarded, round on. `resident` and `peak` are what the process has after that
score. `working` is what it holds when it has scored the package's pairs in bulk, each page counted once: two sessions
map the same weights then, and the system's count of resident memory has them twice (`counted`). `tokenizer` is the part
that a tokenizer takes, measured by one more.

The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from cappy_bench.memory import peak_bytes, resident_bytes, shared_bytes
from cappy_engine.bundle import open_bundle
from cappy_engine.options import Precision
from cappy_engine.scorer import Scorer
from cappy_engine.tokenizer import PairTokenizer

MEMORY = ("resident", "peak", "working", "counted", "tokenizer")


def _measure(bundle: Path, precision: str, started: float) -> dict[str, float]:
    """Open the bundle and score one pair; `started` is the time.time() of the process."""
    before = time.perf_counter()
    scorer = Scorer.open(bundle, device="cpu", precision=cast(Precision, precision))
    opened = time.perf_counter() - before
    scorer.score([("Is the sky blue?", "Yes")])
    found = {
        "open_seconds": opened,
        "ready_seconds": time.time() - started,
        "resident_bytes": resident_bytes(),
        "peak_bytes": peak_bytes(),
    }
    # Not imported before: its time would be the engine's.
    from cappy_export.proof.pairs import default_pairs

    scorer.score(default_pairs())
    found |= {"working_bytes": shared_bytes(), "counted_bytes": resident_bytes()}
    opened_bundle, held = open_bundle(bundle), shared_bytes()
    another = PairTokenizer.from_file(
        opened_bundle.file("tokenizer.json"), max_length=opened_bundle.manifest.max_length
    )
    found["tokenizer_bytes"] = shared_bytes() - held
    del another
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("PRECISION", "STARTED"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(_measure(options.bundle, options.measure[0], float(options.measure[1]))))
        return
    found: dict[str, dict[str, float]] = {}
    for precision in open_bundle(options.bundle).manifest.precisions:
        rounds = []
        for _ in range(options.rounds + 1):
            command = [
                sys.executable,
                "-P",
                "-m",
                "cappy_bench.studies.startup",
                str(options.bundle),
                "--measure",
                precision,
            ]
            command.append(str(time.time()))
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  (ourselves)
            rounds.append(json.loads(done.stdout))
        found[precision] = {name: statistics.median(row[name] for row in rounds[1:]) for name in rounds[0]}
    print("precision  open s  ready s" + "".join(f"  {name:>9} MB" for name in MEMORY))
    for precision, row in found.items():
        held = "".join(f"  {row[f'{name}_bytes'] / 1e6:>12.0f}" for name in MEMORY)
        print(f"{precision:<9}  {row['open_seconds']:>6.2f}  {row['ready_seconds']:>7.2f}{held}")
    print(json.dumps({"bundle": options.bundle.name, **found}))


if __name__ == "__main__":
    main()
