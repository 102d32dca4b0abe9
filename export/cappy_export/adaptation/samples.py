"""Read an LLM's samples from JSON Lines, and make training pairs of them.

This is section 3.3 of arXiv 2311.06720: each reference of an example gets the label 1, references of other examples 0,
and each sample of the LLM its ROUGE-L with the references.
"""

from __future__ import annotations

import glob
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cappy_engine.bulk.formats.json_lines import open_lines, read_fields
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.errors import AdaptError, InvalidLine, message_of
from cappy_engine.pairs import Pair, text_problem
from cappy_export.adaptation.examples import Examples, make_examples
from cappy_export.adaptation.rouge import has_words, rouge_l

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """Hold one instruction, its right answers (`references`), and an LLM's answers (`samples`)."""

    instruction: str
    references: tuple[str, ...]
    samples: tuple[str, ...]


def read_samples(path: str | Path) -> list[Sampled]:
    """Read JSON Lines with `instruction`, `references` (one string or more) and `samples` (strings).

    >>> read_samples("docs/examples/samples.jsonl")[0].references

    Raises AdaptError that names the line.
    """
    if Path(path).is_dir() or (glob.has_magic(str(path)) and not Path(path).exists()):
        raise AdaptError(
            f"the samples are read from one file, and {path} is a folder or a pattern; join its files, as with: cat "
            "samples/*.jsonl > all.jsonl"
        )
    try:
        with open_lines(path) as file:
            lines = ((number, read_fields(line, number, ("instruction",))) for number, line in numbered(file))
            sampled = [sampled_from(fields, number) for number, fields in lines if fields is not None]
    except InvalidLine as error:
        raise AdaptError(f"{path}, {error}") from error
    except OSError as error:
        raise AdaptError(f"the samples cannot be read: {message_of(error)}") from error
    if not sampled:
        raise AdaptError(f"{path} holds no samples")
    return sampled


def sampled_from(fields: Mapping[str, Any], number: int) -> Sampled:
    """Make the samples of a line's fields; raises InvalidLine, with its `number`, if they are not of the form.

    >>> sampled_from({"instruction": "Add 2 and 3.", "references": ["5"], "samples": ["6"]}, 1).samples
    ('6',)
    """
    references = _texts(fields, "references", number)
    if not references:
        raise InvalidLine(number, "has no references; an example needs at least one right answer")
    return Sampled(fields["instruction"], references, _texts(fields, "samples", number))


def examples_from_samples(sampled: Sequence[Sampled], *, negatives: int = 1, seed: int = 0) -> Examples:
    """Build examples: references with label 1, `negatives` references of other examples with 0, samples with ROUGE-L.

    >>> examples_from_samples(read_samples("docs/examples/samples.jsonl"), negatives=1)

    An instruction may stand on several lines: the references of all of them are right. A response that comes twice is
    one example. What is both a sample and another example's reference gets its ROUGE-L, which reads the letters a to z
    and digits only. A warning says how many references have neither, since every sample for them gets the label 0.
    """
    draw = random.Random(seed)  # noqa: S311 - a sample, no secret
    right: dict[str, set[str]] = {}
    for entry in sampled:
        right.setdefault(entry.instruction, set()).update(entry.references)
    pool = sorted({reference for entry in sampled for reference in entry.references})
    labelled: dict[Pair, float] = {}
    wordless = 0
    for entry in sampled:
        for reference in entry.references:
            labelled[entry.instruction, reference] = 1.0
            wordless += not has_words(reference)
        references = right[entry.instruction]
        others = draw.sample(pool, min(len(pool), negatives + len(references)))
        for other in [text for text in others if text not in references][:negatives]:
            labelled.setdefault((entry.instruction, other), 0.0)
        for sample in entry.samples:
            labelled[entry.instruction, sample] = 1.0 if sample in references else rouge_l(sorted(references), sample)
    if wordless:
        log.warning("ROUGE-L sees no word (a to z, digits) in %d references: samples for them get label 0", wordless)
    return make_examples(list(labelled), list(labelled.values()))


def _texts(fields: Mapping[str, Any], name: str, number: int) -> tuple[str, ...]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise InvalidLine(number, f"needs {name!r}, a list of strings; found {repr(value)[:60]}")
    for text in value:
        problem = text_problem(text)
        if problem:
            raise InvalidLine(number, f"an entry of {name!r} {problem}")
    return tuple(value)
