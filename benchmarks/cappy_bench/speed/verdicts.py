"""Judges runners by their scores: one wrong score anywhere makes a runner wrong.

A wrong runner has no speed. Pure: the measured cells in, the entries of a result's `runners` out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cappy_bench.peers.peer import Scores
from cappy_bench.peers.specs import Spec
from cappy_bench.speed.markdown import beside
from cappy_bench.speed.workloads import PROOF, Workload
from cappy_export.proof.limits import default_limits
from cappy_export.proof.parity import measure

Cell = dict[str, Any]
Parity = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """The scores to compare with, and the token ids that they come from.

    `scores` has a list for each workload, `token_ids` one for each pair of all workloads.
    """

    scores: Mapping[str, Sequence[float]]
    token_ids: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Verdict:
    """A runner's `status` (ok, wrong or failed), its `reason`, and its parity, if known."""

    status: str
    reason: str | None = None
    parity: Parity | None = None


def judge_runner(
    spec: Spec,
    workloads: Sequence[Workload],
    cells: Mapping[str, Sequence[Cell]],
    reference: Reference | None,
    exported: Mapping[str, Parity],
) -> Verdict:
    """Judge all scores of a runner: `cells` has those of every round, by workload.

    Without a reference the parity is the one that was measured at the export, by precision (`exported`); that all
    scores are there, and are numbers, is checked all the same.

        >>> judge_runner(spec, workloads, {"bulk": [{"status": "failed", "reason": "no memory"}]}, reference, {})
        Verdict(status='failed', reason='no memory', parity=None)
    """
    scored = [workload for workload in workloads if good_cells(cells[workload.name])]
    if not scored:
        reasons = [cell["reason"] for rounds in cells.values() for cell in rounds if cell["status"] == "failed"]
        return Verdict("failed", reasons[0] if reasons else "no workload could be run")
    if PROOF in cells and not good_cells(cells[PROOF]):
        return Verdict("failed", f"the proof's pairs were not scored: {cells[PROOF][0]['reason']}")
    for workload in scored:
        for cell in good_cells(cells[workload.name]):
            counts = [len(scores) for scores in cell["scores"]]
            if counts != [len(request) for request in workload.requests]:
                return Verdict("wrong", f"{sum(counts)} scores for {len(workload.pairs)} pairs of {workload.name}")
    found = {workload.name: _all_scores(good_cells(cells[workload.name])) for workload in scored}
    strange = sum(int((~np.isfinite(rounds)).any(axis=0).sum()) for rounds in found.values())
    if strange:
        return Verdict("wrong", f"{strange} scores are not numbers")
    if reference is None:
        return Verdict("ok", parity=exported.get(spec.precision))
    spread = float(np.std(np.concatenate([reference.scores[workload.name] for workload in scored])))
    parity = _parity(scored, found, reference)
    reason = _judge_parity(spec.precision, parity, spread=spread)
    return Verdict("wrong" if reason else "ok", reason, parity)


def _judge_parity(precision: str, parity: Parity, *, spread: float) -> str | None:
    """Say why scores with this parity are wrong, by the limits of our bundles.

    They are for scores of this `spread`. NaN breaks every limit. That of the relative error is left out: the tools of
    the published tables were judged before there was one.
    """
    limits = default_limits(spread)[precision]
    if limits.max_error is not None and not parity["max_error"] <= limits.max_error:
        return f"max error {beside(parity['max_error'], limits.max_error, '2g')}, limit {limits.max_error:g}"
    if limits.min_spearman is not None and not parity["spearman"] >= limits.min_spearman:
        return f"Spearman {beside(parity['spearman'], limits.min_spearman, '3f')}, limit {limits.min_spearman:g}"
    return None


def good_cells(rounds: Sequence[Cell]) -> list[Cell]:
    """The rounds in which the runner answered.

    >>> good_cells([{"status": "ok"}, {"status": "failed"}])
    [{'status': 'ok'}]
    """
    return [cell for cell in rounds if cell["status"] == "ok"]


def _all_scores(rounds: Sequence[Cell]) -> Scores:
    """Gather the scores, (rounds, pairs) float32."""
    rows = [[score for request in cell["scores"] for score in request] for cell in rounds]
    return np.array(rows, dtype=np.float32)


def _parity(workloads: Sequence[Workload], found: Mapping[str, Scores], reference: Reference) -> dict[str, Any]:
    """Measure the distance from the reference, for each pair in its farthest round."""
    expected = {workload.name: np.array(reference.scores[workload.name], np.float32) for workload in workloads}
    pairs = [pair for workload in workloads for pair in workload.pairs]
    measured = measure(
        np.concatenate(list(expected.values())),
        np.concatenate([_farthest(found[name], scores) for name, scores in expected.items()]),
        pairs,
        np.concatenate([workload.token_counts for workload in workloads]),
    )
    del measured["worst"]
    return {**measured, "pairs": len(pairs)}


def _farthest(rounds: Scores, expected: Scores) -> Scores:
    rows = np.abs(rounds.astype(np.float64) - expected).argmax(axis=0)
    found: Scores = rounds[rows, np.arange(rounds.shape[1])]
    return found
