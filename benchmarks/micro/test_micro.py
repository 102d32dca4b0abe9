"""Measures each step of a pair's way on a CPU: tokenise, plan, pad, run.

    pytest benchmarks/micro --benchmark-columns=median,iqr,rounds

A small model shows best what the engine costs beside it. Tokens per second, padding included where the model computes
it, are in what `--benchmark-json` writes. Nothing is asserted here: `tests` say what is right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from cappy_engine import Scorer
from cappy_engine.batching import Batch, EncodedPairs, Ids, plan_batches
from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.cpu.execution import BATCH_TOKENS
from cappy_engine.inputs import model_inputs
from cappy_engine.pairs import Pair
from cappy_engine.scored import Scored
from cappy_engine.session import OrtSession, open_session
from cappy_engine.tokenizer import PairTokenizer

CANDIDATES = 16
SHAPES = [(1, 16), (1, 128), (1, 512), (4, 128), (8, 64), (32, 16)]
"""(batch, length): single pairs, and three ways to fill the CPU's budget of 512 tokens."""


@pytest.fixture(scope="module")
def tokenizer() -> PairTokenizer:
    return PairTokenizer.from_file(EMBEDDED / "tokenizer.json", max_length=512)


@pytest.fixture(scope="module")
def session() -> OrtSession:
    return open_session(open_bundle(EMBEDDED).model("int8"))


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer.open(device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def distinct_pairs() -> list[Pair]:
    """64 pairs of distinct texts of 8 to 80 words, about as many tokens."""
    sizes = np.random.default_rng(1).integers(8, 80, 128, endpoint=True)
    texts = _texts(sizes.tolist())
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture(scope="module")
def candidates() -> tuple[str, list[str]]:
    """An instruction of 100 words and 16 candidates of 16."""
    instruction, *responses = _texts([100] + [16] * CANDIDATES)
    return instruction, responses


@pytest.mark.benchmark(group="tokenise")
def test_tokenise_64_distinct_pairs(
    benchmark: BenchmarkFixture, tokenizer: PairTokenizer, distinct_pairs: list[Pair]
) -> None:
    encoded: EncodedPairs = benchmark(tokenizer.encode, distinct_pairs)
    _tell_speed(benchmark, int(encoded.lengths.sum()))


@pytest.mark.benchmark(group="tokenise")
def test_tokenise_16_candidates(
    benchmark: BenchmarkFixture, tokenizer: PairTokenizer, candidates: tuple[str, list[str]]
) -> None:
    instruction, responses = candidates
    encoded: EncodedPairs = benchmark(tokenizer.encode, [(instruction, response) for response in responses])
    _tell_speed(benchmark, int(encoded.lengths.sum()))


@pytest.mark.benchmark(group="plan")
@pytest.mark.parametrize("count", [64, 10_000])
def test_plan_batches(benchmark: BenchmarkFixture, count: int) -> None:
    lengths = np.random.default_rng(2).lognormal(4.4, 0.7, count).clip(8, 512).astype(np.int64)
    batches: list[Batch] = benchmark(plan_batches, lengths, max_batch_tokens=BATCH_TOKENS)
    benchmark.extra_info["batches"] = len(batches)
    benchmark.extra_info["padding_share"] = 1 - int(lengths.sum()) / sum(batch.padded_tokens for batch in batches)


@pytest.mark.benchmark(group="pad")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pad_a_batch(benchmark: BenchmarkFixture, shape: tuple[int, int]) -> None:
    """The arrays that the model takes."""
    lengths = np.random.default_rng(3).integers(shape[1] * 3 // 4, shape[1], shape[0], endpoint=True)
    batch = Batch(np.arange(shape[0]), shape[1])
    benchmark(model_inputs, _encoded([np.arange(length) for length in lengths]), batch, pad_token_id=1)
    _tell_speed(benchmark, batch.padded_tokens)


@pytest.mark.benchmark(group="run")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_run_a_batch(benchmark: BenchmarkFixture, session: OrtSession, shape: tuple[int, int]) -> None:
    token_ids = np.random.default_rng(4).integers(10, 10_000, shape)
    inputs = model_inputs(_encoded(list(token_ids)), Batch(np.arange(shape[0]), shape[1]), pad_token_id=1)
    benchmark(session.run, inputs)
    _tell_speed(benchmark, token_ids.size)


@pytest.mark.benchmark(group="all")
def test_score_16_distinct_pairs(benchmark: BenchmarkFixture, scorer: Scorer, distinct_pairs: list[Pair]) -> None:
    scored: Scored = benchmark(scorer.score_pairs, distinct_pairs[:CANDIDATES])
    _tell_speed(benchmark, int(scored.token_counts.sum()))


@pytest.mark.benchmark(group="all")
def test_rank_16_candidates(benchmark: BenchmarkFixture, scorer: Scorer, candidates: tuple[str, list[str]]) -> None:
    instruction, responses = candidates
    benchmark(scorer.rank, instruction, responses)
    pairs = [(instruction, response) for response in responses]
    _tell_speed(benchmark, int(scorer.score_pairs(pairs).token_counts.sum()))


@pytest.mark.benchmark(group="all")
def test_score_one_short_pair(benchmark: BenchmarkFixture, scorer: Scorer) -> None:
    scored: Scored = benchmark(scorer.score_pairs, [("Is the sky blue?", "Yes")])
    _tell_speed(benchmark, int(scored.token_counts.sum()))


def _texts(sizes: Sequence[int]) -> list[str]:
    """Make texts of cappy-mini's words, common ones more often, as in a language."""
    vocabulary: list[str] = list(json.loads((EMBEDDED / "vocab.json").read_text(encoding="utf-8")))
    words = [token[1:] for token in vocabulary if token.startswith("Ġ") and token[1:].isalpha()]
    chances = 1 / np.arange(1, len(words) + 1)
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, size, p=chances / chances.sum())) for size in sizes]


def _encoded(token_ids: Sequence[Ids]) -> EncodedPairs:
    lengths = np.array([len(row) for row in token_ids])
    return EncodedPairs(token_ids, [np.zeros_like(row) for row in token_ids], lengths, lengths > 512)


def _tell_speed(benchmark: BenchmarkFixture, tokens: int) -> None:
    """Note the tokens of one round, and tokens per second at the median."""
    benchmark.extra_info["tokens"] = tokens
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median)
