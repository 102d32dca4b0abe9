"""Check a device with the canary: a few pairs with PyTorch's scores, which it must get right before it serves.

A driver, a library or an engine can be wrong in ways that no error tells; a score that is off does. The bundle carries
the pairs as tokens, so that this needs no tokenizer (whose file has a digest of its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.batching import Batch, EncodedPairs, Scores
from cappy_engine.errors import BundleError, DeviceUnavailable
from cappy_engine.inputs import model_inputs
from cappy_engine.json_values import size, whole
from cappy_engine.session import Session


@dataclass(frozen=True)
class Canary:
    """`scores` (n,) float32 are PyTorch's of the n `pairs`; `tolerance` is the largest difference that is accepted."""

    pairs: EncodedPairs
    scores: Scores
    tolerance: float

    def compare(self, scores: Scores, rows: npt.NDArray[np.int64] | None = None) -> tuple[float, str]:
        """Compare scores of all pairs, or of those at `rows`, with PyTorch's.

        Returns the largest difference, and what is wrong if that is above the tolerance or not a number, else "".
        """
        expected = self.scores if rows is None else self.scores[rows]
        errors = np.abs(scores.astype(np.float64) - expected)
        worst = int(errors.argmax())  # the first NaN, if there is one
        if errors[worst] <= self.tolerance:
            return float(errors[worst]), ""
        return float(errors[worst]), (
            f"wrong scores: {scores[worst]:.5f} for a pair of the bundle whose score is {expected[worst]:.5f}, and "
            f"{self.tolerance:g} is allowed"
        )


def read_canary(document: Mapping[str, Any], device: str, precision: str) -> Canary:
    """Read the canary of a manifest for one of its models. Raises BundleError where there is none."""
    try:
        canary = document["canary"]
        token_ids = [np.array(pair["input_ids"], dtype=np.int64) for pair in canary["pairs"]]
        type_ids = [np.array(pair["token_type_ids"], dtype=np.int64) for pair in canary["pairs"]]
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        found = Canary(
            EncodedPairs(token_ids, type_ids, lengths, np.zeros(len(lengths), dtype=np.bool_)),
            np.array([pair["score"] for pair in canary["pairs"]], dtype=np.float32),
            size(canary["tolerance"][device][precision]),
        )
        most = whole(document["model"]["max_length"])
        for ids, types in zip(token_ids, type_ids, strict=True):
            if ids.ndim != 1 or ids.shape != types.shape or (ids < 0).any() or not 0 < len(ids) <= most:
                raise ValueError(f"its pairs are not lists of 1 to {most} tokens")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(
            f"the bundle has no canary for {precision} on {device} ({error!r}), so nothing could tell whether its "
            f"scores are right there; export it again with --target {device}"
        ) from error
    if not len(found.scores) or not found.tolerance > 0 or not np.isfinite(found.scores).all():
        raise BundleError(f"the bundle's canary for {precision} on {device} is empty or not a number; export it again")
    return found


def check_canary(session: Session, canary: Canary, batches: Sequence[Batch], *, pad_token_id: int) -> float:
    """Score the canary in `batches`, which may hold a pair several times; returns the largest difference from PyTorch.

    Raises DeviceUnavailable if it is above the canary's tolerance, or a score is not a number, and ScoringError.
    """
    largest = 0.0
    for batch in batches:
        scores = session.run(model_inputs(canary.pairs, batch, pad_token_id=pad_token_id))
        error, wrong = canary.compare(scores, batch.rows)
        if wrong:
            raise DeviceUnavailable(
                f"device {session.device!r} gives {wrong}, at {len(batch.rows)} x {batch.length} tokens; nothing was "
                "scored. Run 'cappy doctor', and use device='cpu' until this is mended"
            )
        largest = max(largest, error)
    return largest
