"""`cappy score` and `cappy rank`: a bundle at work."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import click

from cappy_engine.bulk.outputs import files_in
from cappy_engine.bulk.score_file import LineOptions, Totals, score_lines
from cappy_engine.bundle import MANIFEST
from cappy_engine.cli import text
from cappy_engine.cli.arguments import EXIT_OK, EXIT_SKIPPED, bundle_option, command, force_option, quiet_option, takes
from cappy_engine.cli.progress import progress_bar
from cappy_engine.cli.streams import is_verbose, open_input, open_output, open_stdin, print_json, say, show
from cappy_engine.cli.values import PATH, Words
from cappy_engine.errors import CappyError
from cappy_engine.options import ScorerOptions
from cappy_engine.pairs import TOO_LONG, TooLong
from cappy_engine.scorer import Scorer

too_long_option = click.option(
    "--too-long",
    type=Words(TOO_LONG),
    default="truncate",
    show_default=True,
    help="what to do with a pair of more tokens than the model takes",
)


@command(
    """
    examples:
      cappy score pairs.jsonl --bundle cappy-bundle -o scored.jsonl
      cappy score pairs.jsonl.gz --bundle cappy-bundle --precision int8 > scored.jsonl
      my-program | cappy score - --bundle cappy-bundle

    a line of PAIRS: {"instruction": "Is the sky blue?", "response": "Yes"}
    exit status: 0 all lines scored, 1 stopped by an error, 2 wrong usage, 3 some lines were skipped
    """
)
@click.argument("pairs", metavar="PAIRS")
@bundle_option
@takes(ScorerOptions)
@click.option(
    "-o", "--output", type=PATH, metavar="OUT", help="file to write, packed if it ends in .gz (default: stdout)"
)
@force_option
@takes(LineOptions, "reading")
@quiet_option
def score(
    pairs: str,
    bundle: Path,
    options: ScorerOptions,
    output: Path | None,
    force: bool,
    reading: LineOptions,
) -> int:
    """Score the pairs of a JSON Lines file.

    PAIRS is a file, unpacked if its name ends in .gz, or - for stdin. Every line is written back with its score.
    """
    with (
        open_input(pairs) as lines,
        open_output(output, force=force, inputs=[lines, *files_in(bundle, MANIFEST)]) as written,
    ):

        def write(rows: bytes) -> None:
            written.write(rows)
            written.flush()

        with _open_scorer(bundle, options) as scorer, _scoring_bar(lines) as progress:
            started = time.monotonic()
            totals = score_lines(
                scorer,
                lines,
                write,
                on_error=reading.on_error,
                field_name=reading.field_name,
                too_long=reading.too_long,
                max_line_bytes=reading.max_line_bytes,
                progress=progress,
            )
            seconds = time.monotonic() - started
    say(text.describe_totals(totals, seconds))
    return EXIT_SKIPPED if totals.skipped else EXIT_OK


@command(
    """
    examples:
      cappy rank --instruction "Is the sky blue?" --candidate Yes --candidate No
      cappy rank --bundle cappy-bundle --instruction "Is the sky blue?" --candidate Yes --candidate No --json
      cappy rank --bundle cappy-bundle --precision int8 --exact-winner --instruction "Yes?" --candidate a --candidate b
      cappy rank --instruction @article.txt --candidate @headlines.txt
      my-program | cappy rank --instruction "Which line is a question?" --candidate -

    @FILE stands for what is in the file, and - for stdin: as the instruction the whole text, as candidates one a line.
    With --literal every text is taken as it is, also one that begins with @.
    """
)
@bundle_option
@takes(ScorerOptions)
@click.option("--instruction", required=True, metavar="TEXT", help="the instruction; @FILE reads it, - is stdin")
@click.option(
    "--candidate",
    "candidates",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="a response to rank; repeat for each. @FILE and - give one a line",
)
@click.option("--literal", is_flag=True, help="take texts as they are: @ and - mean nothing")
@click.option("--json", "as_json", is_flag=True, help="print a JSON list")
@click.option(
    "--exact-winner",
    is_flag=True,
    help="score candidates again in fp32 where int8's error could decide which is best",
)
@too_long_option
@quiet_option
def rank(
    bundle: Path,
    options: ScorerOptions,
    instruction: str,
    candidates: Sequence[str],
    literal: bool,
    as_json: bool,
    exact_winner: bool,
    too_long: TooLong,
) -> None:
    """Rank the candidates of one instruction, best first."""
    if not literal:
        instruction, candidates = _read_texts(instruction, candidates, options.max_text_chars)
    with _open_scorer(bundle, options) as scorer:
        ranked = scorer.rank(instruction, candidates, exact_winner=exact_winner, too_long=too_long)
    if as_json:
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


def _read_texts(instruction: str, candidates: Sequence[str], max_text_chars: int) -> tuple[str, list[str]]:
    """Put in what @FILE and - stand for."""
    if [instruction, *candidates].count("-") > 1:
        raise click.UsageError("- was given twice, but stdin is read once; put one of the texts into a file: @FILE")
    if _is_read(instruction):
        (instruction,) = _read("--instruction", instruction, max_text_chars, lambda file, most: file.read(most)) or [""]
    found: list[str] = []
    for candidate in candidates:
        if not _is_read(candidate):
            found.append(candidate)
            continue
        lines = _read("--candidate", candidate, max_text_chars, lambda file, most: file.readline(most))
        found += filter(str.strip, lines)
    if not found:
        raise CappyError(f"{' and '.join(candidates)} held no candidates, which are read one a line")
    return instruction, found


def _is_read(word: str) -> bool:
    return word == "-" or word.startswith("@")


def _read(flag: str, word: str, max_text_chars: int, take: Callable[[BinaryIO, int], bytes]) -> list[str]:
    """Read texts from what @FILE or - stands for, without their last line breaks: `take` takes one of them.

    No more is read than a text may have, so that a device or an endless pipe takes no memory.
    """
    most = 4 * max_text_chars + len("\r\n")  # the bytes of a character in UTF-8
    texts: list[str] = []
    try:
        with contextlib.nullcontext(open_stdin()) if word == "-" else Path(word[1:]).open("rb") as file:
            while content := take(file, most + 1):
                if len(content) > most:
                    raise CappyError(
                        f"{flag} {word} holds a text of more than max_text_chars, {max_text_chars} characters; shorten "
                        "it, or raise that limit"
                    )
                texts.append(content.decode("utf-8" if texts else "utf-8-sig").rstrip("\r\n"))
    except OSError as error:
        raise CappyError(
            f"{flag} {word}: {word[1:]} cannot be read ({error.strerror}); with --literal {word} is taken as a text"
        ) from error
    except UnicodeDecodeError as error:
        raise CappyError(f"{flag} {word} is not UTF-8: {error}") from error
    return texts


@contextlib.contextmanager
def _scoring_bar(lines: BinaryIO) -> Iterator[Callable[[Totals], None]]:
    """Yield a function that shows pairs/s, tokens/s and the time left."""
    size = _size_of(lines)
    layout = "{percentage:3.0f}%|{bar}| {postfix}, {remaining} left" if size else "{postfix} in {elapsed}"
    started = time.monotonic()
    with progress_bar(layout=layout) as show:

        def show_totals(totals: Totals) -> None:
            seconds = time.monotonic() - started
            show(
                totals.bytes_scored,
                size,
                f"{totals.pairs} pairs, {totals.pairs / seconds:.1f} pairs/s, {totals.tokens / seconds:.0f} tokens/s",
            )

        yield show_totals


def _size_of(lines: BinaryIO) -> int | None:
    """The bytes of a file; None for a pipe, and for a .gz, whose size unpacked nobody knows before."""
    if isinstance(lines, gzip.GzipFile):
        return None
    with contextlib.suppress(OSError):  # not a file of the system
        return os.fstat(lines.fileno()).st_size or None
    return None
