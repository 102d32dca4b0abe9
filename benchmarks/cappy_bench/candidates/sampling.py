"""A file of instructions becomes a file of candidates: in order, batch by batch, and on from where a run was stopped.

A batch's seed comes from its place, so that a resumed file holds what an uninterrupted one would. Knows nothing of LLMs
but `decodings.Sampler`; how the file grows is in `cappy_engine.bulk.resume.partial_file`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cappy_bench.candidates.decodings import Candidates, Decoding, Sampler, derive_seed
from cappy_bench.candidates.sample_options import SampleOptions
from cappy_engine.bulk.formats.json_lines import json_line, open_lines, read_fields
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.bulk.resume.names import Names, find_names
from cappy_engine.bulk.resume.partial_file import open_growing
from cappy_engine.errors import CappyError, InvalidLine, OutputError, SampleError, message_of

FIELDS = ("samples", "decodings", "log_likelihoods", "token_counts", "cut", "prompt_cut")
"""The fields that are added to each line."""

log = logging.getLogger(__name__)
Fields = dict[str, Any]
Say = Callable[[str], object]


@dataclass(frozen=True)
class Totals:
    """What the file holds so far: `examples` of `all_examples`, `resumed` of them from before this run.

    `cut` samples were stopped before their end, `empty` ones hold no text, `prompts_cut` were too long for the LLM;
    `seconds` is the time of this run.
    """

    all_examples: int
    examples: int = 0
    samples: int = 0
    cut: int = 0
    empty: int = 0
    prompts_cut: int = 0
    resumed: int = 0
    seconds: float = 0.0

    def plus(self, lines: Sequence[Fields]) -> Totals:
        """Add the examples of more lines."""
        return dataclasses.replace(
            self,
            examples=self.examples + len(lines),
            samples=self.samples + sum(len(line["samples"]) for line in lines),
            cut=self.cut + sum(sum(line["cut"]) for line in lines),
            empty=self.empty + sum(line["samples"].count("") for line in lines),
            prompts_cut=self.prompts_cut + sum("prompt_cut" in line for line in lines),
        )


@dataclass(frozen=True)
class Prompts:
    """The fields of all lines but blank ones, and the `sha256` of the whole input."""

    examples: Sequence[Fields]
    sha256: str


def check_out(out: str | Path, *, resume: bool, force: bool = False, source: object = None) -> Names:
    """Name a run's files, before an LLM is loaded for minutes.

        >>> check_out("new.jsonl", resume=False).partial.name
        'new.jsonl.partial'

    Raises SampleError for a name that does not end in .jsonl, and OutputError if a file would be overwritten without
    `force`, if it is the `source`, or if there is nothing to resume.
    """
    if Path(out).suffix != ".jsonl":
        raise SampleError(f"candidates are written as plain JSON Lines; choose a name that ends in .jsonl, not {out}")
    inputs = [Path(source)] if isinstance(source, (str, Path)) else []
    return find_names(Path(out), resume=resume, force=force, inputs=inputs)


def read_prompts(source: str | Path | Iterable[bytes]) -> Prompts:
    """Read and check the instructions of `source`: a JSON Lines file (.gz too), or its lines.

        >>> len(read_prompts([b'{"instruction": "Add 2 and 3."}']).examples)
        1

    Raises SampleError.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the input"
    digest, examples = hashlib.sha256(), []
    try:
        with _lines(source) as lines:
            for number, line in numbered(lines):
                digest.update(line)
                fields = read_fields(line, number, ("instruction",))
                if fields is not None:
                    _check_free(fields, number)
                    examples.append(fields)
    except InvalidLine as error:
        raise SampleError(f"{name}, {error}") from error
    except (OSError, CappyError) as error:
        raise SampleError(f"the instructions cannot be read: {message_of(error)}") from error
    if not examples:
        raise SampleError(f"{name} holds no instructions")
    return Prompts(examples, digest.hexdigest())


def sample_file(
    source: Prompts | str | Path | Iterable[bytes],
    out: str | Path,
    sampler: Sampler,
    decodings: Sequence[Decoding],
    options: SampleOptions | None = None,
    *,
    say: Say = log.info,
    progress: Callable[[Totals], object] = lambda totals: None,
) -> Totals:
    """Sample candidates for each instruction of `source`, which `read_prompts` reads, into the new file `out`.

    A line of `out` is the input's fields and `samples`, `decodings`, `log_likelihoods`, `token_counts` and `cut`, lists
    of one length and order; `prompt_cut` is there, and true, if the LLM saw only a part of the instruction. All lines
    are checked before the first is sampled. OUT.partial grows on the disk with every batch; an error before the first
    leaves nothing. With `options.resume` the run goes on from there, also if lines of the input behind the finished
    ones were changed or taken out. OUT.settings.json keeps what decided the candidates. `progress` is called after
    every batch, and once before the first.

        >>> sample_file("prompts.jsonl", "samples.jsonl", open_llm("./my-llm"), PAPER).samples
        170

    Raises SampleError, and OutputError if the file cannot be begun, gone on with or finished.
    """
    options = options or SampleOptions()
    names = check_out(out, resume=options.resume, force=options.force, source=source)
    prompts = source if isinstance(source, Prompts) else read_prompts(source)
    sampler.check([fields["instruction"] for fields in prompts.examples], decodings)
    settings = {
        "sampler": dict(sampler.facts),
        "decodings": [dataclasses.asdict(decoding) for decoding in decodings],
        "seed": options.seed,
        "batch_size": options.batch_size,
    }
    origin = {
        "versions": dict(sampler.versions),
        "input": {"examples": len(prompts.examples), "sha256": prompts.sha256},
    }
    with open_growing(names, resume=options.resume) as growing:
        totals = Totals(len(prompts.examples))
        if options.resume and growing.size:  # else it was killed before it had written anything
            totals = totals.plus(_own_lines(growing.complete_lines(say), prompts.examples, names.partial))
            growing.check_settings(settings, origin, say)
            totals = dataclasses.replace(totals, resumed=totals.examples)
            say(f"going on after {totals.examples} of {len(prompts.examples)} examples")
        else:
            growing.begin(settings, origin)
        progress(totals)
        started = time.monotonic()
        try:
            for lines in _sampled(prompts.examples, sampler, decodings, options, done=totals.examples):
                growing.append(b"".join(map(json_line, lines)))
                totals = dataclasses.replace(totals.plus(lines), seconds=time.monotonic() - started)
                progress(totals)
        except SampleError as error:
            if not totals.examples:  # its settings would only be in the way of others
                growing.remove()
            raise SampleError(f"{error}\n{_kept(totals, names)}") from error
        growing.finish()
    return totals


def _sampled(
    examples: Sequence[Fields], sampler: Sampler, decodings: Sequence[Decoding], options: SampleOptions, *, done: int
) -> Iterator[list[Fields]]:
    """Sample batch by batch and yield the lines of each; the first `done` lines of all are made, but not yielded."""
    size = options.batch_size
    for first in range(done - done % size, len(examples), size):
        batch = examples[first : first + size]
        texts = [fields["instruction"] for fields in batch]
        try:
            found = sampler.sample(texts, decodings, seed=derive_seed(options.seed, first), first=first + 1)
        except SampleError as error:
            raise SampleError(f"in the batch of examples {first + 1} to {first + len(batch)}: {error}") from error
        yield [_line(*each) for each in zip(batch, found, strict=True)][max(0, done - first) :]


@contextlib.contextmanager
def _lines(source: str | Path | Iterable[bytes]) -> Iterator[Iterable[bytes]]:
    if not isinstance(source, (str, Path)):
        yield source
        return
    with open_lines(source) as file:
        yield file


def _check_free(fields: Fields, number: int) -> None:
    taken = [name for name in FIELDS if name in fields]
    if taken:
        raise InvalidLine(number, f"has a field {taken[0]!r} already; take that out, or give the file without samples")


def _own_lines(lines: Iterable[bytes], examples: Sequence[Fields], path: Path) -> list[Fields]:
    """Read the lines written before; OutputError if they are not those of the first examples."""
    found: list[Fields] = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            is_own = {name: fields[name] for name in fields if name not in FIELDS} == examples[number - 1]
        except (ValueError, TypeError, IndexError):
            is_own = False
        if not is_own:
            raise OutputError(
                f"line {number} of {path} is not of this run: it does not answer example {number} of the input; give "
                "the input as it was up to there, or remove the file and start anew"
            )
        found.append(fields)
    return found


def _kept(totals: Totals, names: Names) -> str:
    if not totals.examples:
        return "no example is complete, so nothing was kept"
    return (
        f"{totals.examples} complete examples are in {names.partial}; {names.way_on} goes on from there, also where a "
        "line of PROMPTS behind them was taken out"
    )


def _line(fields: Mapping[str, Any], found: Candidates) -> Fields:
    samples = found.samples
    return {
        **fields,
        "samples": [sample.text for sample in samples],
        "decodings": [sample.decoding for sample in samples],
        "log_likelihoods": [sample.log_likelihood for sample in samples],
        "token_counts": [sample.tokens for sample in samples],
        "cut": [sample.is_cut for sample in samples],
    } | ({"prompt_cut": True} if found.is_prompt_cut else {})
