"""Read the lines of Cappy's zero-shot protocol on PromptSource's tasks (arXiv 2311.06720, section 4.1).

A line is {dataset_name, template_name, example_idx, instruction, response, label}. Lines that agree in the first three
are the candidates of one example, wherever they stand in the file, and have one instruction; one is right if its label
is 1. `picking` computes the accuracy by dataset, then the plain mean over datasets.

An example without a right candidate is wrong whatever is picked, and counts: leaving it out would flatter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cappy_bench.quality.lengths import check_lengths
from cappy_bench.quality.picking import Example
from cappy_engine.bulk.formats.json_lines import read_fields
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.errors import InvalidLine
from cappy_engine.pairs import Pair

TEXTS = ("dataset_name", "template_name", "instruction", "response")


def notes_on(examples: Sequence[Example]) -> list[str]:
    """Tell of examples that are wrong, or right, whatever is picked.

    >>> notes_on([Example("RTE", (0, 1), (0.0, 0.0))])
    ['1 of 1 examples have no right candidate: they count as wrong']
    """
    counts = {
        "have no right candidate: they count as wrong": sum(not any(example.worths) for example in examples),
        "have only right candidates: they count as right": sum(all(example.worths) for example in examples),
    }
    return [f"{count} of {len(examples)} examples {what}" for what, count in counts.items() if count]


def read_examples(lines: Iterable[bytes]) -> tuple[list[Pair], list[Example]]:
    """Read the pairs of all lines, and the examples, in the order of the lines.

        >>> with open_lines("docs/examples/promptsource.jsonl") as lines:
        ...     pairs, examples = read_examples(lines)

    Raises InvalidLine for a line that is not of the protocol's form, for a text that is too long to score, and for a
    label other than 0 and 1. Also raises it if an instruction differs from the one of the example's first candidate:
    two files in one count their examples from 0 twice.
    """
    pairs: list[Pair] = []
    groups: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    begun: dict[tuple[str, str, str], tuple[str, int]] = {}
    for number, line in numbered(lines):
        fields = read_fields(line, number, TEXTS)
        if fields is None:
            continue
        check_lengths(number, [(name, fields[name]) for name in ("instruction", "response")])
        for name in ("example_idx", "label"):
            if name not in fields:
                raise InvalidLine(number, f"has no field {name!r}")
        if fields["label"] not in (0, 1):  # True and 1.0 are 1, too
            raise InvalidLine(number, f"label must be 0 or 1, got {fields['label']!r:.60}")
        key = (fields["dataset_name"], fields["template_name"], repr(fields["example_idx"]))
        instruction, first = begun.setdefault(key, (fields["instruction"], number))
        if fields["instruction"] != instruction:
            raise InvalidLine(
                number,
                f"has another instruction than line {first}, and the same dataset_name, template_name and example_idx, "
                "which are those of one example; give one of the two another example_idx",
            )
        groups.setdefault(key, []).append((len(pairs), float(fields["label"])))
        pairs.append((fields["instruction"], fields["response"]))
    examples = [
        Example(
            dataset,
            tuple(row for row, _ in found),
            tuple(label for _, label in found),
            cluster=index,
            name=f"{template}, {index}",
        )
        for (dataset, template, index), found in groups.items()
    ]
    return pairs, examples
