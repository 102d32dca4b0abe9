"""`cappy evaluate` and `cappy render`: the paper's protocols, for a bundle in several precisions and for PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import click

from cappy_bench.quality import promptsource
from cappy_bench.quality.evaluation import PYTORCH, describe_accuracy, describe_rouge, evaluation_document
from cappy_bench.quality.evaluation import evaluate as measure
from cappy_bench.quality.picking import Scores, first_examples
from cappy_engine.bundle import EMBEDDED, PRECISIONS, open_bundle
from cappy_engine.cli import text
from cappy_engine.cli.arguments import command, force_option, group, quiet_option, takes
from cappy_engine.cli.extras import extra
from cappy_engine.cli.streams import is_verbose, open_input, open_output, print_json, say, show
from cappy_engine.cli.values import PATH
from cappy_engine.errors import CappyError, InvalidLine
from cappy_engine.options import Asked, Precision, ScorerOptions, check_asked
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer


def _named_path(text: str) -> tuple[str, Path]:
    """Accept a name and a path, as in RTE=rte.csv."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise click.BadParameter(f"must be NAME=PATH, got {text!r}")
    return name, Path(path)


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated: a bundle in some precisions, and perhaps a checkpoint beside it.

    >>> EvaluateOptions(precisions=("fp32", "int8"), against="btan2/cappy-large")

    Raises ValueError for a revision without a checkpoint.
    """

    bundle: Annotated[Path, Asked("a bundle's folder (default: cappy-mini, the package's own)", metavar="BUNDLE")] = (
        EMBEDDED
    )
    precisions: Annotated[
        tuple[str, ...], Asked("repeat to compare (default: auto)", flag="--precision", choices=("auto", *PRECISIONS))
    ] = ()
    against: Annotated[str | None, Asked("score with PyTorch too, and compare the decisions", metavar="CHECKPOINT")] = (
        None
    )
    revision: Annotated[str | None, Asked("hub revision of CHECKPOINT: a branch, tag or commit")] = None
    examples: Annotated[int | None, Asked("only so many examples of each dataset or task, the first ones", least=1)] = (
        None
    )

    def __post_init__(self) -> None:
        check_asked(self)
        if self.revision is not None and self.against is None:
            raise ValueError("--revision is the CHECKPOINT's of --against, which is not given")


@group(
    """
    examples:
      cappy evaluate promptsource tasks.jsonl --bundle cappy-bundle --precision fp32 --precision int8
      cappy evaluate bigbench samples --bundle cappy-bundle --plot rouge.svg

    'cappy evaluate promptsource --help' and 'cappy evaluate bigbench --help' have the rest
    """
)
def evaluate() -> None:
    """Measure what Cappy's picks are worth by the paper's protocols."""


@command(
    """
    examples:
      cappy evaluate promptsource tasks.jsonl --bundle cappy-bundle --precision fp32 --precision int8
      cappy evaluate promptsource tasks.jsonl.gz --bundle cappy-bundle --against btan2/cappy-large --examples 500

    a line: {"dataset_name": "RTE", "template_name": "GPT-3 style", "example_idx": 0, "instruction": ...,
    "response": ..., "label": 1}; candidates of one example agree in the first three, and the best-scoring one is the
    answer
    """,
    name="promptsource",
    of=evaluate,
)
@click.argument("file", metavar="FILE")
@takes(EvaluateOptions)
@takes(ScorerOptions, "scorer", only=("device", "threads"))
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON")
@quiet_option
def evaluate_promptsource(file: str, options: EvaluateOptions, scorer: ScorerOptions, as_json: bool) -> None:
    """Measure accuracy of classification without training: the best-scoring candidate is the answer.

    FILE is JSON Lines, unpacked if its name ends in .gz, or - for stdin.
    """
    name = "stdin" if file == "-" else file
    try:
        with open_input(file) as lines:
            pairs, examples = promptsource.read_examples(lines)
    except InvalidLine as error:
        raise CappyError(f"{name}, {error}") from error
    if not examples:
        raise CappyError(f"{name} holds no examples; 'cappy evaluate promptsource --help' shows a line")
    pairs, examples = first_examples(pairs, examples, options.examples)
    notes = promptsource.notes_on(examples)
    found = measure("accuracy", examples, _score(options, scorer, pairs), notes=notes)
    if as_json:
        print_json(evaluation_document(found))
    else:
        show(describe_accuracy(found))


@command(
    """
    examples:
      cappy evaluate bigbench samples --bundle cappy-bundle --precision fp32 --precision int8
      cappy evaluate bigbench samples --bundle cappy-bundle --against ./my-checkpoint --plot rouge.svg

    a line: {"dataset": "my_task", "instruction": ..., "references": [...], "samples": [...]}, where it has them with
    "decodings", "log_likelihoods" and "token_counts", lists with an entry for each sample
    """,
    name="bigbench",
    of=evaluate,
)
@click.argument("samples", type=PATH, metavar="SAMPLES")
@takes(EvaluateOptions)
@takes(ScorerOptions, "scorer", only=("device", "threads"))
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON")
@click.option("--plot", type=PATH, metavar="FILE", help="draw the figures into FILE (.svg, .png or .pdf)")
@click.option("--force", is_flag=True, help="replace FILE if it exists")
@quiet_option
def evaluate_bigbench(
    samples: Path, options: EvaluateOptions, scorer: ScorerOptions, as_json: bool, plot: Path | None, force: bool
) -> None:
    """Measure ROUGE-L of the best-scoring sample of an LLM, beside other ways to pick one.

    SAMPLES is a folder with a JSON Lines file for each task, as 'cappy sample' writes them, or one such file.
    """
    if force and plot is None:
        raise click.UsageError("--force replaces FILE; name it with --plot")
    with extra("cpu,llm"):
        from cappy_bench.quality import bigbench

        if plot is not None:
            from cappy_bench.quality.plot_files import check_path
            from cappy_bench.quality.rouge_plot import plot_evaluation

            check_path(plot, force=force, inputs=[samples])
    tasks = bigbench.first_of_each(bigbench.read_tasks(samples, say=say), options.examples)
    pairs, examples = bigbench.examples_of(tasks)
    found = measure(
        "ROUGE-L",
        examples,
        _score(options, scorer, pairs),
        others=bigbench.ways_without_scores(tasks, examples),
        notes=bigbench.notes_on(tasks),
    )
    if as_json:
        print_json(evaluation_document(found))
    else:
        show(describe_rouge(found))
    if plot is not None:
        plot_evaluation(found, plot, force=force)
        say(f"wrote {plot}")


@command(
    """
    examples:
      cappy render promptsource --task RTE --task CB -o tasks.jsonl
      cappy render promptsource --examples 100 --file StoryCloze=cloze.csv -o tasks.jsonl

    needs Hugging Face's datasets and PromptSource; without them an error says how to install them
    """
)
@click.argument("protocol", type=click.Choice(["promptsource"]))
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="repeatable (default: all 11)")
@click.option(
    "--examples", type=click.IntRange(min=1), metavar="NUMBER", help="at most so many of each task, drawn by --seed"
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    default=0,
    show_default=True,
    help="of the examples that are drawn",
)
@click.option(
    "--file",
    "files",
    type=_named_path,
    multiple=True,
    metavar="NAME=PATH",
    help="take the examples of a task from a .jsonl or .csv file, not from the hub; repeatable",
)
@click.option("-o", "--output", type=PATH, metavar="OUT", help="file to write (default: stdout)")
@force_option
def render(
    protocol: str,
    tasks: Sequence[str],
    examples: int | None,
    seed: int,
    files: Sequence[tuple[str, Path]],
    output: Path | None,
    force: bool,
) -> None:
    """Write a protocol's tasks from datasets and PromptSource's templates."""
    from cappy_bench.quality import promptsource_render

    if force and output is None:
        raise click.UsageError("--force replaces OUT; name it with -o")
    _check_files([name for name, _ in files], tasks)
    with open_output(output, force=force, inputs=[path for _, path in files]) as written:
        for row in promptsource_render.render(tasks or None, examples=examples, seed=seed, files=dict(files), say=say):
            written.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _score(options: EvaluateOptions, asked: ScorerOptions, pairs: Sequence[Pair]) -> dict[str, Scores]:
    """Scores (pairs,) of PyTorch, where asked for, and of each precision."""
    scores: dict[str, Scores] = {}
    precisions = list(dict.fromkeys(options.precisions or ["auto"]))
    if options.against is not None or len(precisions) > 1:
        for precision in precisions:  # an error is found before hours of scoring, and not by two models at once
            _open_scorer(options.bundle, asked, precision).close()
    if options.against is not None:
        with extra("cpu,export"):
            from cappy_export.proof.reference import score_checkpoint
        max_length = open_bundle(options.bundle).manifest.max_length
        say(f"scoring {len(set(pairs))} pairs with PyTorch")
        scores[PYTORCH] = score_checkpoint(options.against, pairs, revision=options.revision, max_length=max_length)
    for precision in precisions:
        with _open_scorer(options.bundle, asked, precision) as scorer:
            if scorer.info.precision in scores:  # auto is one of the others
                continue
            say(text.explain_info(scorer.info) if is_verbose() else text.describe_info(scorer.info))
            scores[scorer.info.precision] = scorer.score(pairs)
    return scores


def _open_scorer(bundle: Path, asked: ScorerOptions, precision: str) -> Scorer:
    return Scorer.open_with(bundle, dataclasses.replace(asked, precision=cast(Precision, precision)))


def _check_files(names: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse, as wrong usage, files that would not be read."""
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"--file names {name} {names.count(name)} times; a task has one file")
        if tasks and name not in tasks:
            raise click.UsageError(f"--file names {name}, which is not among --task {', '.join(tasks)}")
