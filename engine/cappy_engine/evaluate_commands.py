"""`cappy evaluate`: the paper's protocols."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cappy_engine import promptsource, report
from cappy_engine.bundle import PRECISIONS
from cappy_engine.command_line import EXIT_OK, add_command, import_export, open_input, positive, print_json, say
from cappy_engine.errors import CappyError
from cappy_engine.scorer import Scorer
from cappy_engine.session import DEVICES

EVALUATE_EXAMPLES = """examples:
  cappy evaluate promptsource promptsource.jsonl --bundle cappy-bundle --precision fp32 --precision int8
  cappy evaluate promptsource promptsource.jsonl --bundle cappy-bundle --against btan2/cappy-large --examples 500

a line: {"dataset_name": "RTE", "template_name": "GPT-3 style", "example_idx": 0, "instruction": ..., "response": ...,
"label": 1}; candidates of one example agree in the first three, and the best-scoring one is the answer"""


def add_commands(commands: Any) -> None:
    """Add evaluate."""
    _add_evaluate(commands)


def _add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands, "evaluate", _evaluate, "measure accuracy by Cappy's zero-shot protocol", EVALUATE_EXAMPLES
    )
    parser.add_argument("protocol", choices=("promptsource",))
    parser.add_argument("examples_file", metavar="FILE", help="JSON Lines file, may be a .gz; - for stdin")
    parser.add_argument("--bundle", type=Path, help="default: cappy-mini, the package's own")
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, dest="precisions", help="repeat to compare (default: auto)"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: one for each usable core)")
    parser.add_argument("--against", metavar="CHECKPOINT", help="score with PyTorch too, and compare the decisions")
    parser.add_argument("--revision", help="hub revision of CHECKPOINT: a branch, tag or commit")
    parser.add_argument("--examples", type=positive, help="only so many of each dataset, the first ones")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _evaluate(options: argparse.Namespace) -> int:
    with open_input(options.examples_file) as lines:
        pairs, examples = promptsource.read_examples(lines)
    if not examples:
        raise CappyError(f"{options.examples_file} holds no examples; see 'cappy evaluate --help' for a line's form")
    pairs, examples = promptsource.first_examples(pairs, examples, options.examples)
    scores = {}
    if options.against is not None:
        say(f"scoring {len(pairs)} pairs with PyTorch")
        score = import_export("reference").score_checkpoint
        scores["PyTorch"] = score(options.against, pairs, revision=options.revision)
    for precision in options.precisions or ["auto"]:
        with Scorer.open(options.bundle, device=options.device, precision=precision, threads=options.threads) as scorer:
            say(report.describe_info(scorer.info))
            scores[scorer.info.precision] = scorer.score(pairs)
    columns = {name: promptsource.accuracies(examples, found) for name, found in scores.items()}
    first, *others = scores
    agreements = {
        f"{name} against {first}": promptsource.compare(examples, scores[first], scores[name]) for name in others
    }
    if options.json:
        print_json(report.evaluation_document(columns, agreements))
    else:
        print(report.describe_evaluation(columns, agreements))
    return EXIT_OK
