"""Read an LLM's samples for Cappy's protocol on generative tasks (arXiv 2311.06720, section 4.2).

A line is {instruction, references, samples, decodings, log_likelihoods, token_counts}, as `cappy sample` writes it,
with the task in `dataset` or in the file's name. The candidates of an example are its samples in their order; each is
worth its ROUGE-L. Picking by score is in `cappy_bench.quality.picking`. Here are the other ways to answer:

- each decoding alone: the mean worth of its samples;
- the LLM's own score: the sample with the greatest log-likelihood, summed over its tokens or averaged.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cappy_bench.quality.evaluation import BEST, CHANCE, PYTORCH
from cappy_bench.quality.lengths import check_lengths
from cappy_bench.quality.picking import Example, Values
from cappy_engine.bulk.formats.json_lines import open_lines, read_fields
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.bundle import PRECISIONS
from cappy_engine.errors import CappyError, InvalidLine
from cappy_engine.pairs import Pair
from cappy_engine.ranking import first_best
from cappy_export.adaptation.rouge import has_words, rouge_l
from cappy_export.adaptation.samples import Sampled, sampled_from

log = logging.getLogger(__name__)

PATTERNS = ("*.jsonl", "*.jsonl.gz")
SUM, MEAN = "self sum", "self mean"
RESERVED = frozenset({CHANCE, BEST, PYTORCH, SUM, MEAN, *PRECISIONS})
"""The names of other ways to answer, which no decoding can have."""


@dataclass(frozen=True)
class Answers:
    """An LLM's samples for one instruction of the task `dataset`, and how each was decoded.

    `log_likelihoods` are sums over tokens in nats; they and `token_counts` are empty if one of the two is not known.
    `decodings` are empty if not known. `name` is the file and the line.
    """

    dataset: str
    sampled: Sampled
    decodings: tuple[str, ...]
    log_likelihoods: tuple[float, ...]
    token_counts: tuple[int, ...]
    name: str

    @property
    def pairs(self) -> list[Pair]:
        """The pairs to score, one for each sample."""
        return [(self.sampled.instruction, sample) for sample in self.sampled.samples]


def read_tasks(source: str | Path, *, say: Callable[[str], object] = log.info) -> list[Answers]:
    """Read a folder of `.jsonl` or `.jsonl.gz` files, or one such file.

        >>> read_tasks("docs/examples/samples.jsonl")[0].name
        'samples.jsonl, line 1'

    Unfinished files (`.partial`) and all others that are neither hidden nor a sample's settings are left out, and said.
    Raises CappyError that names file and line: for a line of another form, for a text that is too long to score, for a
    task in two files, and if the examples of a task do not have the same decodings (their means would be of different
    examples).
    """
    folder = Path(source)
    matching = {path for pattern in PATTERNS for path in folder.glob(pattern) if not path.name.startswith(".")}
    paths = sorted(matching) if folder.is_dir() else [folder]
    if not paths:
        raise CappyError(f"{folder} holds no file {' or '.join(PATTERNS)} with samples; 'cappy sample' makes them")
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        if other.suffix == ".partial":
            say(f"leaving out {other}: it is not finished")
        elif other not in paths and not other.name.startswith(".") and not other.name.endswith(".settings.json"):
            say(f"leaving out {other}: only files {' and '.join(PATTERNS)} are read")
    found: list[Answers] = []
    origins: dict[str, Path] = {}
    for path in paths:
        before = len(found)
        try:
            found += _read_file(path)
        except InvalidLine as error:
            raise CappyError(f"{path}, {error}") from error
        for task in {entry.dataset for entry in found[before:]}:
            if origins.setdefault(task, path) != path:
                raise CappyError(
                    f"the task {task!r} is in {origins[task]} and in {path}; put its examples into one file"
                )
    if not found:
        raise CappyError(f"{source} holds no examples")
    return found


def first_of_each(tasks: Sequence[Answers], most: int | None) -> list[Answers]:
    """Take at most `most` examples of each task, the first ones; all for None.

    >>> len(first_of_each(read_tasks("docs/examples/samples.jsonl"), 2))
    2
    """
    taken: Counter[str] = Counter()
    found = []
    for entry in tasks:
        taken[entry.dataset] += 1
        if most is None or taken[entry.dataset] <= most:
            found.append(entry)
    return found


def examples_of(tasks: Sequence[Answers]) -> tuple[list[Pair], list[Example]]:
    """Build all pairs to score, and the examples, whose candidates are worth their ROUGE-L.

    >>> pairs, examples = examples_of(read_tasks("docs/examples/samples.jsonl"))
    """
    pairs: list[Pair] = []
    examples = []
    for entry in tasks:
        rows = tuple(range(len(pairs), len(pairs) + len(entry.sampled.samples)))
        worths = {sample: rouge_l(entry.sampled.references, sample) for sample in set(entry.sampled.samples)}
        found = tuple(worths[sample] for sample in entry.sampled.samples)
        examples.append(Example(entry.dataset, rows, found, name=entry.name))
        pairs += entry.pairs
    return pairs, examples


def ways_without_scores(tasks: Sequence[Answers], examples: Sequence[Example]) -> dict[str, Values]:
    """Answer without a scorer: by each decoding that all examples have, and by the LLM's own score.

    Its own score, summed and averaged, is there if all samples have log-likelihoods.

        >>> tasks = read_tasks("docs/examples/samples.jsonl")
        >>> ways_without_scores(tasks, examples_of(tasks)[1])
        {}
    """
    names = dict.fromkeys(name for entry in tasks for name in entry.decodings)
    ways = {
        name: np.array([_mean_of(name, *both) for both in zip(tasks, examples, strict=True)])
        for name in names
        if all(name in entry.decodings for entry in tasks)
    }
    if all(entry.log_likelihoods for entry in tasks):
        sums = [np.array(entry.log_likelihoods) for entry in tasks]
        means = [total / np.array(entry.token_counts) for total, entry in zip(sums, tasks, strict=True)]
        for name, scores in ((SUM, sums), (MEAN, means)):
            picks = map(first_best, scores)
            ways[name] = np.array([example.worths[place] for example, place in zip(examples, picks, strict=True)])
    return ways


def notes_on(tasks: Sequence[Answers]) -> list[str]:
    """Tell what a reader of the figures must know of the samples.

    >>> notes_on(read_tasks("docs/examples/samples.jsonl"))
    ['no self score: 10 of 10 examples have no log-likelihood for all samples']
    """
    notes = []
    wordless = sum(not any(map(has_words, entry.sampled.references)) for entry in tasks)
    if wordless:
        notes.append(
            f"{wordless} of {len(tasks)} examples have no reference with a word that ROUGE-L reads (a to z, digits): "
            "they get 0, whatever is picked"
        )
    unknown = sum(not entry.log_likelihoods for entry in tasks)
    if unknown:
        notes.append(f"no self score: {unknown} of {len(tasks)} examples have no log-likelihood for all samples")
    names = {name for entry in tasks for name in entry.decodings}
    partial = sorted(name for name in names if not all(name in entry.decodings for entry in tasks))
    if partial:
        notes.append(f"not shown alone, since not all tasks have them: {', '.join(partial)}")
    return notes


def _mean_of(decoding: str, entry: Answers, example: Example) -> float:
    return float(
        np.mean([worth for worth, name in zip(example.worths, entry.decodings, strict=True) if name == decoding])
    )


def _read_file(path: Path) -> Iterator[Answers]:
    decodings: dict[str, set[str]] = {}
    with open_lines(path) as lines:
        for number, line in numbered(lines):
            fields = read_fields(line, number, ("instruction",))
            if fields is None:
                continue
            entry = _answers(fields, number, path.name)
            names = set(entry.decodings)
            first = decodings.setdefault(entry.dataset, names)
            if names != first:
                raise InvalidLine(
                    number,
                    f"has the decodings {sorted(names)}, the task's first example {sorted(first)}; sample it again",
                )
            yield entry


def _answers(fields: Mapping[str, Any], number: int, name: str) -> Answers:
    """Read the answers in line `number` of the file `name`."""
    sampled = sampled_from(fields, number)
    scored = [("instruction", sampled.instruction), *(("an entry of 'samples'", text) for text in sampled.samples)]
    check_lengths(number, scored)
    count = len(sampled.samples)
    if not count:
        raise InvalidLine(number, "has no samples; there is nothing to pick from")
    dataset = fields.get("dataset", name.removesuffix(".gz").removesuffix(".jsonl"))
    if not isinstance(dataset, str):
        raise InvalidLine(number, f"dataset must be a string, got {dataset!r:.60}")
    decodings = _list(fields, "decodings", number, count, str)
    log_likelihoods = _list(fields, "log_likelihoods", number, count, float)
    token_counts = _list(fields, "token_counts", number, count, int)
    if None in decodings:
        raise InvalidLine(number, "has a sample without a decoding")
    taken = [decoding for decoding in decodings if decoding in RESERVED]
    if taken:
        raise InvalidLine(number, f"a decoding is called {taken[0]!r}, as a column of the table is; call it otherwise")
    if None in (*log_likelihoods, *token_counts) or not log_likelihoods or not token_counts:
        log_likelihoods, token_counts = [], []
    elif min(token_counts) < 1:
        raise InvalidLine(number, f"token_counts must be at least 1, got {min(token_counts)}")
    likelihoods = (tuple(log_likelihoods), tuple(token_counts))
    return Answers(dataset, sampled, tuple(decodings), *likelihoods, f"{name}, line {number}")


def _list(fields: Mapping[str, Any], name: str, number: int, count: int, kind: type) -> list[Any]:
    """Check the list `name`: an entry of `kind`, or null, for each of `count` samples. Empty if there is none."""
    value = fields.get(name)
    if value is None:
        return []
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, list) or len(value) != count:
        raise InvalidLine(number, f"{name} must be a list with an entry for each of {count} samples, got {value!r:.60}")
    for entry in value:
        if entry is not None and (not isinstance(entry, kinds) or isinstance(entry, bool)):
            raise InvalidLine(number, f"{name} must hold {kind.__name__} or null, got {entry!r:.60}")
        if isinstance(entry, int) and abs(entry) >= 2**63:
            raise InvalidLine(number, f"{name} must hold numbers of at most 64 bits, got {entry!r:.60}")
    return value
