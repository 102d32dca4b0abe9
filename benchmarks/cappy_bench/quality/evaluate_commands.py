"""`cappy evaluate`: the paper's protocols, for a bundle in several precisions and for PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from cappy_bench.quality import promptsource
from cappy_bench.quality.evaluation import PYTORCH, describe_accuracy, describe_rouge, evaluate, evaluation_document
from cappy_bench.quality.picking import Scores, first_examples
from cappy_engine.bundle import EMBEDDED, PRECISIONS, open_bundle
from cappy_engine.cli import text
from cappy_engine.cli.arguments import (
    EXIT_OK,
    add_command,
    import_export,
    open_input,
    positive,
    print_json,
    say,
)
from cappy_engine.errors import CappyError
from cappy_engine.options import Precision, ScorerOptions
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.session import DEVICES

EVALUATE_EXAMPLES = """examples:
  cappy evaluate promptsource tasks.jsonl --bundle cappy-bundle --precision fp32 --precision int8
  cappy evaluate bigbench samples --bundle cappy-bundle --plot rouge.svg

'cappy evaluate promptsource --help' and 'cappy evaluate bigbench --help' have the rest"""

PROMPTSOURCE_EXAMPLES = """examples:
  cappy evaluate promptsource tasks.jsonl --bundle cappy-bundle --precision fp32 --precision int8
  cappy evaluate promptsource tasks.jsonl.gz --bundle cappy-bundle --against btan2/cappy-large --examples 500

a line: {"dataset_name": "RTE", "template_name": "GPT-3 style", "example_idx": 0, "instruction": ..., "response": ...,
"label": 1}; candidates of one example agree in the first three, and the best-scoring one is the answer"""

BIGBENCH_EXAMPLES = """examples:
  cappy evaluate bigbench samples --bundle cappy-bundle --precision fp32 --precision int8
  cappy evaluate bigbench samples --bundle cappy-bundle --against ./my-checkpoint --plot rouge.svg

SAMPLES is a folder with a JSON Lines file for each task, as 'cappy sample' writes them, or one such file. A line:
{"dataset": "my_task", "instruction": ..., "references": [...], "samples": [...]}, where it has them with "decodings",
"log_likelihoods" and "token_counts", lists with an entry for each sample"""


def add_commands(commands: Any) -> None:
    """Add evaluate, with a command of its own for each protocol."""
    parser = add_command(
        commands, "evaluate", None, "measure what Cappy's picks are worth by the paper's protocols",
        EVALUATE_EXAMPLES,
    )  # fmt: skip
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    classify = add_command(
        protocols, "promptsource", _evaluate_promptsource,
        "accuracy of classification without training: the best-scoring candidate is the answer", PROMPTSOURCE_EXAMPLES,
    )  # fmt: skip
    classify.add_argument("examples_file", metavar="FILE", help="JSON Lines file, may be a .gz; - for stdin")
    _add_scorers(classify)
    choose = add_command(
        protocols, "bigbench", _evaluate_bigbench,
        "ROUGE-L of the best-scoring sample of an LLM, beside other ways to pick one", BIGBENCH_EXAMPLES,
    )  # fmt: skip
    choose.add_argument("samples", type=Path, metavar="SAMPLES", help="folder, or a file, with an LLM's samples")
    _add_scorers(choose)
    choose.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures into FILE (.svg, .png or .pdf)")


def _add_scorers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, help="default: cappy-mini, the package's own")
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, dest="precisions", help="repeat to compare (default: auto)"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: one for each usable core)")
    parser.add_argument("--against", metavar="CHECKPOINT", help="score with PyTorch too, and compare the decisions")
    parser.add_argument("--revision", help="hub revision of CHECKPOINT: a branch, tag or commit")
    parser.add_argument(
        "--examples", type=positive, help="only so many of each dataset, the first ones (with all templates)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(refuse=parser.error)


def _evaluate_promptsource(options: argparse.Namespace) -> int:
    _check_usage(options)
    with open_input(options.examples_file) as lines:
        pairs, examples = promptsource.read_examples(lines)
    if not examples:
        raise CappyError(
            f"{options.examples_file} holds no examples; 'cappy evaluate promptsource --help' shows a line"
        )
    pairs, examples = first_examples(pairs, examples, options.examples)
    found = evaluate("accuracy", examples, _score(options, pairs))
    if options.json:
        print_json(evaluation_document(found))
    else:
        print(describe_accuracy(found))
    return EXIT_OK


def _evaluate_bigbench(options: argparse.Namespace) -> int:
    _check_usage(options)
    bigbench = import_export("cappy_bench.quality.bigbench", "cpu,export,llm")
    plots = import_export("cappy_bench.quality.rouge_plot", "cpu,export,llm") if options.plot else None
    if plots:
        plots.check_path(options.plot)
    tasks = bigbench.first_of_each(bigbench.read_tasks(options.samples, say=say), options.examples)
    pairs, examples = bigbench.examples_of(tasks)
    found = evaluate(
        "ROUGE-L",
        examples,
        _score(options, pairs),
        others=bigbench.ways_without_scores(tasks, examples),
        notes=bigbench.notes_on(tasks),
    )
    if options.json:
        print_json(evaluation_document(found))
    else:
        print(describe_rouge(found), flush=True)
    if plots:
        plots.plot_evaluation(found, options.plot)
        say(f"wrote {options.plot}")
    return EXIT_OK


def _score(options: argparse.Namespace, pairs: Sequence[Pair]) -> dict[str, Scores]:
    """Scores (pairs,) of PyTorch, where asked for, and of each precision."""
    scores: dict[str, Scores] = {}
    precisions = list(dict.fromkeys(options.precisions or ["auto"]))
    if options.against is not None or len(precisions) > 1:
        for precision in precisions:  # what cannot run is found before hours of scoring, and not by two models at once
            _open_scorer(options, precision).close()
    if options.against is not None:
        score = import_export("cappy_export.proof.reference").score_checkpoint
        max_length = open_bundle(options.bundle or EMBEDDED).manifest.max_length
        say(f"scoring {len(set(pairs))} pairs with PyTorch")
        scores[PYTORCH] = score(options.against, pairs, revision=options.revision, max_length=max_length)
    for precision in precisions:
        with _open_scorer(options, precision) as scorer:
            say(text.describe_info(scorer.info))
            scores[scorer.info.precision] = scorer.score(pairs)
    return scores


def _open_scorer(options: argparse.Namespace, precision: str) -> Scorer:
    asked = ScorerOptions(device=options.device, precision=cast(Precision, precision), threads=options.threads)
    return Scorer.open_with(options.bundle, asked)


def _check_usage(options: argparse.Namespace) -> None:
    if options.revision is not None and options.against is None:
        options.refuse("--revision is the CHECKPOINT's of --against, which is not given")
