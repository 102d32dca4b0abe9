"""Measures as sentence-transformers' authors did for 19 rerankers, so that our figures stand beside theirs.

Their protocol ("Introducing the Ettin Reranker Family", huggingface.co/blog/ettin-reranker, Speed): question and answer
of sentence-transformers/natural-questions, at most 512 tokens, on one H100 80GB in bfloat16. Batches of 8 pairs, then
of twice as many until the GPU's memory ends; the median of three passes at each size; the best size counts. As their
library does, the longest pairs come first, and texts are tokenised within the time.

Each contestant has a process of its own, and so the whole memory. Knows nothing of how a contestant is opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cappy_bench.gpu.host import tokenizer_of
from cappy_bench.gpu.plan import Check, CheckFailed
from cappy_bench.gpu.results import Figures, make_cell
from cappy_bench.gpu.throughput import score_in_rows
from cappy_bench.peers.peer import Pair
from cappy_bench.peers.process import in_short
from cappy_bench.shapes import read_shape
from cappy_bench.speed.texts import choose_pool
from cappy_bench.speed.workloads import Pool, question_lengths
from cappy_engine.batching import Scores
from cappy_engine.tokenizer import PairTokenizer

FIRST_ROWS = 8
PASSES = 3


def measure_questions(check: Check, *, name: str) -> Figures:
    """Time one contestant at every size of batch. Raises CheckFailed if not even the first one runs.

    >>> measure_questions(check, name="cuda fp16")["best"]["pairs_per_second"]
    """
    session, model = check.open(name)
    tokenizer = tokenizer_of(model.bundle)
    pairs, source = _question_pairs(check, tokenizer)
    lengths = tokenizer.encode(pairs).lengths
    shape = read_shape(check.bundle)

    def run(rows: int) -> Scores:
        return score_in_rows(session, tokenizer, pairs, rows, pad_token_id=model.pad_token_id)

    seconds, ended = time_doubling(run, most=len(pairs), passes=min(PASSES, check.effort.runs))
    if not seconds:
        raise CheckFailed(f"batches of {FIRST_ROWS} pairs: {ended}")
    cells = [{**make_cell(name, lengths.tolist(), taken, shape), "batch": rows} for rows, taken in seconds.items()]
    best = min(cells, key=lambda cell: float(cell["seconds"]))
    mean, middle, high = (float(value) for value in (lengths.mean(), *np.percentile(lengths, (50, 95))))
    return {
        "best": best,
        "sizes": cells,
        "ended": ended,
        "pairs": source,
        "lengths": {"mean": mean, "p50": middle, "p95": high, "max": int(lengths.max())},
        "outcome": f"{best['pairs_per_second']:.0f} pairs/s in batches of {best['batch']}; {ended}",
    }


def time_doubling(
    run: Callable[[int], object], *, most: int, passes: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[int, list[float]], str]:
    """Time `passes` passes with batches of 8, 16, 32 ... pairs, after one that is not timed; say why it ended.

    >>> time_doubling(lambda rows: None, most=16, passes=3)[1]
    'all pairs are one batch of 16'
    """
    found: dict[int, list[float]] = {}
    rows = FIRST_ROWS
    while max(found, default=0) < most:
        try:
            run(rows)
            taken = []
            for _ in range(passes):
                began = clock()
                run(rows)
                taken.append(clock() - began)
        except Exception as error:  # whatever a library raises when the memory ends
            return found, f"{rows} pairs did not run ({in_short(f'{type(error).__name__}: {error}')})"
        found[rows] = taken
        rows *= 2
    return found, f"all pairs are one batch of {most}"


def _question_pairs(check: Check, tokenizer: PairTokenizer) -> tuple[list[Pair], str]:
    """Take the pairs, and say where they are from: a file, or texts of the lengths that are assumed."""
    texts, source = choose_pool(check.questions, check.data, seed=0, made=check.effort.pool)
    if check.questions is not None:
        return texts[: check.effort.pairs], source
    random = np.random.default_rng(0)
    lengths = question_lengths(random, min(check.effort.pairs, len(texts) // 2))
    return Pool(texts, tokenizer).take(lengths), f"{source}, in the lengths assumed for Natural Questions"
