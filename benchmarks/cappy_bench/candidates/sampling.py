"""A file of instructions becomes a file of candidates: in order, batch by batch, and on from where a run was stopped.

A batch's seed comes from its place, so that a resumed file holds what an uninterrupted one would. Knows nothing of LLMs
but `decodings.Sampler`; how the file grows is in `partial.py`.
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
from cappy_engine.bulk import growing as partial
from cappy_engine.bulk.jsonl import open_lines
from cappy_engine.bulk.rows import read_fields
from cappy_engine.errors import CappyError, InvalidLine, SampleError

FIELDS = ("samples", "decodings", "log_likelihoods", "token_counts", "cut", "prompt_cut")
"""What is added to each line."""

log = logging.getLogger(__name__)
Fields = dict[str, Any]


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


@dataclass(frozen=True)
class Prompts:
    """The fields of all lines that are not blank, and the `sha256` of the whole input."""

    examples: Sequence[Fields]
    sha256: str


def check_run(out: str | Path, *, seed: int = 0, batch_size: int = 8, resume: bool = False) -> partial.Names:
    """The names of a run's files. Raises SampleError for what is no name, would be overwritten or cannot go on."""
    if batch_size < 1 or seed < 0:
        raise SampleError(f"batch_size must be at least 1 and seed at least 0, got {batch_size} and {seed}")
    names = partial.Names(Path(out))
    if names.target.suffix != ".jsonl":
        raise SampleError(f"candidates are written as plain JSON Lines; choose a name that ends in .jsonl, not {out}")
    partial.check_names(names, resume=resume)
    return names


def read_prompts(source: str | Path | Iterable[bytes]) -> Prompts:
    """Read and check the instructions of `source`, JSON Lines (.gz too) or their lines. Raises SampleError."""
    name = str(source) if isinstance(source, (str, Path)) else "the input"
    digest, examples = hashlib.sha256(), []
    try:
        with _lines(source) as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                fields = read_fields(line, number, ("instruction",))
                if fields is not None:
                    _check_free(fields, number)
                    examples.append(fields)
    except InvalidLine as error:
        raise SampleError(f"{name}, {error}") from error
    except (OSError, CappyError) as error:
        raise SampleError(f"the instructions cannot be read: {error}") from error
    if not examples:
        raise SampleError(f"{name} holds no instructions")
    return Prompts(examples, digest.hexdigest())


def sample_file(
    source: Prompts | str | Path | Iterable[bytes],
    out: str | Path,
    sampler: Sampler,
    decodings: Sequence[Decoding],
    *,
    seed: int = 0,
    batch_size: int = 8,
    resume: bool = False,
    say: Callable[[str], object] = log.info,
    progress: Callable[[Totals], object] = lambda totals: None,
) -> Totals:
    """Sample candidates for each instruction of `source`, read or to be read by `read_prompts`, into the new `out`.

    A line of `out` is the input's fields and `samples`, `decodings`, `log_likelihoods`, `token_counts` and `cut`, lists
    of one length and order; `prompt_cut` is there, and true, where the LLM saw a part of the instruction only. All
    lines are checked before the first is sampled. What is complete is in OUT.partial, on the disk after every batch (an
    error before that leaves nothing); `resume` goes on from there, also where lines of the input behind the finished
    ones were changed or taken out. OUT.settings.json keeps what decided the candidates. `progress` is called after
    every batch, and once before the first.

    Raises SampleError.
    """
    names = check_run(out, seed=seed, batch_size=batch_size, resume=resume)
    prompts = source if isinstance(source, Prompts) else read_prompts(source)
    examples = prompts.examples
    sampler.check([fields["instruction"] for fields in examples], decodings)
    settings = {
        "sampler": dict(sampler.facts),
        "decodings": [dataclasses.asdict(decoding) for decoding in decodings],
        "seed": seed,
        "batch_size": batch_size,
    }
    origin = {
        "versions": dict(sampler.versions),
        "input": {"examples": len(examples), "sha256": prompts.sha256},
    }
    with partial.open_alone(names, resume=resume) as file:
        totals = Totals(len(examples))
        if resume:
            own = _own_lines(partial.complete_lines(file, say), examples, names.partial)
            partial.check_settings(names, settings, origin, say)
            totals = _count(totals, own)
            totals = dataclasses.replace(totals, resumed=totals.examples)
            say(f"going on after {totals.examples} of {len(examples)} examples")
        else:
            partial.begin(names, settings, origin)
        progress(totals)
        started = time.monotonic()
        for first in range(totals.examples - totals.examples % batch_size, len(examples), batch_size):
            batch = examples[first : first + batch_size]
            texts = [fields["instruction"] for fields in batch]
            try:
                found = sampler.sample(texts, decodings, seed=derive_seed(seed, first))
            except SampleError as error:
                if not totals.examples:  # its settings would only be in the way of those that work
                    partial.remove(names)
                raise SampleError(
                    f"in the batch of examples {first + 1} to {first + len(batch)}: {error}\n{_kept(totals, names)}"
                ) from error
            lines = [_line(*each) for each in zip(batch, found, strict=True)][totals.examples - first :]
            partial.append(file, b"".join(map(_encoded, lines)))
            totals = dataclasses.replace(_count(totals, lines), seconds=time.monotonic() - started)
            progress(totals)
    partial.finish(names)
    return totals


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


def _own_lines(lines: Sequence[bytes], examples: Sequence[Fields], path: Path) -> list[Fields]:
    """The fields of lines written before; SampleError if they are not those of the first examples."""
    found: list[Fields] = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            is_own = {name: fields[name] for name in fields if name not in FIELDS} == examples[number - 1]
        except (ValueError, TypeError, IndexError):
            is_own = False
        if not is_own:
            raise SampleError(
                f"line {number} of {path} is not of this run: it does not answer example {number} of the input; give "
                "the input as it was up to there, or remove the file and start anew"
            )
        found.append(fields)
    return found


def _kept(totals: Totals, names: partial.Names) -> str:
    if not totals.examples:
        return "no example is complete, so nothing was kept"
    return (
        f"{totals.examples} complete examples are in {names.partial}; --resume goes on from there, also where a line "
        "of PROMPTS behind them was taken out"
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


def _encoded(fields: Fields) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a field that is not ours to judge
        return json.dumps(fields).encode() + b"\n"


def _count(totals: Totals, lines: Sequence[Fields]) -> Totals:
    return dataclasses.replace(
        totals,
        examples=totals.examples + len(lines),
        samples=totals.samples + sum(len(line["samples"]) for line in lines),
        cut=totals.cut + sum(sum(line["cut"]) for line in lines),
        empty=totals.empty + sum(line["samples"].count("") for line in lines),
        prompts_cut=totals.prompts_cut + sum("prompt_cut" in line for line in lines),
    )
