"""Choose the canary: a few pairs, carried by the bundle, on which a GPU or a server proves itself.

They are read by `cappy_engine.canary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.bundle import open_bundle
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.limits import Limits
from cappy_export.proof.parity import Scores
from cappy_export.proof.proving import Proof

CANARY_PAIRS = 8


def make_canary(staging: Path, parity: Mapping[str, Any], proof: Proof) -> dict[str, Any]:
    """Make the manifest's "canary": pairs with PyTorch's scores, and how far a model's may be from them.

    >>> make_canary(staging, parity, proof)["tolerance"]
    {'cpu': {'fp32': 0.0001}, 'cuda': {'fp16': 0.005}}
    """
    manifest = open_bundle(staging).manifest
    rows = canary_rows(proof.reference.scores, proof.reference.token_counts)
    encoder = PairTokenizer.from_file(staging / "tokenizer.json", max_length=manifest.max_length)
    encoded = encoder.encode([proof.pairs[row] for row in rows])
    return {
        "tolerance": {
            target: {
                precision: canary_tolerance(row, proof.limits[precision], proof.reference.spread)
                for precision, row in measured.items()
            }
            for target, measured in {"cpu": parity["precisions"], **parity.get("targets", {})}.items()
        },
        "pairs": [
            {
                "input_ids": encoded.token_ids[place].tolist(),
                "token_type_ids": encoded.type_ids[place].tolist(),
                "score": float(proof.reference.scores[row]),
            }
            for place, row in enumerate(rows)
        ],
    }


def canary_rows(scores: Scores, counts: npt.NDArray[np.int64]) -> list[int]:
    """Choose the rows of CANARY_PAIRS pairs, from the lowest score to the highest.

    >>> canary_rows(np.float32([0.1, 0.9, 0.5]), np.array([5, 5, 80]))
    [0, 1, 2]

    They are pairs up to the median length, and the longest one: together they are fast, and show long shapes too.
    """
    short = np.flatnonzero(counts <= np.median(counts))
    by_score = short[np.argsort(scores[short], kind="stable")]
    places = np.linspace(0, len(by_score) - 1, min(CANARY_PAIRS - 1, len(by_score))).round().astype(int)
    return list(dict.fromkeys([*by_score[places].tolist(), int(counts.argmax())]))


def canary_tolerance(row: Mapping[str, Any], limits: Limits, spread: float) -> float:
    """Say how far a score may be from PyTorch's: the absolute limit, else twice the largest measured error.

        >>> canary_tolerance({"max_error": 0.02}, Limits(min_spearman=0.97), spread=0.35)
        0.04

    A bundle runs with kernels and without, so the larger of the two errors counts. It is at least a thousandth, or that
    of the scores' standard deviation `spread`, where that is less than 1: another CPU rounds otherwise.
    """
    if limits.max_error:  # a canary that tolerates nothing would be none
        return limits.max_error
    return max(
        1e-3 * min(1.0, spread), *(2 * float(each["max_error"]) for each in (row, row.get("without_kernels", row)))
    )
