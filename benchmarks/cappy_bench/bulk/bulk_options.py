"""Lists what can be asked of `cappy bench bulk`. Knows nothing of how it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cappy_engine.bundle import EMBEDDED
from cappy_engine.options import Asked, check_asked

FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet")


@dataclass(frozen=True)
class BulkBenchOptions:
    """How many pairs of which model are scored from which format.

    >>> BulkBenchOptions(pairs=1_000_000).form
    'jsonl'
    """

    bundle: Annotated[Path, Asked("folder of the bundle (default: cappy-mini)", metavar="BUNDLE")] = EMBEDDED
    pairs: Annotated[int, Asked("pairs in the file", least=1)] = 20_000
    form: Annotated[str, Asked("format of the file", flag="--format", choices=FORMATS)] = "jsonl"
    sample: Annotated[int, Asked("pairs that the scorer alone is timed on at a time", least=1)] = 4000
    every: Annotated[int, Asked("seconds of the command between two of these times", least=0)] = 20
    window: Annotated[int | None, Asked("pairs of a window (default: that of 'cappy score')", least=1)] = None
    seed: Annotated[int, Asked("seed of the texts", least=0)] = 0
    work: Annotated[Path, Asked("folder for the files, which are removed at the end", metavar="FOLDER")] = Path(
        "bench/bulk"
    )
    out: Annotated[Path | None, Asked("the result, as JSON", metavar="RESULT.json")] = None
    force: Annotated[bool, Asked("replace the result if it exists")] = False

    def __post_init__(self) -> None:
        check_asked(self)
        if self.force and self.out is None:
            raise ValueError("--force replaces RESULT.json; name it with --out")
