"""Say how far a bundle's scores may be from PyTorch's. Knows nothing of models, so that a command can read it fast."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cappy_engine.errors import ExportError


@dataclass(frozen=True)
class Limits:
    """Say what a precision must keep; None is not checked.

    `max_error` is in units of the score. `max_relative_error` is the root mean square of the errors, as a part of the
    standard deviation of PyTorch's scores.
    """

    max_error: float | None = None
    max_relative_error: float | None = None
    min_spearman: float | None = None
    min_winner_agreement: float | None = None


BOUNDS: Mapping[str, tuple[float, float, str]] = {
    "max_error": (0.0, sys.float_info.max, "0 or more, and finite"),
    "max_relative_error": (0.0, sys.float_info.max, "0 or more, and finite"),
    "min_spearman": (-1.0, 1.0, "-1 to 1"),
    "min_winner_agreement": (0.0, 1.0, "0 to 1"),
}
"""What a limit may be: the least, the most, and how to say it. Beyond, no scores would keep it, or any would."""

LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(max_error=1e-4, max_relative_error=0.1),
    "fp16": Limits(max_error=5e-3, max_relative_error=0.1),
    "bf16": Limits(max_relative_error=0.1, min_spearman=0.995),
    "int8": Limits(max_relative_error=0.25, min_spearman=0.97),
}
"""The default limits for scores whose standard deviation is at most 1; `default_limits` has them for any spread.

fp32 and fp16 differ from PyTorch by rounding only, which grows with the size of the numbers. Int8's errors grow with
the spread of the weights too, so no absolute bound fits all checkpoints. Classification and re-ranking need the *order*
of the scores. But a rank correlation does not see scores that are all doubled or shifted, nor a few that are far off.
The relative error does. A relative error e of independent errors makes a correlation of 1 / sqrt(1 + e ** 2): 0.970 of
0.25, and 0.995 of 0.1. In fp32 and fp16 it judges scores that vary little, of which any are within the max error.

Rank correlation was 0.98 and more for all exports that were measured, on random and on trained weights (docs/export.md,
docs/gpu.md). It was 0.84 to 0.96 on trained weights for the coarsest quantisation, per tensor in 7 bits. bf16 keeps 8
bits of each factor: 0.99996 on cappy-mini. PyTorch's own bfloat16, which also rounds sums, had 0.9948 to 0.9978 on
random weights of cappy-large's size (docs/benchmarks.md). On cappy-mini fp32 takes a hundredth of its limit, and fp16
on a GPU a quarter. Random weights of cappy-large's size are beyond the limit of fp16, with 5.4e-3 on a CPU. PyTorch's
own fp16 has 6.1e-3 there (docs/gpu.md).
"""


def default_limits(spread: float) -> dict[str, Limits]:
    """Give the limits for scores with the standard deviation `spread`: LIMITS, with larger errors where it is above 1.

    >>> default_limits(50.0)["fp32"].max_error
    0.005
    """
    factor = max(1.0, float(spread))
    return {
        precision: dataclasses.replace(limits, max_error=limits.max_error and limits.max_error * factor)
        for precision, limits in LIMITS.items()
    }


def parse_limits(texts: Sequence[str], *, spread: float = 1.0) -> dict[str, Limits]:
    """Read limits such as "int8.min_spearman=0.99", on top of `default_limits(spread)`.

    >>> parse_limits(["int8.max_error=0.1"])["int8"]
    Limits(max_error=0.1, min_spearman=0.97, min_winner_agreement=None)

    A limit that was asked for is taken as it is, whatever the spread. Raises ExportError for a text of another form,
    and ValueError for a value out of `BOUNDS`; both show the text.
    """
    parsed = default_limits(spread)
    for text in texts:
        key, _, value = text.partition("=")
        precision, _, name = key.partition(".")
        try:
            if precision not in LIMITS or name not in BOUNDS:
                raise ValueError
            limit = float(value)
        except ValueError as error:
            raise ExportError(
                f"limit {text!r} is not PRECISION.NAME=VALUE with a precision of {', '.join(LIMITS)} and a name of "
                f"{', '.join(BOUNDS)}"
            ) from error
        least, most, bounds = BOUNDS[name]
        if not least <= limit <= most:  # as nan is not, either
            raise ValueError(f"limit {text!r}: {name} must be {bounds}, got {value}")
        parsed[precision] = dataclasses.replace(parsed[precision], **{name: limit})
    return parsed


def check_measured(texts: Sequence[str], measured: Collection[str]) -> None:
    """Raise ExportError for a limit of a precision that is not among the `measured` ones.

    >>> check_measured(["int8.max_error=0.1"], ["fp32", "int8"])
    """
    for text in texts:
        if text.partition(".")[0] not in measured:
            names = ", ".join(precision for precision in LIMITS if precision in measured)
            raise ExportError(f"limit {text!r} changes nothing: measured are {names}")
