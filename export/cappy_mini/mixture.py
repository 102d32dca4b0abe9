"""Select the part of the training mixture that a stage of cappy-mini's training sees.

    python -m cappy_mini.mixture TRAIN.jsonl STAGE OUT.jsonl

TRAIN.jsonl has instruction, response, label, task and group. Stage 1 holds the tasks that a small model learns first:
topics, sentiment, subjectivity and question types. There the loss stays flat until the model discovers that a response
must fit its instruction; harder tasks would only add noise. Stage 2 repeats a part of them beside the other tasks.
Fractions are of groups (all candidates of one instruction), drawn from a seed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cappy_engine.bulk.formats.json_lines import open_lines
from cappy_engine.bulk.formats.lines import numbered

EASY = (
    "ag_news",
    "customer_reviews",
    "sst2",
    "sst5",
    "subjectivity",
    "trec",
    "uci_amazon",
    "uci_imdb",
    "uci_yelp",
)
STAGES: Mapping[int, Mapping[str, float]] = {
    1: dict.fromkeys(EASY, 1.0),
    2: {
        **dict.fromkeys(EASY, 1.0),
        "arc_challenge": 0.1,
        "arc_easy": 0.2,
        "boolq": 0.03,
        "commonsense_qa": 0.2,
        "copa": 1.0,
        "cosmos_qa": 0.05,
        "csqa2": 0.05,
        "mrpc": 0.2,
        "mrpc_generation": 0.35,
        "openbookqa": 0.25,
        "piqa": 0.05,
        "qasc": 0.35,
        "social_iqa": 0.15,
        "stsb_paraphrase": 0.3,
    },
}


def select(lines: Iterable[str], fractions: Mapping[str, float], *, seed: int) -> Iterator[str]:
    """Yield the lines of about the given fraction of each task's groups.

        >>> list(select(['{"task": "trec", "group": "1"}'], {"trec": 1.0}, seed=0))
        ['{"task": "trec", "group": "1"}']

    All lines of a group are there, or none is.
    """
    chosen: dict[tuple[str, str], bool] = {}
    for line in lines:
        fields = json.loads(line)
        key = (str(fields["task"]), str(fields["group"]))
        if key not in chosen:
            draw = random.Random(f"{seed} {key}").random()  # noqa: S311 - a sample, no secret
            chosen[key] = draw < fractions.get(key[0], 0.0)
        if chosen[key]:
            yield line


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("stage", type=int, choices=sorted(STAGES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with open_lines(options.train) as file, options.out.open("x", encoding="utf-8") as out:
        lines = (line.decode() for _, line in numbered(file))
        out.writelines(select(lines, STAGES[options.stage], seed=options.seed))


if __name__ == "__main__":
    main()
