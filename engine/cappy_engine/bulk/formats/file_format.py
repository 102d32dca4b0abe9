"""Tell by a file's name what is in it, and how it is packed. Pure: names in, formats out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cappy_engine.errors import CappyError

Kind = Literal["jsonl", "csv", "parquet"]
Packing = Literal["", "gz", "zst"]

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""By suffix. A file of any other name is taken for JSON Lines."""


@dataclass(frozen=True)
class Format:
    """What a file holds: its `kind`, the `delimiter` of CSV, and the `packing` of all.

    >>> format_of("pairs.tsv.gz")
    Format(kind='csv', packing='gz', delimiter='\\t')
    """

    kind: Kind = "jsonl"
    packing: Packing = ""
    delimiter: str = ""

    def __str__(self) -> str:
        names = {"jsonl": "JSON Lines", "csv": "TSV" if self.delimiter == "\t" else "CSV", "parquet": "Parquet"}
        return names[self.kind]


def format_of(path: str | Path) -> Format:
    """Tell the format of a file by its name; anything unknown is JSON Lines.

        >>> format_of("pairs.jsonl.zst")
        Format(kind='jsonl', packing='zst', delimiter='')

    Raises CappyError for a packed Parquet file.
    """
    name = Path(path).name.lower()
    packing = packing_of(name)
    suffix = Path(name.removesuffix(f".{packing}") if packing else name).suffix
    kind = KINDS.get(suffix, "jsonl")
    if kind == "parquet" and packing:
        raise CappyError(f"{path}: a Parquet file is packed inside; give it without .{packing}")
    return Format(kind, packing, {".tsv": "\t", ".csv": ","}.get(suffix, ""))


def packing_of(path: str | Path) -> Packing:
    """Tell by its name what a file is packed with; empty if it is not.

    >>> packing_of("pairs.jsonl.gz")
    'gz'
    """
    suffix = Path(path).suffix.lower()
    return "gz" if suffix == ".gz" else "zst" if suffix == ".zst" else ""


def is_known(path: Path) -> bool:
    """Tell if a file of a folder is one of rows: by its suffix.

    >>> is_known(Path("part-0001.parquet")), is_known(Path("README.md"))
    (True, False)
    """
    name = path.name.lower()
    packing = packing_of(name)
    return Path(name.removesuffix(f".{packing}") if packing else name).suffix in KINDS
