"""The measurement: every runner on every workload, in turn, round after round, with the parity of what it answered.

Runs are interleaved: in each round every workload is scored by all runners one after another, in the reverse order
in the next round, so that a drift of the machine meets all of them alike. All runners stay loaded as long as memory
allows; else the one unused for longest is ended, and started again at its next turn. What was measured is written down
at once, so that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cappy_bench.machine import available_bytes
from cappy_bench.peers import Spec
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.process import RunnerFailed, Worker, start_worker
from cappy_bench.speed.workloads import LENGTHS, Workload
from cappy_export.proof.limits import LIMITS
from cappy_export.proof.parity import measure

REFERENCE = Spec("reference", "reference", "fp32", "PyTorch, eager, one pair at a time", ("torch", "transformers"))

Start = Callable[[Spec, Model], Worker]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure. A runner that took longer than `max_seconds` for a workload does not repeat it.

    `reserve_bytes` of memory are kept free when a runner is loaded.
    """

    specs: Sequence[Spec]
    workloads: Sequence[Workload]
    model: Model
    rounds: int
    max_seconds: float
    reserve_bytes: int


class Workers:
    """The loaded runners: as many as fit into memory."""

    def __init__(self, plan: Plan, start: Start, warm_up: Sequence[tuple[str, str]]) -> None:
        self._plan, self._start, self._warm_up = plan, start, warm_up
        self._open: dict[str, Worker] = {}  # least recently used first
        self.load_seconds: dict[str, list[float]] = {}

    def get(self, spec: Spec) -> Worker:
        """The runner, loaded and warm. Raises RunnerFailed."""
        if spec.name in self._open:
            self._open[spec.name] = self._open.pop(spec.name)
            return self._open[spec.name]
        while self._open and available_bytes() < self._plan.reserve_bytes:
            self._open.pop(next(iter(self._open))).close()
        started = time.perf_counter()
        worker = self._start(spec, runner_model(self._plan.model, spec))
        try:
            worker.ask({"do": "open"})
            self.load_seconds.setdefault(spec.name, []).append(time.perf_counter() - started)
            requests = [*([pair] for pair in self._warm_up), self._warm_up]  # one by one, and all at once
            worker.ask({"do": "score", "requests": requests, "pad_to": None})
        except RunnerFailed:
            worker.close()
            raise
        self._open[spec.name] = worker
        return worker

    def drop(self, spec: Spec) -> None:
        """End a runner that failed."""
        if spec.name in self._open:
            self._open.pop(spec.name).close()

    def close(self) -> None:
        """End all runners."""
        while self._open:
            self._open.popitem()[1].close()


def runner_model(model: Model, spec: Spec) -> Model:
    """The model, with a folder of the runner's own: runners of one module share what they convert."""
    folder = model.folder / Path(spec.module).stem
    folder.mkdir(parents=True, exist_ok=True)
    return Model(model.checkpoint, model.bundle, folder, model.threads, model.max_length)


def run_suite(
    plan: Plan,
    *,
    notes: Path,
    peak: Callable[[int], dict[str, Any]],
    start: Start = start_worker,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure everything in `plan`, going on from `notes`; returns the parts of a result that were measured.

    A runner that cannot run, or answers other scores than the reference's, stays in the result with the reason; it
    raises nothing.
    """
    written = Notes(notes)
    reference = _reference(plan, written, start, say)
    for spec in plan.specs:
        if not written.is_good(("prepared", spec.name)):
            prepared = _prepare(plan, spec, start, reference["token_ids"])
            written.add(("prepared", spec.name), prepared)
            say(f"{spec.name}: {prepared['reason'] or 'ready'}")
    able = [spec for spec in plan.specs if written.found["prepared", spec.name]["status"] == "ok"]
    workers = Workers(plan, start, _warm_up(plan.workloads))
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
        "peak": best_peak([written.found["peak", str(round_)] for round_ in range(plan.rounds)]),
        "workloads": [workload.describe() for workload in plan.workloads],
        "runners": [_runner_result(plan, spec, written.found, reference["scores"]) for spec in plan.specs],
    }


class Notes:
    """What was measured so far, one JSON line each, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.found: dict[tuple[str, ...], dict[str, Any]] = {}
        self._path = path
        if path.exists():
            *lines, _ = path.read_text(encoding="utf-8").split("\n")  # a last line without its end was never finished
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            for line in lines:
                entry = json.loads(line)
                self.found[tuple(entry["key"])] = entry["value"]

    def is_good(self, key: tuple[str, ...]) -> bool:
        """Whether there is an entry that needs no other try: what failed is tried again when a run is resumed."""
        return key in self.found and self.found[key]["status"] not in ("failed", "skipped", "wrong")

    def add(self, key: tuple[str, ...], value: dict[str, Any]) -> None:
        """Keep `value` under `key`."""
        self.found[key] = value
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")


def best_peak(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best of several measurements, by precision, with those of all rounds beside it."""
    return {
        precision: {
            **max((found[precision] for found in rounds), key=lambda best: float(best["flops"])),
            "rounds": [found[precision]["flops"] for found in rounds],
        }
        for precision in rounds[0]
    }


def measure_peak(threads: int) -> dict[str, Any]:
    """The machine's peak, measured in a process of its own (`cappy_bench.speed.peak`)."""
    command = [sys.executable, "-m", "cappy_bench.speed.peak", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603, the command is ours
    peak: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peak


def judge(precision: str, parity: Mapping[str, Any]) -> str | None:
    """Why scores with this parity are wrong at `precision`, by the limits of our own bundles; None if they are not."""
    limits = LIMITS[precision]
    if limits.max_error is not None and parity["max_error"] > limits.max_error:
        return f"max error {parity['max_error']:.2g}, limit {limits.max_error:g}"
    if limits.min_spearman is not None and parity["spearman"] < limits.min_spearman:
        return f"Spearman {parity['spearman']:.3f}, limit {limits.min_spearman:g}"
    return None


def _reference(plan: Plan, notes: Notes, start: Start, say: Callable[[str], None]) -> dict[str, Any]:
    if ("reference",) not in notes.found:
        say("scoring with the reference")
        worker = start(REFERENCE, runner_model(plan.model, REFERENCE))
        try:
            worker.ask({"do": "open"})
            requests = [workload.pairs for workload in plan.workloads]
            answer = worker.ask({"do": "score", "requests": requests, "pad_to": None})
            token_ids = worker.ask({"do": "token_ids", "pairs": [pair for pairs in requests for pair in pairs]})
        finally:
            worker.close()
        scores = {workload.name: found for workload, found in zip(plan.workloads, answer["scores"], strict=True)}
        notes.add(("reference",), {"scores": scores, "token_ids": token_ids["token_ids"]})
    return notes.found["reference",]


def _prepare(plan: Plan, spec: Spec, start: Start, token_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Convert what the runner needs, and check that it tokenises as the reference does."""
    result: dict[str, Any] = {"status": "ok", "reason": None, "versions": {}, "seconds": None}
    try:
        worker = start(spec, runner_model(plan.model, spec))
    except RunnerFailed as error:
        return {**result, "status": "skipped", "reason": str(error)}
    try:
        result["versions"] = worker.ask({"do": "versions", "packages": list(spec.packages)})["versions"]
    except RunnerFailed as error:
        worker.close()
        return {**result, "status": "skipped", "reason": str(error)}
    try:
        result["seconds"] = worker.ask({"do": "prepare"})["seconds"]
        worker.ask({"do": "open"})
        pairs = [pair for workload in plan.workloads for pair in workload.pairs]
        found = worker.ask({"do": "token_ids", "pairs": pairs})["token_ids"]
    except RunnerFailed as error:
        return {**result, "status": "failed", "reason": str(error)}
    finally:
        worker.close()
    others = sum(mine != theirs for mine, theirs in zip(found, token_ids, strict=True))
    if others:
        return {**result, "status": "wrong", "reason": f"other token ids than the reference's for {others} pairs"}
    return result


def _turns(plan: Plan) -> Iterator[tuple[int, int, Workload]]:
    """Round, place of the workload in it, workload: round plus place tells the direction, which so differs between the
    rounds of a workload as well as between the workloads of a round."""
    for round_ in range(plan.rounds):
        for place, workload in enumerate(plan.workloads):
            yield round_, place, workload


def _is_due(plan: Plan, notes: Notes, spec: Spec, workload: Workload, round_: int) -> bool:
    """Whether the runner did this workload before without failing, and fast enough to repeat it."""
    if round_ == 0:
        return True
    first = notes.found["cell", "0", workload.name, spec.name]
    return bool(first["status"] == "ok" and sum(first["seconds"]) <= plan.max_seconds)


def _cell(workers: Workers, spec: Spec, workload: Workload) -> Cell:
    if workload.pad_to is not None and not spec.can_pad:
        return {"status": "unable", "reason": "cannot be made to pad to one length"}
    message = {"do": "score", "requests": workload.requests, "pad_to": workload.pad_to}
    try:
        return {"status": "ok", **workers.get(spec).ask(message)}
    except RunnerFailed as error:
        workers.drop(spec)
        return {"status": "failed", "reason": str(error)}


def _warm_up(workloads: Sequence[Workload]) -> list[tuple[str, str]]:
    """One pair near each of LENGTHS, so that every runner has met short and long ones before it is timed."""
    pairs = [pair for workload in workloads for pair in workload.pairs]
    counts = np.concatenate([workload.token_counts for workload in workloads])
    return [pairs[int(np.abs(counts - length).argmin())] for length in LENGTHS]


def _progress(plan: Plan, round_: int, workload: Workload, spec: Spec, cell: Cell) -> str:
    outcome = f"{sum(cell['seconds']):.2f} s" if cell["status"] == "ok" else cell["reason"]
    return f"round {round_ + 1} of {plan.rounds}, {workload.name}, {spec.name}: {outcome}"


def _runner_result(
    plan: Plan, spec: Spec, found: Mapping[tuple[str, ...], Any], reference: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    prepared = found["prepared", spec.name]
    cells = {workload.name: _rounds(plan, spec, workload, found) for workload in plan.workloads}
    status, reason, parity = prepared["status"], prepared["reason"], None
    if status == "ok":
        status, reason, parity = _verdict(plan, spec, cells, reference)
    loads = [value["seconds"] for key, value in found.items() if key[:2] == ("load", spec.name)]
    return {
        "name": spec.name,
        "precision": spec.precision,
        "is_ours": spec.is_ours,
        "setting": spec.setting,
        "environment": spec.environment,
        "versions": prepared["versions"],
        "status": status,
        "reason": reason,
        "prepare_seconds": prepared["seconds"],
        "load_seconds": [second for seconds in loads for second in seconds],
        "parity": parity,
        "cells": [_cell_result(workload, cells[workload.name]) for workload in plan.workloads],
    }


def _rounds(plan: Plan, spec: Spec, workload: Workload, found: Mapping[tuple[str, ...], Any]) -> list[Cell]:
    keys = [("cell", str(round_), workload.name, spec.name) for round_ in range(plan.rounds)]
    return [found[key] for key in keys if key in found]


def _verdict(
    plan: Plan, spec: Spec, cells: Mapping[str, Sequence[Cell]], reference: Mapping[str, Sequence[float]]
) -> tuple[str, str | None, dict[str, Any] | None]:
    """Status, reason and parity of a runner over all its scores: one wrong score anywhere makes all of it wrong."""
    scored = [workload for workload in plan.workloads if _good(cells[workload.name])]
    if not scored:
        reasons = [cell["reason"] for rounds in cells.values() for cell in rounds if cell["status"] == "failed"]
        return "failed", reasons[0] if reasons else "no workload could be run", None
    for workload in scored:
        for cell in _good(cells[workload.name]):
            counts = [len(scores) for scores in cell["scores"]]
            if counts != [len(request) for request in workload.requests]:
                return "wrong", f"{sum(counts)} scores for {len(workload.pairs)} pairs of {workload.name}", None
    scores = np.concatenate(
        [worst_scores(_good(cells[workload.name]), reference[workload.name]) for workload in scored]
    )
    if not np.isfinite(scores).all():
        return "wrong", f"{int((~np.isfinite(scores)).sum())} scores are no numbers", None
    parity = _parity(scored, scores, reference)
    reason = judge(spec.precision, parity)
    return "wrong" if reason else "ok", reason, parity


def worst_scores(rounds: Sequence[Cell], reference: Sequence[float]) -> Scores:
    """For each pair (n,) float32 the score, of all rounds, that is farthest from the reference's; NaN is farthest."""
    scores = np.array([[score for request in cell["scores"] for score in request] for cell in rounds], dtype=np.float64)
    errors = np.abs(scores - np.array(reference))
    farthest = np.where(np.isnan(errors), np.inf, errors).argmax(axis=0)
    found: Scores = scores[farthest, np.arange(scores.shape[1])].astype(np.float32)
    return found


def _parity(workloads: Sequence[Workload], scores: Scores, reference: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    expected = np.concatenate([np.array(reference[workload.name], dtype=np.float32) for workload in workloads])
    counts = np.concatenate([workload.token_counts for workload in workloads])
    pairs = [pair for workload in workloads for pair in workload.pairs]
    measured = measure(expected, scores, pairs, counts)
    del measured["worst"]
    return {**measured, "pairs": len(pairs)}


def _good(rounds: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in rounds if cell["status"] == "ok"]


def _cell_result(workload: Workload, cells: Sequence[Cell]) -> dict[str, Any]:
    """One runner on one workload: `seconds` of every request in every round."""
    good = _good(cells)
    bad = [cell for cell in cells if cell["status"] != "ok"]
    return {
        "workload": workload.name,
        "status": bad[0]["status"] if bad else "ok" if good else "not run",
        "reason": bad[0]["reason"] if bad else None,
        "seconds": [cell["seconds"] for cell in good],
        "computed_tokens": good[0]["computed_tokens"] if good else None,
        "peak_bytes": max((cell["peak_bytes"] for cell in good), default=None),
    }
