"""Measure which mode and batch size are fastest on this machine, and keep the answer.

The answer is for one bundle. Every alternative scores the same pairs, in turn, so that a disturbance of the machine
meets all of them. Latency is not measured: a pair alone has all threads in every mode.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.checks import check_number
from cappy_engine.cpu.execution import BATCH_TOKENS as DEFAULT_BATCH_TOKENS
from cappy_engine.cpu.execution import Execution
from cappy_engine.cpu.tuned import forget_tuned, prepare_folder, tuned_key, tuning_facts, write_tuned
from cappy_engine.options import Precision, ScorerOptions
from cappy_engine.pairs import Pair, check_pairs
from cappy_engine.scorer import Scorer
from cappy_engine.storage import cache_folder

MODES = ("latency", "both")
BATCH_TOKENS = (256, 512, 1024)
MIN_ROUNDS = 3
SAMPLE = 8
WORTH = 1.03
"""A mode that holds the weights twice must be this much faster."""
WORDS = "the sky is blue and what a response to this question would say about it depends on the text before".split()


class Every(Enum):
    """Say that all bundles are meant; None would come from a variable that was not set."""

    BUNDLE = "every bundle"


@dataclass(frozen=True)
class Trial:
    """One alternative, and the tokens a second of each of its rounds.

    >>> Trial("latency", 512, (90.0, 100.0, 130.0)).tokens_per_second
    100.0
    """

    mode: str
    max_batch_tokens: int
    rates: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """The rate of the median round."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Tuned:
    """The answer, the file that keeps it, and every alternative that was measured."""

    execution: Execution
    path: Path
    trials: list[Trial]


def tune(
    bundle: str | Path = EMBEDDED,
    *,
    precision: Precision = "auto",
    threads: int | None = None,
    pairs: Iterable[Sequence[str]] | None = None,
    seconds: float = 20.0,
    say: Callable[[str], object] = lambda text: None,
) -> Tuned:
    """Measure the alternatives for about `seconds` on the CPU, and keep the fastest.

        >>> tune("cappy-bundle", precision="int8").execution.mode
        'both'

    They score `pairs` (None: made-up ones of 10 to 300 tokens), as many as leave time for three rounds, eight at least.
    `Scorer.open` then takes the answer for mode "auto" and for the batch size, if bundle, precision, processor, number
    of threads and ONNX Runtime are the same. Raises what `Scorer.open` raises, InvalidPair, OutputError if the answer
    cannot be kept, and ValueError without pairs and for `seconds` that are not a number above 0.
    """
    if not 0 < check_number("seconds", seconds) < math.inf:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    chosen = made_up_pairs() if pairs is None else check_pairs(pairs)
    if not chosen:
        raise ValueError("there are no pairs to measure with")
    prepare_folder(cache_folder())  # not after all was measured
    rates: dict[tuple[str, int], list[float]] = {}
    scorers: dict[str, Scorer] = {}
    try:
        options = ScorerOptions(  # all that an answer would tell, so that an earlier one is not asked
            device="cpu", precision=precision, threads=threads, mode="latency", max_batch_tokens=DEFAULT_BATCH_TOKENS
        )
        scorers["latency"] = Scorer.open_with(bundle, options)
        info = scorers["latency"].info
        alternatives = _alternatives(info.threads)
        if ("both", BATCH_TOKENS[0]) in alternatives:
            scorers["both"] = Scorer.open_with(bundle, dataclasses.replace(options, mode="both"))
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
    trials = [Trial(mode, budget, tuple(found)) for (mode, budget), found in rates.items()]
    best = choose_trial(trials)
    facts = tuning_facts(open_bundle(bundle), info.precision, info.threads)
    execution = Execution(best.mode, best.max_batch_tokens, f"{best.tokens_per_second:.0f} tokens/s")
    path = write_tuned(cache_folder(), tuned_key(facts), execution, facts)
    return Tuned(execution, path, trials)


def choose_trial(trials: Sequence[Trial]) -> Trial:
    """Choose the fastest. Of trials within WORTH of it, take one that holds the weights once, then the smaller batch.

    >>> choose_trial([Trial("latency", 512, (100.0,)), Trial("both", 512, (102.0,))]).mode
    'latency'
    """
    fastest = max(trials, key=lambda trial: trial.tokens_per_second)
    near = [trial for trial in trials if trial.tokens_per_second * WORTH >= fastest.tokens_per_second]
    return min(near, key=lambda trial: (MODES.index(trial.mode), trial.max_batch_tokens))


def made_up_pairs() -> list[Pair]:
    """Make 24 pairs of about 10 to 300 tokens. Most are short, as in classification and re-ranking.

    >>> len(made_up_pairs())
    24
    """
    lengths = [10 + 290 * (place / 23) ** 2 for place in range(24)]
    return [
        (" ".join(WORDS[(place + word) % len(WORDS)] for word in range(int(length))), f"answer {place}")
        for place, length in enumerate(lengths)
    ]


def _fitting(pairs: list[Pair], scorers: Mapping[str, Scorer], seconds: float) -> list[Pair]:
    """Take as many pairs as every scorer gets through in `seconds`.

    They are spread over all pairs. The measurement is also a warm-up.
    """
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
    """List what is measured; with one thread the modes are the same."""
    return [(mode, budget) for mode in (MODES if threads > 1 else MODES[:1]) for budget in BATCH_TOKENS]


def forget(bundle: str | Path | Literal[Every.BUNDLE] = Every.BUNDLE) -> int:
    """Remove the answers that are kept for a bundle, or without one for every bundle; returns how many.

        >>> forget("cappy-bundle")
        1

    An answer that cannot be read is removed with those of any bundle. Raises BundleError, and OSError if a file
    cannot be removed.
    """
    if bundle is Every.BUNDLE:
        return forget_tuned(cache_folder())
    return forget_tuned(cache_folder(), {entry.sha256 for entry in open_bundle(bundle).manifest.files.values()})
