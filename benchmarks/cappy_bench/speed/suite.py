"""Measures every runner on every workload, in turn, with the parity of its scores.

Runs are interleaved: in each round every workload is scored by all runners one after another, and in the reverse order
in the next round, so that a drift of the machine meets all of them alike. What was measured is written down at once, so
that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cappy_bench.peers.peer import Model, Pair
from cappy_bench.peers.process import RunnerFailed, Start, Worker, last_lines
from cappy_bench.peers.specs import Spec
from cappy_bench.speed.notes import Notes
from cappy_bench.speed.verdicts import Cell, Parity, Reference, good_cells, judge_runner
from cappy_bench.speed.workers import Workers, runner_model
from cappy_bench.speed.workloads import LENGTHS, PROOF, Workload
from cappy_engine.errors import BenchmarkError

REFERENCE = Spec("reference", "reference", "fp32", "PyTorch, eager, one pair at a time", ("torch", "transformers"))

Say = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    A runner that took longer than `max_seconds` for a workload does not repeat it. `reserve_bytes` of memory are kept
    free when a runner is loaded. Scores are compared with those of the model's checkpoint; where it has none,
    `exported` tells the parity of our precisions.
    """

    specs: Sequence[Spec]
    workloads: Sequence[Workload]
    model: Model
    rounds: int
    max_seconds: float
    reserve_bytes: int
    exported: Mapping[str, Parity] = field(default_factory=dict)

    @property
    def timed(self) -> list[Workload]:
        """All workloads but the proof."""
        return [workload for workload in self.workloads if workload.name != PROOF]


def run_suite(
    plan: Plan, *, notes: Path, peak: Callable[[int], dict[str, Any]], start: Start, say: Say = lambda line: None
) -> dict[str, Any]:
    """Measure everything in `plan`, and return the measured parts of a result.

    Measurements that are in `notes` already are not repeated. A runner that cannot run, or whose scores are wrong, is
    part of the result with the reason. Raises BenchmarkError only where the reference itself cannot run.

        >>> run_suite(plan, notes=Path("notes.jsonl"), peak=measure_peak, start=start)["runners"][0]["status"]
        'ok'
    """
    written = Notes(notes)
    reference = _reference(plan, written, start, say)
    for spec in plan.specs:
        if not written.is_good(("prepared", spec.name)):
            written.add(("prepared", spec.name), _prepare(plan, spec, start, reference))
            say(f"{spec.name}: {written.found['prepared', spec.name]['reason'] or 'ready'}")
    able = [spec for spec in plan.specs if written.found["prepared", spec.name]["status"] == "ok"]
    workers = Workers(plan.model, start, warm_up=_warm_up(plan.timed), reserve_bytes=plan.reserve_bytes)
    try:
        for round_, place, workload in _turns(plan):
            if ("peak", str(round_)) not in written.found:
                written.add(("peak", str(round_)), peak(plan.model.threads))
            for spec in able if (round_ + place) % 2 == 0 else reversed(able):
                key = ("cell", str(round_), workload.name, spec.name)
                if not written.is_good(key) and _is_due(plan, written, spec, workload, round_):
                    written.add(key, _cell(workers, spec, workload))
                    say(_progress(plan, round_, workload, spec, written.found[key]))
    finally:
        workers.close()
        for name, seconds in workers.load_seconds.items():
            written.add(("load", name, str(time.time())), {"seconds": seconds})
    return {
        "reference": None if reference is None else REFERENCE.setting,
        "peak": best_peak([written.found["peak", str(round_)] for round_ in range(plan.rounds)]),
        "workloads": [workload.describe() for workload in plan.timed],
        "proof": next((workload.describe() for workload in plan.workloads if workload.name == PROOF), None),
        "runners": [_runner_result(plan, spec, written.found, reference) for spec in plan.specs],
    }


def best_peak(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best of several measurements, by precision, with those of all rounds beside it.

    >>> best_peak([{"fp32": {"flops": 1e11}}, {"fp32": {"flops": 2e11}}])
    {'fp32': {'flops': 200000000000.0, 'rounds': [100000000000.0, 200000000000.0]}}
    """
    return {
        precision: {
            **max((found[precision] for found in rounds), key=lambda best: float(best["flops"])),
            "rounds": [found[precision]["flops"] for found in rounds],
        }
        for precision in rounds[0]
    }


def measure_peak(threads: int) -> dict[str, Any]:
    """Measure the machine's peak in a process of its own. Raises BenchmarkError if that fails.

    >>> measure_peak(2)["fp32"]["how"]
    'PyTorch 2.13.0 mm, 2048 x 2048 x 2048'
    """
    command = [sys.executable, "-P", "-m", "cappy_bench.speed.peak", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603, the command is ours
    if done.returncode:
        raise BenchmarkError(f"the machine's peak cannot be measured: {last_lines(done.stderr)}")
    peak: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peak


def _reference(plan: Plan, notes: Notes, start: Start, say: Say) -> Reference | None:
    """Score all pairs with the checkpoint, if there is one.

    Raises BenchmarkError if a score is not finite, also where the scores are those of earlier notes.
    """
    if plan.model.checkpoint is None:
        return None
    if ("reference",) not in notes.found:
        say("scoring with the reference")
        requests = [workload.pairs for workload in plan.workloads]
        try:
            answer, token_ids = _ask_reference(start(REFERENCE, runner_model(plan.model, REFERENCE)), requests)
        except RunnerFailed as error:
            raise BenchmarkError(f"the checkpoint cannot be scored with PyTorch: {error}") from error
        scores = {workload.name: found for workload, found in zip(plan.workloads, answer, strict=True)}
        if strange := _strange(scores):
            raise BenchmarkError(f"PyTorch itself gives {strange}; measure another checkpoint")
        notes.add(("reference",), {"scores": scores, "token_ids": token_ids})
    reference = Reference(**notes.found["reference",])
    if strange := _strange(reference.scores):
        raise BenchmarkError(f"{notes.path} has for PyTorch a score of {strange}; remove this file and measure again")
    return reference


def _strange(scores: Mapping[str, Sequence[float]]) -> str | None:
    """Say which scores of a reference are not finite; None if all are."""
    strange = [score for found in scores.values() for score in found if not math.isfinite(score)]
    return f"{strange[0]} for {len(strange)} pairs, so there is nothing to compare with" if strange else None


def _ask_reference(worker: Worker, requests: Sequence[Sequence[Pair]]) -> tuple[Any, Any]:
    """Ask for the scores by request, and the token ids of all pairs."""
    try:
        worker.ask({"do": "open"})
        scores = worker.ask({"do": "score", "requests": requests})["scores"]
        pairs = [pair for request in requests for pair in request]
        return scores, worker.ask({"do": "token_ids", "pairs": pairs})["token_ids"]
    finally:
        worker.close()


def _prepare(plan: Plan, spec: Spec, start: Start, reference: Reference | None) -> dict[str, Any]:
    """Convert what the runner needs, and check that it tokenises as the reference does."""
    result: dict[str, Any] = {
        "status": "ok",
        "reason": None,
        "versions": {},
        "settings": {},
        "seconds": None,
    }
    try:
        worker = start(spec, runner_model(plan.model, spec))
    except RunnerFailed as error:
        return {**result, "status": "skipped", "reason": str(error)}
    pairs = [pair for workload in plan.workloads for pair in workload.pairs]
    try:
        result["versions"] = worker.ask({"do": "versions", "packages": list(spec.packages)})["versions"]
        result["seconds"] = worker.ask({"do": "prepare"})["seconds"]
        result["settings"] = worker.ask({"do": "open"}).get("settings", {})
        found = worker.ask({"do": "token_ids", "pairs": pairs})["token_ids"]
    except RunnerFailed as error:
        return {**result, "status": "failed" if result["versions"] else "skipped", "reason": str(error)}
    finally:
        worker.close()
    token_ids = found if reference is None else reference.token_ids
    others = sum(mine != theirs for mine, theirs in zip(found, token_ids, strict=True))
    if others:
        return {**result, "status": "wrong", "reason": f"other token ids than the reference's for {others} pairs"}
    return result


def _turns(plan: Plan) -> Iterator[tuple[int, int, Workload]]:
    """Yield the round, the workload's place in it, and the workload. The proof has its place in round 0 only.

    Round plus place tells the direction, so that it differs between the rounds of a workload, and between the workloads
    of a round.
    """
    for round_ in range(plan.rounds):
        for place, workload in enumerate(plan.workloads if round_ == 0 else plan.timed):
            yield round_, place, workload


def _is_due(plan: Plan, notes: Notes, spec: Spec, workload: Workload, round_: int) -> bool:
    """True in round 0; later, if the runner did this workload in round 0, and fast enough to repeat it."""
    if round_ == 0:
        return True
    first = notes.found["cell", "0", workload.name, spec.name]
    return bool(first["status"] == "ok" and sum(first["seconds"]) <= plan.max_seconds)


def _cell(workers: Workers, spec: Spec, workload: Workload) -> Cell:
    try:
        return {"status": "ok", **workers.get(spec).ask({"do": "score", "requests": workload.requests})}
    except RunnerFailed as error:
        workers.drop(spec)
        return {"status": "failed", "reason": str(error)}


def _warm_up(workloads: Sequence[Workload]) -> list[Pair]:
    """Take one pair near each of LENGTHS, for runners to meet before they are timed."""
    pairs = [pair for workload in workloads for pair in workload.pairs]
    counts = np.concatenate([workload.token_counts for workload in workloads])
    return [pairs[int(np.abs(counts - length).argmin())] for length in LENGTHS]


def _progress(plan: Plan, round_: int, workload: Workload, spec: Spec, cell: Cell) -> str:
    outcome = f"{sum(cell['seconds']):.2f} s" if cell["status"] == "ok" else cell["reason"]
    return f"round {round_ + 1} of {plan.rounds}, {workload.name}, {spec.name}: {outcome}"


def _runner_result(
    plan: Plan, spec: Spec, found: Mapping[tuple[str, ...], Any], reference: Reference | None
) -> dict[str, Any]:
    prepared = found["prepared", spec.name]
    cells = {workload.name: _rounds(plan, spec, workload, found) for workload in plan.workloads}
    status, reason, parity = prepared["status"], prepared["reason"], None
    if status == "ok":
        verdict = judge_runner(spec, plan.workloads, cells, reference, plan.exported)
        status, reason, parity = verdict.status, verdict.reason, verdict.parity
    loads = [value["seconds"] for key, value in found.items() if key[:2] == ("load", spec.name)]
    return {
        "name": spec.name,
        "precision": spec.precision,
        "is_ours": spec.is_ours,
        "setting": spec.setting,
        "environment": spec.environment,
        "versions": prepared["versions"],
        "settings": prepared["settings"],
        "status": status,
        "reason": reason,
        "prepare_seconds": prepared["seconds"],
        "load_seconds": [second for seconds in loads for second in seconds],
        "parity": parity,
        "cells": [_cell_result(workload, cells[workload.name]) for workload in plan.timed],
    }


def _rounds(plan: Plan, spec: Spec, workload: Workload, found: Mapping[tuple[str, ...], Any]) -> list[Cell]:
    keys = [("cell", str(round_), workload.name, spec.name) for round_ in range(plan.rounds)]
    return [found[key] for key in keys if key in found]


def _cell_result(workload: Workload, cells: Sequence[Cell]) -> dict[str, Any]:
    """Describe one runner on one workload: `seconds` of every request in every round."""
    good = good_cells(cells)
    bad = [cell for cell in cells if cell["status"] != "ok"]
    return {
        "workload": workload.name,
        "status": bad[0]["status"] if bad else "ok" if good else "not run",
        "reason": bad[0]["reason"] if bad else None,
        "seconds": [cell["seconds"] for cell in good],
        "computed_tokens": good[0]["computed_tokens"] if good else None,
        "peak_bytes": max((cell["peak_bytes"] for cell in good), default=None),
    }
