"""`cappy tune`: which mode and batch size score a bundle's pairs fastest on this machine; the answer is kept.

Every alternative scores the same pairs, in turn, so that what disturbs the machine disturbs all. Latency is not
measured: a pair alone has all threads in every mode that is considered.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.cpu.execution import Execution
from cappy_engine.cpu.tuned import tuned_key, tuning_facts, write_tuned
from cappy_engine.options import Precision
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.storage import cache_folder

MODES = ("latency", "both")
BATCH_TOKENS = (256, 512, 1024)
MIN_ROUNDS = 3
SAMPLE = 8
WORTH = 1.03
"""A mode that holds the weights twice must be this much faster."""
WORDS = "the sky is blue and what a response to this question would say about it depends on the text before".split()


@dataclass(frozen=True)
class Trial:
    """One alternative, and the `tokens_per_second` of its median round."""

    mode: str
    max_batch_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class Tuned:
    """What was chosen, where the answer is kept, and all that was measured."""

    execution: Execution
    path: Path
    trials: list[Trial]


def tune(
    bundle: str | Path | None = None,
    *,
    precision: Precision = "auto",
    threads: int | None = None,
    pairs: Sequence[Pair] | None = None,
    seconds: float = 20.0,
    say: Callable[[str], object] = lambda text: None,
) -> Tuned:
    """Measure the alternatives for about `seconds`, on `pairs` (None: made-up ones of 10 to 300 tokens), on the CPU.

    As many of the pairs are taken as leave time for three rounds, eight at least.

    The answer is what `Scorer.open` then takes for mode "auto" and for the batch size, for this bundle, precision,
    processor, number of threads and ONNX Runtime. Raises what `Scorer.open` raises, and ValueError without pairs.
    """
    if pairs is not None and not pairs:
        raise ValueError("there are no pairs to measure with")
    chosen = list(pairs) if pairs is not None else made_up_pairs()
    rates: dict[tuple[str, int], list[float]] = {}
    scorers: dict[str, Scorer] = {}
    try:
        scorers["latency"] = Scorer.open(bundle, device="cpu", precision=precision, threads=threads, mode="latency")
        info = scorers["latency"].info
        alternatives = _alternatives(info.threads)
        if ("both", BATCH_TOKENS[0]) in alternatives:
            scorers["both"] = Scorer.open(bundle, device="cpu", precision=precision, threads=threads, mode="both")
        chosen = _fitting(chosen, scorers, seconds / (MIN_ROUNDS * len(alternatives)))
        ends = time.perf_counter() + seconds
        while len(rates) < len(alternatives) or time.perf_counter() < ends:
            for mode, budget in alternatives:
                started = time.perf_counter()
                scored = scorers[mode].score_pairs(chosen, max_batch_tokens=budget)
                rate = int(scored.token_counts.sum()) / (time.perf_counter() - started)
                rates.setdefault((mode, budget), []).append(rate)
                say(f"{mode}, {budget} tokens a batch: {rate:.0f} tokens/s")
    finally:
        for scorer in scorers.values():
            scorer.close()
    trials = [Trial(mode, budget, statistics.median(found)) for (mode, budget), found in rates.items()]
    best = choose_trial(trials)
    facts = tuning_facts(open_bundle(EMBEDDED if bundle is None else bundle), info.precision, info.threads)
    execution = Execution(best.mode, best.max_batch_tokens, f"{best.tokens_per_second:.0f} tokens/s")
    path = write_tuned(cache_folder(), tuned_key(facts), execution, facts)
    return Tuned(execution, path, trials)


def choose_trial(trials: Sequence[Trial]) -> Trial:
    """The fastest; but one that holds the weights once if it is within WORTH of it, and then the smallest batch."""
    fastest = max(trials, key=lambda trial: trial.tokens_per_second)
    near = [trial for trial in trials if trial.tokens_per_second * WORTH >= fastest.tokens_per_second]
    return min(near, key=lambda trial: (MODES.index(trial.mode), trial.max_batch_tokens))


def made_up_pairs() -> list[Pair]:
    """24 pairs of about 10 to 300 tokens, most of them short, as in classification and re-ranking."""
    lengths = [10 + 290 * (place / 23) ** 2 for place in range(24)]
    return [
        (" ".join(WORDS[(place + word) % len(WORDS)] for word in range(int(length))), f"answer {place}")
        for place, length in enumerate(lengths)
    ]


def _fitting(pairs: list[Pair], scorers: Mapping[str, Scorer], seconds: float) -> list[Pair]:
    """As many of the pairs, spread over all of them, as every scorer gets through in `seconds`; also a warm-up."""
    sample = pairs[:: -(-len(pairs) // SAMPLE)]
    slowest = 0.0
    for scorer in scorers.values():
        scorer.score_pairs(sample)
        started = time.perf_counter()
        scorer.score_pairs(sample)
        slowest = max(slowest, time.perf_counter() - started)
    count = max(len(sample), int(len(sample) * seconds / slowest))
    return pairs[:: -(-len(pairs) // count)]


def _alternatives(threads: int) -> list[tuple[str, int]]:
    """With one thread the modes are the same."""
    return [(mode, budget) for mode in (MODES if threads > 1 else MODES[:1]) for budget in BATCH_TOKENS]
