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
OTHER_PACKINGS = (".bz2", ".xz", ".lzma", ".lz4", ".zip", ".7z", ".snappy", ".tar", ".tgz", ".gzip", ".zstd")
OTHER_FORMATS = (".xlsx", ".xls", ".ods", ".arrow", ".feather", ".avro", ".orc")
"""Suffixes that tell something else. A file of such a name would not be what it says, so it is refused."""


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

    Raises CappyError for a packed Parquet file, and what `check_name` raises.
    """
    check_name(path)
    packing, suffix = packing_of(path), _suffix(path)
    kind = KINDS.get(suffix, "jsonl")
    if kind == "parquet" and packing:
        raise CappyError(f"{path}: a Parquet file is packed inside; give it without .{packing}")
    return Format(kind, packing, {".tsv": "\t", ".csv": ","}.get(suffix, ""))


def check_name(path: str | Path) -> None:
    """Raise CappyError if a name tells a packing or format that is not supported.

    Such files are neither read nor written.

    >>> check_name("pairs.csv.bz2")
    CappyError('pairs.csv.bz2: files packed as .bz2 are neither read nor written; choose .gz or .zst, or a name ...')
    """
    suffix = _suffix(path)
    if suffix in OTHER_PACKINGS:
        problem = "are neither read nor written; choose .gz or .zst, or a name without packing"
        raise CappyError(f"{path}: files packed as {suffix} {problem}")
    if suffix in OTHER_FORMATS:
        raise CappyError(f"{path}: {suffix} files are neither read nor written; choose .jsonl, .csv, .tsv or .parquet")


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
    return _suffix(path) in KINDS


def _suffix(path: str | Path) -> str:
    """Give the suffix that tells the format, in small letters: the one before that of the packing."""
    name, packing = Path(path).name.lower(), packing_of(path)
    return Path(name.removesuffix(f".{packing}") if packing else name).suffix
