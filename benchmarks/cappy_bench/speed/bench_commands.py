"""`cappy bench`: options in, calls out. Measuring and drawing are imported where they are needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cappy_bench.peers.specs import SPECS
from cappy_bench.speed.figures import read_result
from cappy_bench.speed.options import RESULTS, RunOptions
from cappy_bench.speed.tables import change_tables, result_tables, setting_table


def run(options: RunOptions) -> None:
    """Measure throughput and latency, of other tools too; print tables, and the result as one JSON document."""
    from cappy_bench.speed.measure import measure  # PyTorch comes with it

    result = measure(options, say=_say)
    print(result_tables(result))
    print(json.dumps(result, allow_nan=False, ensure_ascii=False))


def compare(results: Sequence[Path]) -> None:
    """Print one result's tables, or what changed from the first to the second."""
    if len(results) > 2:
        sys.exit("compare takes one result, or two")
    if len(results) == 1:
        print(result_tables(read_result(results[0])))
    else:
        names = results[0].name, results[1].name
        print(change_tables(*map(read_result, results), names=names))


def report(results: Path) -> None:
    """Render every result of a folder as a page with plots."""
    from cappy_bench.speed.report import write_report  # matplotlib comes with it

    write_report(results)


def list_() -> None:
    """Print the runners and their settings."""
    print(setting_table(SPECS))


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[0] == "run":
        parser = argparse.ArgumentParser()
        for name, field in RunOptions.__dataclass_fields__.items():
            flag = {"runners": "--runner", "environments": "--environment", "workloads": "--workload"}.get(name)
            kind: Any = next((k for k in (Path, int, float) if k.__name__ in str(field.type).split("Asked")[0]), str)
            action = {"action": "append"} if flag else {}
            parser.add_argument(
                flag or f"--{name.replace('_', '-')}", dest=name, type=kind, default=field.default, **action
            )
        found = vars(parser.parse_args(words[1:]))
        run(RunOptions(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}))
    elif words[0] == "compare":
        compare([Path(word) for word in words[1:]])
    elif words[0] == "report":
        report(Path(words[2]) if len(words) > 1 else RESULTS)
    else:
        list_()


if __name__ == "__main__":
    main()
