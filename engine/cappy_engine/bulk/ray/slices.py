"""Cut Parquet files into slices of rows, and score each into its own file. Knows no cluster.

Whoever scores a slice again writes the same file again, whole or not at all. So nothing is there twice, or in part.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from cappy_engine.bulk.file_windows import most_pairs_of
from cappy_engine.bulk.folders import Folder
from cappy_engine.bulk.formats.compression import tables_for
from cappy_engine.bulk.formats.entries import Position, Reading
from cappy_engine.bulk.formats.file_format import Format, format_of
from cappy_engine.bulk.formats.sources import TableSource
from cappy_engine.bulk.formats.writers import writer_of
from cappy_engine.bulk.input_files import check_unchanged, settled, state_of
from cappy_engine.bulk.totals import Totals
from cappy_engine.bulk.windows import Window, encode, windows
from cappy_engine.bulk.work import Work, rejects
from cappy_engine.errors import CappyError
from cappy_engine.overlap import ahead
from cappy_engine.scorer import Scorer
from cappy_engine.storage import whole_file

SLICE_ROWS = 65_536
"""Rows of a slice: seconds of work for a GPU, minutes for a few cores. So much is lost with a worker. A whole number of
windows, so that the same pairs share a batch as on one machine."""
SLICE_BYTES = 256 * 2**20
"""Long rows make smaller slices."""
PARQUET = Format("parquet")


@dataclass(frozen=True)
class Slice:
    """Rows of `file` from `start` on, which go to `out` in the folder of results.

    `digest` is that of the file, `size` is the part of its bytes that the slice stands for.
    """

    file: str
    digest: str
    start: int
    rows: int
    out: str
    size: int

    def __str__(self) -> str:
        """Name the file and the rows, from 1."""
        return f"{self.file}, rows {self.start + 1} to {self.start + self.rows}"


def cut_slices(folder: Folder, slice_rows: int = SLICE_ROWS) -> list[Slice]:
    """Cut Parquet files into slices of at most `slice_rows` rows. Only the footers are read.

        >>> cut_slices(Folder(files_of_folder(Path("samples")), Path("scored")))[0].out
        'part-0001.parquet'

    A file of one slice keeps its name; others become `NAME-00000.parquet`, `NAME-00001.parquet`... Raises CappyError
    for a file that is not Parquet or lacks a column, and for names that would be there twice.
    """
    slices: list[Slice] = []
    for path, name in folder.files:
        form = format_of(path)
        if form.kind != "parquet":
            raise CappyError(
                f"{path} is {form}, and a cluster takes Parquet only; leave it out, or score it without Ray"
            )
        settled(path)  # else a change at once might leave the time that the digest has
        with path.open("rb") as file:
            source = TableSource(path, file, Reading(folder.task))
            total, digest, size = source.total or 0, _digest(source, file), source.size
        rows = max(1, min(slice_rows, SLICE_BYTES * max(1, total) // max(1, size)))
        starts = range(0, max(1, total), rows)
        for number, start in enumerate(starts):
            out = name if len(starts) == 1 else name.with_name(f"{name.stem}-{number:05}{name.suffix}")
            count = min(rows, total - start)
            share = path.stat().st_size * count // max(1, total)
            slices.append(Slice(str(path.absolute()), digest, start, count, str(out), share))
    twice = [name for name, times in Counter(part.out for part in slices).items() if times > 1]
    if twice:
        raise CappyError(f"two files would become {twice[0]}; rename one of them, or give them in two commands")
    return slices


def score_slice(scorer: Scorer, part: Slice, job: Folder, rejected: Path | None = None) -> Totals:
    """Score a slice into its file in `job.out`. Its bad rows go to the folder `rejected`.

        >>> score_slice(scorer, slices[0], job).pairs
        7

    Raises InvalidLine for a bad row if the job stops at one, and CappyError if the file is not the one that was cut.
    """
    tables, path, out = tables_for(part.file), Path(part.file), job.out / part.out
    work = Work(scorer, job.options, lambda totals: None, Totals(), has_rejects=rejected is not None)
    bad, rows = bytearray(), 0
    with path.open("rb") as file, tempfile.TemporaryFile() as streams:
        state = state_of(os.fstat(file.fileno()))
        source = TableSource(path, file, Reading(job.task), end=part.start + part.rows)
        found = _digest(source, file)
        if found != part.digest:
            raise CappyError(
                f"{path} is not the file that the job began with: it has {found}, and had {part.digest}; do all nodes "
                "see the same file? If it was changed, begin anew"
            )
        writer = writer_of(PARQUET, PARQUET, job.task, source.header)
        streams.write(writer.begin())
        with ahead(_windows(scorer, source, part, job)) as ready:
            for window in ready:
                check_unchanged(file, path, state)
                window, scored = work.score(window)
                streams.write(writer.rows(scored))
                bad += rejects(window)
                rows += len(scored)
                work.check(window)
        if rows + work.totals.refused != part.rows:
            raise CappyError(
                f"{part}: {rows} scored and {work.totals.refused} bad rows are not all of them; begin anew"
            )
        if bad and rejected is not None:
            _make_room(rejected / part.out)
            with whole_file(rejected / f"{part.out}.rejects.jsonl") as listed:
                listed.write(bad)
        _make_room(out)
        with whole_file(out) as made:
            tables.write_parquet_of(streams, streams.tell(), made)
    work.totals.bytes_scored = part.size
    return work.totals


def _digest(source: TableSource, file: BinaryIO) -> str:
    """Tell a file by its footer and its time; values may change behind one footer.

    In milliseconds: some file systems have no finer ones.
    """
    milliseconds = os.fstat(file.fileno()).st_mtime_ns // 10**6
    return f"{source.digest()}, changed at {datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()}"


def _windows(scorer: Scorer, source: TableSource, part: Slice, job: Folder) -> Iterator[Window]:
    """Yield the tokenised windows of a slice."""
    start, options = Position(part.start, part.start, part.start), job.options
    for window in windows(source, start, most_pairs=most_pairs_of(scorer, options), stops=options.stops):
        named = dataclasses.replace(window, path=part.file)
        yield encode(scorer, named, too_long=options.too_long, stops=options.stops)


def _make_room(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
