"""`cappy render` and `cappy sample`: what the paper's protocols are measured on, and what adaptation learns from."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cappy_bench.candidates import sampling
from cappy_bench.candidates.decodings import ENDPOINT_DECODINGS, PAPER, choose_decodings
from cappy_bench.candidates.options import EndpointOptions, LLMOptions, SampleOptions
from cappy_engine.cli.arguments import (
    EXIT_OK,
    add_command,
    exit_on_termination,
    import_export,
    open_output,
    positive,
    say,
)

SAMPLE_EXAMPLES = """examples:
  cappy sample prompts.jsonl --llm google/flan-t5-xxl -o samples.jsonl
  cappy sample prompts.jsonl --llm google/flan-t5-xxl -o samples.jsonl --resume
  cappy sample prompts.jsonl --llm ./my-chat-model --chat-template --max-new-tokens 256 -o samples.jsonl
  cappy sample prompts.jsonl --endpoint http://localhost:8000/v1 --model my-llm -o samples.jsonl
  cappy sample prompts.jsonl --llm ./my-llm --decoding greedy --decoding top-p --count 8 -o samples.jsonl

a line of PROMPTS: {"instruction": "Add 2 and 3.", "references": ["5"]}; other fields are kept. A line of OUT has these
and "samples", "decodings", "log_likelihoods", "token_counts" and "cut", lists with an entry for each sample: what
'cappy evaluate bigbench' and 'cappy adapt --from-samples' take. The defaults are the decodings of Cappy's paper
(arXiv 2311.06720): beam search with 4 beams, plain sampling, temperature 0.9, top-k 40 and top-p 0.95; 17 candidates.
Of an endpoint the defaults are sampling, temperature and top-p; its key is read from OPENAI_API_KEY"""

RENDER_EXAMPLES = """examples:
  cappy render promptsource --task RTE --task CB -o tasks.jsonl
  cappy render promptsource --examples 100 --file StoryCloze=cloze.csv -o tasks.jsonl

needs Hugging Face's datasets and PromptSource; without them an error says how to install them"""

LOCAL_ONLY = ("revision", "device", "dtype", "max_prompt_tokens", "chat_template")
ENDPOINT_ONLY = tuple("model api concurrent max_choices max_completion_tokens extra_body no_log_likelihoods".split())
"""Options of one kind of LLM: an error with the other."""


def add_commands(commands: Any) -> None:
    """Add render and sample."""
    _add_render(commands)
    _add_sample(commands)


def _add_render(commands: Any) -> None:
    parser = add_command(
        commands, "render", _render, "write a protocol's tasks from datasets and PromptSource's templates",
        RENDER_EXAMPLES,
    )  # fmt: skip
    parser.set_defaults(refuse=parser.error)
    parser.add_argument("protocol", choices=("promptsource",))
    parser.add_argument("--task", action="append", dest="tasks", metavar="NAME", help="repeatable (default: all 11)")
    parser.add_argument("--examples", type=positive, help="at most so many of each task, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--file", action="append", type=_named_path, default=[], dest="files", metavar="NAME=PATH",
        help="take the examples of a task from a .jsonl or .csv file, not from the hub; repeatable",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: stdout)")


def _add_sample(commands: Any) -> None:
    parser = add_command(
        commands, "sample", _sample, "let an LLM answer instructions, several times each", SAMPLE_EXAMPLES
    )
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="JSON Lines file, may be a .gz")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the file to write, .jsonl")
    parser.set_defaults(refuse=parser.error)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--llm", metavar="LLM", help="a local folder or hub id: seq2seq or causal, run by transformers")
    source.add_argument(
        "--endpoint", metavar="URL", help="of an OpenAI-compatible server, as in http://localhost:8000/v1"
    )
    parser.add_argument(
        "--decoding", action="append", dest="decodings", metavar="NAME",
        help="beam, greedy, sampling, temperature, top-k or top-p; repeatable (default: the paper's, all but greedy)",
    )  # fmt: skip
    parser.add_argument("--count", type=positive, default=4, help="samples of each that draws (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="instructions answered at once (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a file that was stopped")
    local = parser.add_argument_group("with --llm")
    local.add_argument("--revision", help="hub revision: a branch, tag or commit")
    local.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto, a GPU where there is one")
    local.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), help="default: auto, bfloat16 on a GPU, float32 on the CPU"
    )
    local.add_argument("--max-prompt-tokens", type=positive, help="cut longer instructions (default: an error)")
    local.add_argument(
        "--chat-template", action="store_true", default=None, help="the instruction is the user's message of a chat"
    )
    endpoint = parser.add_argument_group("with --endpoint")
    endpoint.add_argument("--model", help="the model's name there")
    endpoint.add_argument("--api", choices=("chat", "completions"), help="default: chat")
    endpoint.add_argument(
        "--concurrent", type=positive, metavar="COUNT",
        help="requests at once, of those of one batch: --batch-size times the number of decodings (default: 8)",
    )  # fmt: skip
    endpoint.add_argument("--max-choices", type=positive, metavar="COUNT", help="samples asked for in one request")
    endpoint.add_argument(
        "--max-completion-tokens", action="store_true", default=None,
        help="send the limit by this name: OpenAI's newer models refuse max_tokens",
    )  # fmt: skip
    endpoint.add_argument(
        "--extra-body", type=_json_object, metavar="JSON",
        help="more fields of each request, as in '{\"top_k\": -1}', which vLLM needs to sample from all tokens",
    )  # fmt: skip
    endpoint.add_argument(
        "--no-log-likelihoods", action="store_true", default=None, help="for servers that do not give them"
    )


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, Path(path)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _check_files(options: argparse.Namespace) -> None:
    """Refuse, as wrong usage, files that would not be read."""
    names = [name for name, _ in options.files]
    for name in names:
        if names.count(name) > 1:
            options.refuse(f"--file names {name} {names.count(name)} times; a task has one file")
        if options.tasks and name not in options.tasks:
            options.refuse(f"--file names {name}, which is not among --task {', '.join(options.tasks)}")


def _render(options: argparse.Namespace) -> int:
    _check_files(options)
    rows = import_export("cappy_bench.quality.promptsource_render").render(
        options.tasks, examples=options.examples, seed=options.seed, files=dict(options.files), say=say
    )
    with open_output(options.output) as output:
        for row in rows:
            output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return EXIT_OK


def _sample(options: argparse.Namespace) -> int:
    _check_kind(options)
    run = SampleOptions(seed=options.seed, batch_size=options.batch_size, resume=options.resume)
    # All that can be known at once is refused before an LLM is loaded for minutes.
    sampling.check_out(options.output, resume=run.resume)
    chosen = choose_decodings(options.decodings or _default_decodings(options), count=options.count)
    prompts = sampling.read_prompts(options.prompts)
    with exit_on_termination():
        sampler = _open_llm(options) if options.llm else _open_endpoint(options)
        with _sampling_bar() as progress:
            totals = sampling.sample_file(prompts, options.output, sampler, chosen, run, say=say, progress=progress)
    say(_described(totals))
    print(f"wrote {options.output}")
    return EXIT_OK


def _described(totals: Any) -> str:
    """What `cappy sample` did, in one line."""
    facts = [f"{totals.samples} samples of {totals.examples} instructions"]
    if totals.resumed:
        facts.append(f"{totals.resumed} instructions were answered before")
    facts.append(f"{totals.seconds:.1f} s")
    for count, text in (
        (totals.cut, "samples were cut at --max-new-tokens"),
        (totals.empty, "samples are empty"),
        (totals.prompts_cut, "instructions were cut at --max-prompt-tokens"),
    ):
        if count:
            facts.append(f"{count} {text}")
    return ", ".join(facts)


def _check_kind(options: argparse.Namespace) -> None:
    """Refuse, as wrong usage, options that go with the other kind of LLM."""
    others, kind = (ENDPOINT_ONLY, "--endpoint") if options.llm else (LOCAL_ONLY, "--llm")
    for name in others:
        if getattr(options, name) is not None:
            options.refuse(f"--{name.replace('_', '-')} goes with {kind}")
    if options.endpoint and options.model is None:
        options.refuse("--endpoint needs --model, the model's name there")


def _default_decodings(options: argparse.Namespace) -> list[str]:
    return [decoding.name for decoding in (PAPER if options.llm else ENDPOINT_DECODINGS)]


def _open_llm(options: argparse.Namespace) -> Any:
    asked = LLMOptions(
        revision=options.revision,
        device=options.device or "auto",
        dtype=options.dtype or "auto",
        max_prompt_tokens=options.max_prompt_tokens,
        is_chat=bool(options.chat_template),
    )
    llm = import_export("cappy_bench.candidates.llm", "cpu,export,train")
    return llm.open_llm(options.llm, asked, max_new_tokens=options.max_new_tokens, say=say)


def _open_endpoint(options: argparse.Namespace) -> Any:
    asked = EndpointOptions(
        api=options.api or "chat",
        concurrent=options.concurrent or 8,
        max_choices=options.max_choices,
        uses_max_completion_tokens=bool(options.max_completion_tokens),
        extra_body=options.extra_body,
        without_log_likelihoods=bool(options.no_log_likelihoods),
    )
    endpoint = import_export("cappy_bench.candidates.endpoint", "cpu,llm")
    return endpoint.Endpoint(options.endpoint, options.model, asked, max_new_tokens=options.max_new_tokens)


@contextlib.contextmanager
def _sampling_bar() -> Iterator[Any]:
    """Yield a callable for `sample_file` that shows examples, samples/s and the time left, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda totals: None
        return
    from tqdm import tqdm

    with tqdm(unit="example", leave=False, dynamic_ncols=True) as bar:

        def show(totals: Any) -> None:
            if bar.total is None:
                bar.total, bar.n, bar.initial = totals.all_examples, totals.examples, totals.examples
            bar.set_postfix_str(f"{totals.samples} samples", refresh=False)
            bar.update(totals.examples - bar.n)

        yield show
