"""`cappy sample`: an LLM answers instructions, for the paper's protocols and for adaptation to learn from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from cappy_bench.candidates import sampling
from cappy_bench.candidates.decodings import ENDPOINT_DECODINGS, PAPER, Decoding, Sampler, choose_decodings
from cappy_bench.candidates.sample_options import EndpointOptions, LLMOptions, SampleOptions
from cappy_engine.cli.arguments import command, flags_given, takes
from cappy_engine.cli.extras import extra
from cappy_engine.cli.progress import progress_bar
from cappy_engine.cli.streams import say, tell
from cappy_engine.cli.values import PATH
from cappy_engine.options import Asked, check_asked, questions


@dataclass(frozen=True)
class Source:
    """Which LLM answers: one that runs here, or one behind an endpoint.

    >>> Source(llm="google/flan-t5-xxl")

    Raises ValueError unless it is one of both.
    """

    llm: Annotated[
        str | None, Asked("a local folder or hub id: seq2seq or causal, run by transformers", metavar="LLM")
    ] = None
    endpoint: Annotated[
        str | None, Asked("of an OpenAI-compatible server, as in http://localhost:8000/v1", metavar="URL")
    ] = None
    model: Annotated[str | None, Asked("the model's name at the endpoint", metavar="NAME")] = None
    max_new_tokens: Annotated[int, Asked("tokens of an answer, at most", least=1)] = 128

    def __post_init__(self) -> None:
        check_asked(self)
        if (self.llm is None) == (self.endpoint is None):
            raise ValueError("give one of --llm and --endpoint")
        if self.endpoint is not None and self.model is None:
            raise ValueError("--endpoint needs --model, the model's name there")
        if self.endpoint is None and self.model is not None:
            raise ValueError("--model goes with --endpoint")


@dataclass(frozen=True)
class Ways:
    """By which decodings an instruction is answered, and how often by each."""

    decodings: Annotated[
        tuple[str, ...],
        Asked(
            "beam, greedy, sampling, temperature, top-k or top-p; repeatable (default: the paper's, all but greedy)",
            flag="--decoding",
            metavar="NAME",
        ),
    ] = ()
    count: Annotated[int, Asked("samples of each decoding that draws", least=1)] = 4

    def __post_init__(self) -> None:
        check_asked(self)

    def choose(self, default: tuple[Decoding, ...]) -> tuple[Decoding, ...]:
        """Look up the decodings. Raises SampleError."""
        return choose_decodings(self.decodings or [decoding.name for decoding in default], count=self.count)


@command(
    """
    examples:
      cappy sample prompts.jsonl --llm google/flan-t5-xxl -o samples.jsonl
      cappy sample prompts.jsonl --llm google/flan-t5-xxl -o samples.jsonl --resume
      cappy sample prompts.jsonl --llm ./my-chat-model --chat-template --max-new-tokens 256 -o samples.jsonl
      cappy sample prompts.jsonl --endpoint http://localhost:8000/v1 --model my-llm -o samples.jsonl
      cappy sample prompts.jsonl --llm ./my-llm --decoding greedy --decoding top-p --count 8 -o samples.jsonl

    a line of PROMPTS: {"instruction": "Add 2 and 3.", "references": ["5"]}; other fields are kept. A line of OUT has
    these and "samples", "decodings", "log_likelihoods", "token_counts" and "cut", lists with an entry for each sample.
    'cappy evaluate bigbench' and 'cappy adapt --from-samples' read OUT. The defaults are the decodings of Cappy's paper
    (arXiv 2311.06720), which give 17 candidates: beam search with 4 beams, plain sampling, temperature 0.9, top-k 40
    and top-p 0.95. Of an endpoint the defaults are sampling, temperature and top-p; its key is read from OPENAI_API_KEY
    """
)
@click.argument("prompts", type=PATH, metavar="PROMPTS")
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="the file to write, .jsonl")
@takes(Source, "source")
@takes(Ways, "ways")
@takes(SampleOptions)
@takes(LLMOptions, "here", section="With --llm")
@takes(EndpointOptions, "there", section="With --endpoint")
def sample(
    prompts: Path,
    output: Path,
    source: Source,
    ways: Ways,
    options: SampleOptions,
    here: LLMOptions,
    there: EndpointOptions,
) -> None:
    """Let an LLM answer instructions, several times each.

    PROMPTS is a JSON Lines file, which may be a .gz.
    """
    _check_kind(source)
    # An error that can be known at once comes before an LLM is loaded for minutes.
    sampling.check_out(output, resume=options.resume, force=options.force, source=prompts)
    decodings = ways.choose(PAPER if source.llm else ENDPOINT_DECODINGS)
    read = sampling.read_prompts(prompts)
    with _sampling_bar() as progress:
        sampler = _open_sampler(source, here, there)
        totals = sampling.sample_file(read, output, sampler, decodings, options, say=say, progress=progress)
    say(_describe(totals, is_filtered=source.endpoint is not None))
    tell(f"wrote {output}")


def _check_kind(source: Source) -> None:
    """Refuse, as wrong usage, options that go with the other kind of LLM."""
    others, kind = (EndpointOptions, "--endpoint") if source.llm else (LLMOptions, "--llm")
    for flag in flags_given(questions(others)):
        raise click.UsageError(f"{flag} goes with {kind}")


def _open_sampler(source: Source, here: LLMOptions, there: EndpointOptions) -> Sampler:
    if source.llm is not None:
        with extra("cpu,export"):
            from cappy_bench.candidates.llm import open_llm
        return open_llm(source.llm, here, max_new_tokens=source.max_new_tokens, say=say)
    with extra("cpu,llm"):
        from cappy_bench.candidates.endpoint import Endpoint
    return Endpoint(str(source.endpoint), str(source.model), there, max_new_tokens=source.max_new_tokens)


def _describe(totals: sampling.Totals, *, is_filtered: bool) -> str:
    """Say in one line what was sampled; `is_filtered` if a content filter may have stopped answers, too."""
    facts = [f"{totals.samples} samples of {totals.examples} instructions"]
    if totals.resumed:
        facts.append(f"{totals.resumed} instructions were answered before")
    facts.append(f"{totals.seconds:.1f} s")
    for count, text in (
        (totals.cut, f"samples were cut at --max-new-tokens{' or by a content filter' * is_filtered}"),
        (totals.empty, "samples are empty"),
        (totals.prompts_cut, "instructions were cut at --max-prompt-tokens"),
    ):
        if count:
            facts.append(f"{count} {text}")
    return ", ".join(facts)


@contextlib.contextmanager
def _sampling_bar() -> Iterator[Callable[[sampling.Totals], None]]:
    """Yield a function for `sample_file` that shows examples, samples and the time left."""
    with progress_bar("example") as show:

        def show_totals(totals: sampling.Totals) -> None:
            show(totals.examples, totals.all_examples, f"{totals.samples} samples", begun=totals.resumed)

        yield show_totals
