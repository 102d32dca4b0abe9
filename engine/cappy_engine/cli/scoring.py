"""`cappy score` and `cappy rank`: a bundle at work."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, BinaryIO

import click

from cappy_engine.bulk.formats.lines import Lines
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import RankTask, ScoreTask, Task
from cappy_engine.cli import text
from cappy_engine.cli.arguments import EXIT_OK, bundle_option, command, flags_given, quiet_option, takes
from cappy_engine.cli.bulk_work import BulkOptions, run_bulk
from cappy_engine.cli.cluster_work import run_on_cluster
from cappy_engine.cli.streams import is_verbose, open_stdin, print_json, say, show
from cappy_engine.cli.values import Checked, not_empty
from cappy_engine.errors import CappyError, reason_of
from cappy_engine.options import Asked, ScorerOptions, check_asked
from cappy_engine.scorer import Scorer

FOR_TEXTS_TOO = ("activation", "too_long")
"""The options of rows and columns that `cappy rank` honours without files."""
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""What Python makes of a byte that it cannot decode."""


@dataclass(frozen=True)
class RankTexts:
    """The texts that `cappy rank` ranks, and how.

    >>> RankTexts("Is the sky blue?", ("Yes", "No")).literal
    False
    """

    instruction: Annotated[str | None, Asked("the instruction; @FILE reads it, - is stdin", metavar="TEXT")] = None
    candidates: Annotated[
        tuple[str, ...],
        Asked("a response to rank; repeat for each. @FILE and - give one a line", flag="--candidate", metavar="TEXT"),
    ] = ()
    literal: Annotated[bool, Asked("take texts as they are: @ and - mean nothing")] = False
    as_json: Annotated[bool, Asked("print a JSON list", flag="--json")] = False
    exact_winner: Annotated[
        bool, Asked("score candidates again in fp32 where int8's error could decide which is best")
    ] = False

    def __post_init__(self) -> None:
        check_asked(self)


@command(
    """
    examples:
      cappy score pairs.jsonl --bundle cappy-bundle -o scored.jsonl
      cappy score pairs.parquet -o scored.parquet --resume --rejects bad.jsonl
      cappy score samples/ -o scored/
      cappy score /nfs/samples -o /nfs/scored --ray 10.0.0.1:6379
      cappy score pairs.csv.gz --bundle cappy-bundle --precision int8 > scored.csv
      my-program | cappy score - --bundle cappy-bundle

    a line of PAIRS: {"instruction": "Is the sky blue?", "response": "Yes"}
    exit status: 0 all rows scored, 1 stopped by an error, 2 wrong usage, 3 some rows were skipped
    """
)
@click.argument("inputs", metavar="PAIRS...", nargs=-1, required=True, type=Checked(not_empty))
@bundle_option
@takes(ScorerOptions)
@takes(BulkOptions, "bulk", section="Files")
@takes(RowOptions, "rows", section="Rows")
@takes(ScoreTask, "task", section="Columns and scores")
@quiet_option
def score(
    inputs: Sequence[str],
    bundle: Path,
    options: ScorerOptions,
    bulk: BulkOptions,
    rows: RowOptions,
    task: ScoreTask,
) -> int:
    """Score the pairs of files: JSON Lines, CSV or Parquet.

    PAIRS are files, globs in quotes, or folders. The format is told by the name, behind which .gz or .zst may stand; -
    is JSON Lines from stdin. Every row is written back with its score, in the order of the input.
    """
    return _run_files(inputs, bundle, options, task, rows, bulk)


@command(
    """
    examples:
      cappy rank --instruction "Is the sky blue?" --candidate Yes --candidate No
      cappy rank samples.jsonl -o picked.jsonl --resume
      cappy rank --bundle cappy-bundle --instruction "Is the sky blue?" --candidate Yes --candidate No --json
      cappy rank --bundle cappy-bundle --precision int8 --exact-winner --instruction "Yes?" --candidate a --candidate b
      cappy rank --instruction @article.txt --candidate @headlines.txt
      my-program | cappy rank --instruction "Which line is a question?" --candidate -

    @FILE stands for what is in the file, and - for stdin: as the instruction the whole text, as candidates one a line.
    With --literal every text is taken as it is, also one that begins with @.
    a line of FILES: {"instruction": "Is the sky blue?", "candidates": ["Yes", "No"]}
    """
)
@click.argument("inputs", metavar="[FILES...]", nargs=-1, type=Checked(not_empty))
@bundle_option
@takes(ScorerOptions)
@takes(RankTexts, "texts")
@takes(BulkOptions, "bulk", section="Files")
@takes(RowOptions, "rows", section="Rows")
@takes(RankTask, "task", section="Columns and scores")
@quiet_option
def rank(
    inputs: Sequence[str],
    bundle: Path,
    options: ScorerOptions,
    texts: RankTexts,
    bulk: BulkOptions,
    rows: RowOptions,
    task: RankTask,
) -> int:
    """Rank the candidates of one instruction, best first. Of files, rank those of every row.

    FILES are as for 'cappy score'. Every row is written back with the winner, its place from 0, all scores, and the
    margin by which the winner is ahead.
    """
    if inputs:
        if flags_given([field.name for field in fields(RankTexts)]):
            raise click.UsageError(
                f"unexpected argument {inputs[0]!r}; repeat the option for each value: --candidate ... --candidate "
                f"{inputs[0]}; files are ranked without these options"
            )
        return _run_files(inputs, bundle, options, task, rows, bulk)
    of_files = [*fields(BulkOptions), *fields(RankTask), *fields(RowOptions)]
    given = flags_given([field.name for field in of_files if field.name not in FOR_TEXTS_TOO])
    if given:
        raise click.UsageError(f"{given[0]} is for files, and none was named")
    _rank_texts(bundle, options, texts, rows, task)
    return EXIT_OK


def _run_files(
    inputs: Sequence[str], bundle: Path, options: ScorerOptions, task: Task, rows: RowOptions, bulk: BulkOptions
) -> int:
    """Score or rank files here, or on a cluster."""
    if bulk.ray is not None:
        return run_on_cluster(inputs, bundle, options, task, rows, bulk)
    return run_bulk(inputs, bundle, task, rows, bulk, lambda: _open_scorer(bundle, options))


def _rank_texts(bundle: Path, options: ScorerOptions, texts: RankTexts, rows: RowOptions, task: RankTask) -> None:
    """Rank the candidates that the command line gave."""
    instruction, candidates, exact_winner = texts.instruction, texts.candidates, texts.exact_winner
    if instruction is None or not candidates:
        missing = "--instruction" if instruction is None else "--candidate"
        raise click.UsageError(f"Missing option '{missing}', or files to rank.")
    if not texts.literal:
        instruction, candidates = _read_texts(instruction, candidates, options.max_text_chars)
    for flag, given in (("--instruction", [instruction]), ("--candidate", candidates)):
        _check_decoded(flag, given)
    with _open_scorer(bundle, options) as scorer:
        ranked = scorer.rank(
            instruction,
            candidates,
            exact_winner=exact_winner,
            activation=task.activation,
            too_long=rows.too_long,
        )
    if texts.as_json:
        print_json([dataclasses.asdict(candidate) for candidate in ranked])
    else:
        show(text.describe_ranking(ranked))
    truncated = sum(candidate.is_truncated for candidate in ranked)
    if truncated:
        say(f"{truncated} of {len(ranked)} pairs were truncated")
    if exact_winner:
        say(f"{sum(candidate.is_exact for candidate in ranked)} of {len(ranked)} candidates were scored again in fp32")


def _open_scorer(bundle: Path, options: ScorerOptions) -> Scorer:
    scorer = Scorer.open_with(bundle, options)
    say(text.explain_info(scorer.info) if is_verbose() else text.describe_info(scorer.info))
    return scorer


def _read_texts(instruction: str, candidates: Sequence[str], max_text_chars: int) -> tuple[str, tuple[str, ...]]:
    """Put in what @FILE and - stand for."""
    if [instruction, *candidates].count("-") > 1:
        raise click.UsageError("- was given twice, but stdin is read once; put one of the texts into a file: @FILE")
    if _is_read(instruction):
        (instruction,) = _read("--instruction", instruction, max_text_chars, lambda file, most: [_whole(file, most)])
    found: list[str] = []
    for candidate in candidates:
        if not _is_read(candidate):
            found.append(candidate)
            continue
        found += filter(str.strip, _read("--candidate", candidate, max_text_chars, _lines))
    if not found:
        raise CappyError(f"{' and '.join(candidates)} held no candidates, which are read one a line")
    return instruction, tuple(found)


def _check_decoded(flag: str, texts: Iterable[str]) -> None:
    """Refuse texts with bytes that Python could not read: it made surrogates of them, U+DC80 to U+DCFF."""
    found = next(filter(None, map(ESCAPED_BYTE.search, texts)), None)
    if found is None:
        return
    encoding, byte = sys.getfilesystemencoding(), f"{flag} has the byte {ord(found[0]) - 0xDC00:#x}"
    if encoding == "utf-8":
        raise CappyError(f"{byte}, which is not UTF-8; give the text in UTF-8")
    raise CappyError(
        f"{byte}, which {encoding}, the encoding of the locale, cannot read; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    )


def _is_read(word: str) -> bool:
    return word == "-" or word.startswith("@")


def _whole(file: BinaryIO, most: int) -> bytes:
    """Read a file or stream whole. If it has more than `most` bytes, read only its beginning."""
    content = bytearray()
    for part in Lines(file, most):
        content += part or b""
        if len(content) > most:
            break
    return bytes(content)


def _lines(file: BinaryIO, most: int) -> Iterator[bytes]:
    """Yield the lines of a file or stream. If a line has more than `most` bytes, yield only its beginning."""
    return (line for line in Lines(file, most) if line is not None)


def _read(flag: str, word: str, max_text_chars: int, take: Callable[[BinaryIO, int], Iterable[bytes]]) -> list[str]:
    """Read texts from what @FILE or - stands for, without their last line breaks: `take` takes them.

    No more is read than a text may have, so that a device or an endless pipe takes no memory.
    """
    most = min(4 * max_text_chars + len("\r\n"), sys.maxsize - 1)  # the bytes of a character in UTF-8
    texts: list[str] = []
    try:
        with contextlib.nullcontext(open_stdin()) if word == "-" else Path(word[1:]).open("rb") as file:
            for content in take(file, most):
                if len(content) > most:
                    raise CappyError(
                        f"{flag} {word} holds a text of more than max_text_chars, {max_text_chars} characters; shorten "
                        "it, or raise that limit"
                    )
                texts.append(content.decode("utf-8" if texts else "utf-8-sig").rstrip("\r\n"))
    except OSError as error:
        raise CappyError(
            f"{flag} {word}: {word[1:]} cannot be read ({reason_of(error)}); with --literal {word} is taken as a text"
        ) from error
    except UnicodeDecodeError as error:
        raise CappyError(f"{flag} {word} is not UTF-8: {error}") from error
    return texts
