"""`cappy score` and `cappy rank`: a bundle at work."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import click

from cappy_engine.bulk.score_file import Totals, score_lines
from cappy_engine.cli import text
from cappy_engine.cli.arguments import EXIT_OK, EXIT_SKIPPED, bundle_option, command, quiet_option, takes
from cappy_engine.cli.progress import progress_bar
from cappy_engine.cli.streams import is_verbose, open_input, open_output, print_json, say
from cappy_engine.cli.values import PATH
from cappy_engine.errors import CappyError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer


def field_name(name: str) -> str:
    """Accept the name of a field to add.

    >>> field_name("score")
    'score'
    """
    if name in ("", "instruction", "response"):
        raise click.BadParameter(f"must be a name of its own, got {name!r}")
    return name


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
@click.option("-o", "--output", type=PATH, metavar="OUT", help="the file to write (default: stdout)")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="what to do at a bad line",
)
@click.option(
    "--score-field",
    type=field_name,
    default="score",
    show_default=True,
    metavar="NAME",
    help="the name of the field to add",
)
@quiet_option
def score(
    pairs: str, bundle: Path | None, options: ScorerOptions, output: Path | None, on_error: str, score_field: str
) -> int:
    """Score the pairs of a JSON Lines file.

    PAIRS is a file, unpacked if its name ends in .gz, or - for stdin. Every line is written back with its score.
    """
    with (
        open_input(pairs) as lines,
        _open_scorer(bundle, options) as scorer,
        open_output(output, lines) as written,
        _scoring_bar(lines) as progress,
    ):
        started = time.monotonic()
        totals = score_lines(scorer, lines, written.write, on_error=on_error, field_name=score_field, progress=progress)
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
@click.option("--json", "as_json", is_flag=True, help="print a JSON list of {index, response, score, is_exact}")
@click.option(
    "--exact-winner",
    is_flag=True,
    help="score candidates again in fp32 where int8's error could decide which is best",
)
@quiet_option
def rank(
    bundle: Path | None,
    options: ScorerOptions,
    instruction: str,
    candidates: Sequence[str],
    literal: bool,
    as_json: bool,
    exact_winner: bool,
) -> None:
    """Rank the candidates of one instruction, best first."""
    if not literal:
        instruction, candidates = _read_texts(instruction, candidates)
    with _open_scorer(bundle, options) as scorer:
        ranked = scorer.rank(instruction, candidates, exact_winner=exact_winner)
    if as_json:
        print_json(
            [{"index": c.index, "response": c.response, "score": c.score, "is_exact": c.is_exact} for c in ranked]
        )
    else:
        print(text.describe_ranking(ranked))
    truncated = sum(candidate.is_truncated for candidate in ranked)
    if truncated:
        say(f"{truncated} of {len(ranked)} pairs were truncated")
    if exact_winner:
        say(f"{sum(candidate.is_exact for candidate in ranked)} of {len(ranked)} candidates were scored again in fp32")


def _open_scorer(bundle: Path | None, options: ScorerOptions) -> Scorer:
    scorer = Scorer.open_with(bundle, options)
    say(text.explain_info(scorer.info) if is_verbose() else text.describe_info(scorer.info))
    return scorer


def _read_texts(instruction: str, candidates: Sequence[str]) -> tuple[str, list[str]]:
    """Put in what @FILE and - stand for."""
    if [instruction, *candidates].count("-") > 1:
        raise click.UsageError("- was given twice, but stdin is read once; put one of the texts into a file: @FILE")
    whole = _read_text("--instruction", instruction)
    found: list[str] = []
    for candidate in candidates:
        lines = _read_text("--candidate", candidate)
        found += [candidate] if lines is None else filter(str.strip, re.split("\r?\n", lines))
    if not found:
        raise CappyError(f"{' and '.join(candidates)} held no candidates, which are read one a line")
    return (instruction if whole is None else whole.rstrip("\n")), found


def _read_text(flag: str, word: str) -> str | None:
    """Read what @FILE or - stands for; None if `word` is a text."""
    if word != "-" and not word.startswith("@"):
        return None
    try:
        content = sys.stdin.buffer.read() if word == "-" else Path(word[1:]).read_bytes()
        return content.decode()
    except OSError as error:
        raise CappyError(
            f"{flag} {word}: {word[1:]} cannot be read ({error.strerror}); with --literal {word} is taken as a text"
        ) from error
    except UnicodeDecodeError as error:
        raise CappyError(f"{flag} {word} is not UTF-8: {error}") from error


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
