"""Measures `rank(..., exact_winner=True)`: is int8's winner fp32's, with it and without, and at what price?

    python -m cappy_bench.studies.exact_winner BUNDLE CANDIDATES.jsonl [--count 300]

CANDIDATES.jsonl has instruction and response, and may be a .jsonl.gz; the candidates of an instruction are its lines.
BUNDLE has fp32 and int8. Groups of two or more distinct candidates are ranked in fp32, in int8 and in int8 with an
exact winner, one group after the other, in turn.

The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from cappy_engine.bulk.formats.json_lines import open_lines, read_rows
from cappy_engine.scorer import Scorer


def _read_groups(path: Path) -> dict[str, list[str]]:
    """Read the distinct candidates of each instruction that has two or more."""
    groups: dict[str, dict[str, None]] = {}
    with open_lines(path) as lines:
        for row in read_rows(lines):
            groups.setdefault(row.pair[0], {})[row.pair[1]] = None
    return {instruction: list(candidates) for instruction, candidates in groups.items() if len(candidates) > 1}


def compare(bundle: Path, groups: dict[str, list[str]]) -> dict[str, Any]:
    """Rank every group three ways; return seconds, winners kept, and how much was scored again.

    >>> compare(Path("bundle"), {"Is the sky blue?": ["Yes", "No"]})["groups"]
    1
    """
    seconds = {"fp32": 0.0, "int8": 0.0, "int8 with exact winner": 0.0}
    kept = {"int8": 0, "int8 with exact winner": 0}
    again = groups_again = 0
    with (
        Scorer.open(bundle, device="cpu", precision="fp32") as fp32,
        Scorer.open(bundle, device="cpu", precision="int8") as int8,
    ):
        ways = {"fp32": (fp32, False), "int8": (int8, False), "int8 with exact winner": (int8, True)}
        for way in ways.values():
            way[0].rank("Is the sky blue?", ["Yes", "No"], exact_winner=way[1])
        for instruction, candidates in groups.items():
            winners = {}
            for name, (scorer, is_exact) in ways.items():
                started = time.perf_counter()
                ranked = scorer.rank(instruction, candidates, exact_winner=is_exact)
                seconds[name] += time.perf_counter() - started
                winners[name] = ranked[0].index
                again += sum(candidate.is_exact for candidate in ranked)
                groups_again += any(candidate.is_exact for candidate in ranked)
            for name in kept:
                kept[name] += winners[name] == winners["fp32"]
    count = sum(map(len, groups.values()))
    return {
        "groups": len(groups),
        "candidates": count,
        "seconds": seconds,
        "winners_kept": {name: value / len(groups) for name, value in kept.items()},
        "groups_scored_again": groups_again / len(groups),
        "candidates_scored_again": again / count,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("candidates", type=Path)
    parser.add_argument("--count", type=int, default=300, help="rank about so many of the groups")
    options = parser.parse_args(argv)
    groups = _read_groups(options.candidates)
    if not groups:
        parser.error(f"no instruction of {options.candidates} has two different candidates or more")
    step = max(1, len(groups) // options.count)
    found = compare(options.bundle, dict(list(groups.items())[::step]))
    print(f"{found['groups']} groups, {found['candidates']} candidates")
    print(f"{'ranked in':<24}  winners of fp32  seconds")
    for name, value in found["seconds"].items():
        kept = 100 * found["winners_kept"].get(name, 1.0)
        print(f"{name:<24}  {kept:>14.1f}%  {value:>7.2f}")
    print(
        f"scored again in fp32: {100 * found['candidates_scored_again']:.1f}% of the candidates, in "
        f"{100 * found['groups_scored_again']:.1f}% of the groups"
    )
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    print(json.dumps({"bundle": options.bundle.name, "versions": versions, **found}))


if __name__ == "__main__":
    main()
