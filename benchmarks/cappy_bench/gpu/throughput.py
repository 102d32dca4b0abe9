"""Measures throughput on a GPU: ours and PyTorch in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from cappy_bench.gpu.host import scorer_of, tokenizer_of
from cappy_bench.gpu.plan import Check, CheckFailed
from cappy_bench.gpu.results import IN_USUAL_ROWS, TORCH, USUAL_ROWS, Figures, make_cell
from cappy_bench.peers.peer import Pair
from cappy_bench.peers.process import in_short
from cappy_bench.shapes import read_shape
from cappy_bench.speed.texts import choose_pool
from cappy_bench.speed.workloads import Sizes, make_workloads
from cappy_engine.batching import Batch, Ids, Scores
from cappy_engine.bundle import open_bundle
from cappy_engine.gpu.plan import GpuModel
from cappy_engine.inputs import full_batch, model_inputs
from cappy_engine.session import Session
from cappy_engine.tokenizer import PairTokenizer

ROWS = (1, 8, 32, 128)
WARM_UPS = 3
MIXED_RUNS = 7
"""How often the mixed workload is timed at most: a GPU is often lent by the minute."""

Run = Callable[[], object]


def measure_length(check: Check, *, length: int, names: Sequence[str]) -> Figures:
    """Time batches of rows of one length, without padding; arrays in, scores out.

    >>> measure_length(check, length=128, names=["cuda fp16", "pytorch fp16"])["cells"][0]["pairs_per_second"]
    """
    opened, failed = _open_contestants(check, names)
    most = min(model.max_rows(length) for _, model in opened.values())
    sessions = {name: opened[name][0] if name in opened else None for name in names}
    cells, broken = time_shapes(check, sessions, [(rows, length) for rows in ROWS if rows <= most])
    return unless_failed({"cells": cells, "failed": failed | broken})


def time_shapes(
    check: Check, sessions: Mapping[str, Session | None], shapes: Sequence[tuple[int, int]]
) -> tuple[list[Figures], dict[str, str]]:
    """Time a batch of random tokens of each shape (rows, tokens) in turns; return cells, and why some are empty.

    >>> cells, failed = time_shapes(check, {"ours": session}, [(1, 64), (32, 128)])
    """
    model = read_shape(check.bundle)
    cells: list[Figures] = []
    failed: dict[str, str] = {}
    for rows, length in shapes:
        inputs = random_batch(check, rows, length)
        runs = {name: partial(session.run, inputs) for name, session in sessions.items() if session is not None}
        count = check.effort.single_runs if rows == 1 else check.effort.runs
        seconds, broken = time_in_turns(runs, runs=count)
        failed |= {f"{name}, {rows} x {length}": reason for name, reason in broken.items()}
        cells += [make_cell(name, [length] * rows, seconds.get(name, []), model) for name in sessions]
    return cells, failed


def measure_mixed(check: Check, *, names: Sequence[str]) -> Figures:
    """Time many pairs of mixed lengths in one call, from texts to scores.

    PyTorch has the batches that we plan, and besides the usual ones of 32 pairs, the longest first.

    >>> measure_mixed(check, names=["cuda fp16", "pytorch fp16"])["cells"][0]["pairs_per_second"]
    """
    shape, (opened, failed) = read_shape(check.bundle), _open_contestants(check, names)
    scorers = {name: scorer_of(session, model) for name, (session, model) in opened.items()}
    tokenizer = tokenizer_of(open_bundle(check.bundle))
    pairs, source = _mixed_pairs(check, tokenizer)
    lengths = tokenizer.encode(pairs).lengths.tolist()
    runs: dict[str, Run] = {name: partial(scorer.score, pairs) for name, scorer in scorers.items()}
    for name in (name for name in TORCH if name in opened):
        session, model = opened[name]
        run = partial(score_in_rows, session, tokenizer, pairs, USUAL_ROWS, pad_token_id=model.pad_token_id)
        runs[f"{name}{IN_USUAL_ROWS}"] = run
    seconds, broken = time_in_turns(runs, runs=min(MIXED_RUNS, check.effort.runs))
    cells = [make_cell(name, lengths, seconds.get(name, []), shape) for name in dict.fromkeys((*names, *runs))]
    return unless_failed({"cells": cells, "failed": failed | broken, "pairs": source, "outcome": _against(cells)})


def score_in_rows(
    session: Session, tokenizer: PairTokenizer, pairs: Sequence[Pair], rows: int, *, pad_token_id: int
) -> Scores:
    """Score `pairs` in batches of `rows`, the longest pairs first. Each batch is padded to its longest pair.

    >>> score_in_rows(session, tokenizer, [("Is the sky blue?", "Yes")], 8, pad_token_id=1).shape
    (1,)
    """
    encoded = tokenizer.encode(pairs)
    order = np.argsort(-encoded.lengths, kind="stable")
    scores = np.empty(len(pairs), np.float32)
    for start in range(0, len(order), rows):
        batch = Batch(order[start : start + rows], int(encoded.lengths[order[start]]))
        scores[batch.rows] = session.run(model_inputs(encoded, batch, pad_token_id=pad_token_id))
    return scores


def _open_contestants(check: Check, names: Sequence[str]) -> tuple[dict[str, tuple[Session, GpuModel]], dict[str, str]]:
    """Open every contestant that opens, and say why the others do not. Raises CheckFailed if none does."""
    opened: dict[str, tuple[Session, GpuModel]] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            opened[name] = check.open(name)
        except Exception as error:  # whatever a library raises: it stands in the result, and the others go on
            failed[name] = in_short(f"{type(error).__name__}: {error}")
    if not opened:
        raise CheckFailed(f"nothing could be opened: {failed}")
    return opened, failed


def time_in_turns(
    runs_by_name: Mapping[str, Run], *, runs: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every run, by name, in turns; say why some could not run.

    The order is reversed at each turn.

    >>> seconds, failed = time_in_turns({"ours": lambda: scorer.score(pairs)}, runs=15)
    """
    failed = {}
    for name, run in runs_by_name.items():
        try:
            for _ in range(WARM_UPS):
                run()
        except Exception as error:  # such as too little memory for this batch
            failed[name] = in_short(f"{type(error).__name__}: {error}")
    able = [name for name in runs_by_name if name not in failed]
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for turn in range(runs):
        for name in able if turn % 2 == 0 else reversed(able):
            began = clock()
            runs_by_name[name]()
            seconds[name].append(clock() - began)
    return seconds, failed


def random_batch(check: Check, rows: int, length: int) -> dict[str, Ids]:
    """Make inputs of that shape, without padding. Random tokens: a GPU multiplies equal numbers a little faster.

    >>> random_batch(check, 2, 16)["input_ids"].shape
    (2, 16)
    """
    words, pad_token_id = read_shape(check.bundle)["vocab_size"], open_bundle(check.bundle).manifest.pad_token_id
    ids = np.random.default_rng(0).integers(0, words, (rows, length), dtype=np.int64)
    ids[ids == pad_token_id] = 0 if pad_token_id else 1
    return {**full_batch(rows, length, pad_token_id=pad_token_id), "input_ids": ids}


def _mixed_pairs(check: Check, tokenizer: PairTokenizer) -> tuple[list[Pair], str]:
    """Take the pairs of the benchmarks' workload "bulk", and say where they are from."""
    pairs, source = choose_pool(None, check.data, seed=0, made=check.effort.pool)
    sizes = Sizes(interactive=1, lengths=1, rerank=1, bulk=check.effort.pairs, long=1)
    bulk = next(found for found in make_workloads(pairs, tokenizer, sizes, seed=0) if found.name == "bulk")
    return bulk.pairs, source


def unless_failed(figures: Figures) -> Figures:
    """Return the figures. Raises CheckFailed, with them, if their "failed" names anything.

    >>> unless_failed({"failed": {}})
    {'failed': {}}
    """
    if figures["failed"]:
        raise CheckFailed("; ".join(f"{name}: {reason}" for name, reason in figures["failed"].items()), figures)
    return figures


def _against(cells: Sequence[Figures]) -> str | None:
    """Say how many times as fast the first contestant was as each other."""
    first, *others = cells
    if first["seconds"] is None:
        return None
    times = [f"{one['seconds'] / first['seconds']:.2f} x {one['contestant']}" for one in others if one["seconds"]]
    return f"{first['contestant']}: {first['pairs_per_second']:.0f} pairs/s" + "".join(f", {one}" for one in times)
