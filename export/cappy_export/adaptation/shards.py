"""Read pairs with labels from files as they are needed: JSON Lines, CSV or Parquet, packed or not.

A shard is read from any position on, so that nothing but a position must be remembered. Knows nothing of tokens.
"""

from __future__ import annotations

import contextlib
import glob
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cappy_engine.bulk.folders import files_of_folder
from cappy_engine.bulk.formats.entries import Entry, Position, Reading, Refused, Source
from cappy_engine.bulk.formats.file_format import format_of
from cappy_engine.bulk.formats.sources import open_source
from cappy_engine.bulk.formats.table_rows import values_of
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.errors import AdaptError, CappyError, InvalidLine, OutputError, message_of
from cappy_engine.pairs import Pair
from cappy_export.adaptation.examples import Examples, check_label
from cappy_export.options import Say

LABEL = "label"

log = logging.getLogger(__name__)


class Labelled(NamedTuple):
    """Hold a pair and its label; `position` tells where the next one begins, as long as this one is the last."""

    pair: Pair
    label: float
    position: Callable[[], Position | None]


class Shard(Protocol):
    """Read a part of the examples to its end, from the beginning or a position.

    >>> [pair for pair, label, position in shard.read(Position())]
    """

    @property
    def name(self) -> str: ...

    def read(self, start: Position) -> Iterator[Labelled]: ...


@dataclass(frozen=True)
class HeldShard:
    """Examples that are in memory."""

    examples: Examples
    name: str = "the examples"

    def read(self, start: Position) -> Iterator[Labelled]:
        """Yield the examples from a position on."""
        for row in range(start.offset, len(self.examples)):
            behind = Position(row + 1, row + 1)
            yield Labelled(self.examples.pairs[row], float(self.examples.labels[row]), lambda behind=behind: behind)  # type: ignore[misc]


@dataclass(frozen=True)
class FileShard:
    """A file of rows with `instruction`, `response` and `label`.

    >>> next(FileShard(Path("docs/examples/train.jsonl")).read(Position())).label
    1.0
    """

    path: Path

    @property
    def name(self) -> str:
        """Give the file's name, which tells it from the other shards on any machine."""
        return self.path.name

    def read(self, start: Position) -> Iterator[Labelled]:
        """Yield the examples from a position on. Raises AdaptError, with file and line, for what is not one.

        A damaged file is a CappyError.
        """
        try:
            with open_source(self.path, Reading(LabelTask(), keeps_fields=True)) as source:
                label_of = _labels(self.path, source)
                for item in source.rows(start):
                    if isinstance(item, Refused):
                        raise item.error
                    if isinstance(item, Entry):
                        yield Labelled(item.pairs[0], label_of(item), source.position)
        except InvalidLine as error:
            raise AdaptError(f"{self.path}, {error}") from error
        except OSError as error:
            raise AdaptError(f"the examples cannot be read: {message_of(error)}") from error


class LabelTask(ScoreTask):
    """Take the one pair of each row, to learn from it; nothing is added to the row, so it may have any other field."""

    @property
    def added(self) -> Mapping[str, str]:
        """Name nothing."""
        return {}


def paths_of(source: str | Path) -> list[Path]:
    """List the paths that fit a pattern such as `rows-*.jsonl`. What exists is taken as it is.

    >>> paths_of("docs/examples/train.jsonl")
    [PosixPath('docs/examples/train.jsonl')]

    Raises AdaptError if no path fits.
    """
    path = Path(source)
    if path.exists() or not glob.has_magic(str(source)):
        return [path]
    found = sorted(Path(each) for each in glob.glob(str(source), recursive=True))  # noqa: PTH207 - absolute, too
    if not found:
        raise AdaptError(f"the examples cannot be read: no file fits the pattern {source}")
    return found


def find_shards(
    source: str | Path, *, outputs: Sequence[Path] = (), say: Say = log.warning, is_read_again: bool = True
) -> list[Shard]:
    """List the files that `source` names: one, those in a folder and below it, or those that fit a pattern.

    >>> [shard.name for shard in find_shards("docs/examples/train.jsonl")]
    ['train.jsonl']

    Links are followed. Hidden files of a folder are left out, and `say` is told so. Raises AdaptError if there is none,
    if one cannot be read, or not again, as a pipe, and OutputError if one of the `outputs` would be in such a folder.
    """
    paths: list[Path] = []
    for path in paths_of(source):
        try:
            paths += [each for each, _ in files_of_folder(path, outputs, say=say)] if path.is_dir() else [path]
        except OutputError:
            raise
        except CappyError as error:
            raise AdaptError(f"the examples cannot be read: {error}") from error
    for path in paths if is_read_again else ():
        if path.exists() and not path.is_file():
            raise AdaptError(f"{path} is a pipe or a device, and TRAIN is read several times; save it to a file")
    return [FileShard(path) for path in dict.fromkeys(paths)]  # a pattern may fit a folder and what is in it


def read_all(shards: Sequence[Shard]) -> Iterator[Labelled]:
    """Yield the examples of all shards, one after another.

    >>> len(list(read_all(find_shards("docs/examples/train.jsonl"))))
    144
    """
    for shard in shards:
        with contextlib.closing(shard.read(Position())) as rows:  # type: ignore[type-var]
            yield from rows


def _labels(path: Path, source: Source) -> Callable[[Entry], float]:
    """Give the function that finds a row's label in a file of this kind."""
    kind = format_of(path).kind
    if kind == "jsonl":
        return lambda entry: check_label(entry.fields or {}, entry.number)
    names = list(source.columns if kind == "csv" else source.columns.names)
    if LABEL not in names:
        raise AdaptError(f"{path} has no column {LABEL!r}; each example needs one of 0 (wrong) to 1 (right)")
    if kind == "csv":
        return lambda entry: check_label({LABEL: _number((entry.fields or {})[LABEL])}, entry.number)
    held: list[Any] = [None, []]  # the batch of the last row, and its labels

    def of_table(entry: Entry) -> float:
        batch, place = entry.raw
        if held[0] is not batch:
            held[:] = batch, values_of(batch, LABEL)
        return check_label({LABEL: held[1][place]}, entry.number, "row")

    return of_table


def _number(text: str) -> float | str:
    """Read a number as other programs write it: for Python 0_1 is 1."""
    try:
        return float(text) if text.isascii() and "_" not in text else text
    except ValueError:
        return text
