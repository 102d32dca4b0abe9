"""Measure parity: how far a bundle's scores are from PyTorch's, and whether they keep the limits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.batching import Padding
from cappy_engine.errors import ExportError, ParityError
from cappy_engine.pairs import Pair
from cappy_engine.ranking import first_best
from cappy_engine.scored import Scored
from cappy_engine.scorer import Scorer
from cappy_export.proof.limits import Limits
from cappy_export.proof.reference import Reference

Scores = npt.NDArray[np.float32]

WORST_PAIRS = 5
SHAPES: Sequence[tuple[int, Padding | None]] = ((1, None), (512, None), (2048, "allowed"))
"""The batches in which parity is measured, by budget of tokens and padding.

One by one; in batches of up to 512 tokens, as the engine makes them on a CPU; and in batches of up to 2,048 tokens
with padding, as GPUs and other tools do.
"""
FIGURES = ("max_error", "relative_error", "spearman", "winner_agreement")
"""What of a report can have a limit."""


def measure(reference: Scores, scores: Scores, pairs: Sequence[Pair], counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Compare `scores` (n,) with `reference` (n,): errors, rank correlation, winners, and the worst pairs.

    >>> measure(reference, scores, pairs, counts)["max_error"]

    Errors are absolute. `relative_error` is their root mean square as a part of the reference's standard deviation, and
    None where that is 0. The rank correlation is Spearman's; `winner_agreement` tells how often the same candidate of
    an instruction wins. `counts` are tokens, for the report. Where a score is NaN, so are all figures that it is part
    of.
    """
    errors = np.abs(scores.astype(np.float64) - reference)
    with np.errstate(invalid="ignore"):  # infinite scores have none
        spread = float(reference.std(dtype=np.float64))
    worst = np.argsort(-np.nan_to_num(errors, nan=np.inf), kind="stable")[:WORST_PAIRS]
    return {
        "max_error": float(errors.max()),
        "mean_error": float(errors.mean()),
        "relative_error": float(np.sqrt(np.square(errors).mean())) / spread if spread else None,
        "spearman": spearman(reference, scores),
        "winner_agreement": winner_agreement(reference, scores, candidate_groups(pairs)),
        "worst": [
            {
                "pair": int(row),
                "error": float(errors[row]),
                "reference": float(reference[row]),
                "score": float(scores[row]),
                "tokens": int(counts[row]),
                "instruction": pairs[row][0][:200],
                "response": pairs[row][1][:200],
            }
            for row in worst
        ],
    }


def describe_pairs(pairs: Sequence[Pair], reference: Reference, name: str) -> dict[str, Any]:
    """Describe the pairs of a proof: their `name`, digest, number, lengths in tokens, and groups.

    >>> describe_pairs(default_pairs(), reference, "default")["count"]
    279
    """
    text = json.dumps(pairs, ensure_ascii=True)
    return {
        "name": name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "count": len(pairs),
        "shortest": int(reference.token_counts.min()),
        "longest": int(reference.token_counts.max()),
        "truncated": int(reference.truncated.sum()),
        "groups": len(candidate_groups(pairs)),
        "score_std": reference.spread,
    }


def score_in_shapes(
    scorer: Scorer, pairs: Sequence[Pair], shapes: Sequence[tuple[int, Padding | None]] = SHAPES
) -> tuple[Scored, int]:
    """Score each pair once, in batches of many shapes; return the scores and the number of distinct shapes.

    >>> scored, shapes = score_in_shapes(scorer, default_pairs())

    The pairs are dealt out in turn among `shapes`: budgets of tokens, and the padding (None: the scorer's own).
    """
    total = Scored(
        scores=np.empty(len(pairs), dtype=np.float32),
        token_counts=np.empty(len(pairs), dtype=np.int64),
        truncated=np.empty(len(pairs), dtype=np.bool_),
    )
    seen: set[tuple[int, int]] = set()
    for place, (budget, padding) in enumerate(shapes):
        rows = list(range(place, len(pairs), len(shapes)))
        scored = scorer.score_pairs([pairs[row] for row in rows], max_batch_tokens=budget, padding=padding)
        total.scores[rows] = scored.scores
        total.token_counts[rows], total.truncated[rows] = scored.token_counts, scored.truncated
        grouping = scorer.dispatcher.grouping.changed(max_batch_tokens=budget, padding=padding)
        batches = scorer.dispatcher.plan(scored.token_counts, grouping).batches
        seen.update((len(batch.rows), batch.length) for batch in batches)
    return total, len(seen)


def require_same_token_counts(scored: Scored, reference: Reference, pairs: Sequence[Pair]) -> None:
    """Raise ExportError unless the engine makes as many tokens of each pair as transformers.

    >>> require_same_token_counts(scored, reference, pairs)
    """
    differs = (scored.token_counts != reference.token_counts) | (scored.truncated != reference.truncated)
    if differs.any():
        row = int(differs.argmax())
        raise ExportError(
            f"the engine tokenises {int(differs.sum())} pairs unlike transformers; the first, {pairs[row]!r:.200}, has "
            f"{scored.token_counts[row]} tokens instead of {reference.token_counts[row]}"
        )


def candidate_groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """List the rows that share an instruction, where there are two or more.

    >>> candidate_groups([("a", "1"), ("b", "1"), ("a", "2")])
    [[0, 2]]
    """
    groups: dict[str, list[int]] = {}
    for row, (instruction, _) in enumerate(pairs):
        groups.setdefault(instruction, []).append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def check_winners(limits: Mapping[str, Limits], pairs: Sequence[Pair]) -> None:
    """Raise ExportError for a limit of winners where no pairs compete.

    >>> check_winners({"fp32": Limits(min_winner_agreement=1.0)}, [("a", "1"), ("a", "2")])
    """
    limited = [name for name, allowed in limits.items() if allowed.min_winner_agreement is not None]
    if limited and not candidate_groups(pairs):
        raise ExportError(
            f"the limit min_winner_agreement of {', '.join(limited)} cannot be checked: each of the {len(pairs)} pairs "
            "has another instruction, so none wins over another; leave it out, or give pairs that share one"
        )


def winner_agreement(reference: Scores, scores: Scores, groups: Sequence[Sequence[int]]) -> float | None:
    """Compute the share of groups in which the same candidate wins; None without groups.

    >>> winner_agreement(np.float32([0.1, 0.9]), np.float32([0.2, 0.8]), [[0, 1]])
    1.0

    The first one wins a tie. It is NaN where a score of the groups is.
    """
    if not groups:
        return None
    if any(_has_nan(reference[rows], scores[rows]) for rows in map(list, groups)):
        return math.nan
    return float(np.mean([first_best(reference[rows]) == first_best(scores[rows]) for rows in map(list, groups)]))


def spearman(first: Scores, second: Scores) -> float:
    """Compute Spearman's rank correlation, ties ranked by their mean.

    >>> spearman(np.float32([1, 2, 3]), np.float32([5, 5, 5]))
    0.0

    It is 0 where all of one side's scores are equal, and NaN where a score is: it has no rank.
    """
    if _has_nan(first, second):
        return math.nan
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def rows_of(parity: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """List target, precision and figures of every model in a parity report.

    >>> rows_of({"precisions": {"fp32": {"max_error": 0.0}}})
    [('cpu', 'fp32', {'max_error': 0.0})]
    """
    targets = {"cpu": parity["precisions"], **parity.get("targets", {})}
    return [(target, precision, row) for target, rows in targets.items() for precision, row in rows.items()]


def all_rows_of(parity: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """List a name, the precision and figures of every measurement, those without kernels too.

    >>> all_rows_of({"precisions": {"fp32": {"max_error": 0.0, "without_kernels": {"max_error": 0.0}}}})[1][0]
    'fp32 without kernels'
    """
    found: list[tuple[str, str, Mapping[str, Any]]] = []
    for target, precision, row in rows_of(parity):
        name = precision if target == "cpu" else f"{precision} of {target}"
        found.append((name, precision, row))
        if "without_kernels" in row:
            found.append((f"{name} without kernels", precision, row["without_kernels"]))
    return found


def violations(parity: Mapping[str, Any], limits: Mapping[str, Limits]) -> list[str]:
    """Say in words which limits the report does not keep. NaN and infinity keep none, not even where there is none.

    >>> violations({"precisions": {"fp32": {"max_error": 0.5}}}, {"fp32": Limits(max_error=1e-4)})
    ['fp32: max error 0.5 is above 0.0001']
    """
    found = []
    for name_of_model, precision, row in all_rows_of(parity):
        allowed = limits[precision]
        if not all(math.isfinite(row[name]) for name in FIGURES if row.get(name) is not None):
            found.append(f"{name_of_model}: a score is not a finite number")
            continue
        for name, limit, is_most in (
            ("max_error", allowed.max_error, True),
            ("relative_error", allowed.max_relative_error, True),
            ("spearman", allowed.min_spearman, False),
            ("winner_agreement", allowed.min_winner_agreement, False),
        ):
            value, said = row[name], f"{name_of_model}: {name.replace('_', ' ')}"
            if limit is None or (name == "relative_error" and value is None):  # PyTorch's scores are all equal
                continue
            if value is None:
                found.append(f"{said} was not measured, and {limit:g} is the limit")
            elif is_most and not value <= limit:
                found.append(f"{said} {value:.3g} is above {limit:g}")
            elif not is_most and not value >= limit:
                found.append(f"{said} {value:.4f} is below {limit:g}")
    return found


def require(parity: Mapping[str, Any], limits: Mapping[str, Limits], subject: str) -> None:
    """Raise ParityError, with the report, if `parity` does not keep `limits`.

    >>> require(parity, LIMITS, "the export of cappy-mini")
    """
    broken = violations(parity, limits)
    if broken:
        raise ParityError(f"the scores of {subject} are too far from PyTorch's: {'; '.join(broken)}", parity)


def _has_nan(*scores: Scores) -> bool:
    return any(bool(np.isnan(each).any()) for each in scores)


def _ranks(values: Scores) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
