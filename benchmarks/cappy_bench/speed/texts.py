"""Reads the texts that workloads are made of, or makes some of words.

None begins or ends in white space, so that tools which strip or cut otherwise score the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cappy_bench.peers.peer import Pair
from cappy_engine.bulk.formats.json_lines import open_lines, read_fields, read_rows
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.bulk.output.places import files_in
from cappy_engine.bundle import MANIFEST
from cappy_engine.checks import shown
from cappy_engine.errors import BenchmarkError, InvalidLine
from cappy_engine.pairs import text_problem
from cappy_export.proof.pairs import default_pairs

USUAL = "promptsource_test.jsonl.gz"
LONG = "bigbench/*_train.jsonl.gz"
POOL = 12_000
"""How many pairs of a pool are looked at."""
MADE = 4000
"""How many pairs are made up where no texts are given."""


def choose_pool(pairs: Path | None, data: Path | None, *, seed: int, made: int = MADE) -> tuple[list[Pair], str]:
    """Read the texts of a file or of a folder's tasks, or make pairs up.

    Without a file or a folder, `made` pairs are made up. The second value says what to call the texts. Raises
    BenchmarkError with the line of a file that has another form, and for a file or a folder without texts. Raises
    OSError, too.

        >>> choose_pool(None, None, seed=0)[1]
        "made of words of the package's parity pairs"
    """
    if pairs is not None:
        given = _read_pairs_file(pairs)
        if not given:
            raise BenchmarkError(f'{pairs} holds no pairs; a line is {{"instruction": ..., "response": ...}}')
        return given, f"the file {pairs.name}"
    if data is not None:
        found = read_pool(data, seed=seed)
        if not found:
            raise BenchmarkError(
                f"{data} has no texts: {USUAL} and {LONG} are not there, or empty; name another folder, or leave "
                "--data out, and texts are made up"
            )
        return found, "PromptSource's and BIG-Bench's tasks"
    words = {word for pair in default_pairs() for text in pair for word in text.split() if len(word) < 20}
    words = {word for word in words if "<" not in word}  # "<pad>" in a text is something else to every tool
    return make_pool(sorted(words), seed=seed, count=made), "made of words of the package's parity pairs"


def read_pool(folder: Path, *, seed: int) -> list[Pair]:
    """Read real pairs from the files of `folder`, if it has any.

    First come PromptSource's tasks, then BIG-Bench's, whose instructions are long. Raises BenchmarkError with the line
    of a file that is not of that form, and OSError.

        >>> read_pool(Path("data"), seed=0)
    """
    usual: list[Pair] = []
    long: list[Pair] = []
    for path in pool_files(folder):
        try:
            if path.name == USUAL:
                usual += _read_pairs(path)
            else:
                long += _read_first_references(path)
        except InvalidLine as error:
            raise BenchmarkError(f"{path}, {error}") from error
    pairs: list[Pair] = []
    for found, share in ((usual, POOL // 4), (long + usual, POOL - POOL // 4)):
        order = np.random.default_rng(seed).permutation(len(found))[:share]
        pairs += [(found[place][0].strip(), found[place][1].strip()) for place in order]
    return _distinct(pairs)


def read_files(pairs: Path | None, data: Path | None, bundle: Path, checkpoint: Path | None) -> list[Path]:
    """List the files that a benchmark reads, of which none may be written.

    >>> read_files(None, None, EMBEDDED, None)
    """
    return [
        *([pairs] if pairs else []),
        *(pool_files(data) if data else []),
        *files_in(bundle, MANIFEST),
        *(files_in(checkpoint, "config.json") if checkpoint else []),
    ]


def pool_files(folder: Path) -> list[Path]:
    """List the files that `read_pool` reads, of those that `folder` has.

    >>> pool_files(Path("data"))
    [PosixPath('data/promptsource_test.jsonl.gz')]
    """
    usual = folder / USUAL
    return [*([usual] if usual.exists() else []), *sorted(folder.glob(LONG))]


def make_pool(words: Sequence[str], *, seed: int, count: int = MADE) -> list[Pair]:
    """Make pairs of random words: first a quarter of everyday lengths, then longer ones.

    >>> make_pool(["sky", "blue"], seed=0, count=1)
    """
    random, drawn = np.random.default_rng(seed), np.array(words)  # `choice` would make an array of a list each time
    longest = np.where(np.arange(count) < count // 4, 110, 450)
    return _distinct(
        (
            " ".join(random.choice(drawn, random.integers(3, most))),
            " ".join(random.choice(drawn, random.integers(1, 12))),
        )
        for most in longest
    )


def _read_pairs_file(path: Path) -> list[Pair]:
    """Read the distinct pairs of a JSON Lines file, stripped. Raises BenchmarkError with the line."""
    try:
        return _distinct((first.strip(), second.strip()) for first, second in _read_pairs(path))
    except InvalidLine as error:
        raise BenchmarkError(f"{path}, {error}") from error


def _read_pairs(path: Path) -> list[Pair]:
    with open_lines(path) as lines:
        return [row.pair for row in read_rows(lines)]


def _read_first_references(path: Path) -> list[Pair]:
    """Read a task's instructions, each with its first right answer."""
    pairs: list[Pair] = []
    with open_lines(path) as lines:
        for number, line in numbered(lines):
            fields = read_fields(line, number, ("instruction",))
            if fields is not None:
                references = fields.get("references")
                if not isinstance(references, list) or not references or text_problem(references[0]):
                    raise InvalidLine(number, f"needs 'references', a list of texts; found {shown(references)}")
                pairs.append((fields["instruction"], references[0]))
    return pairs


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    return [pair for pair in dict.fromkeys(pairs) if pair[0] and pair[1]]
