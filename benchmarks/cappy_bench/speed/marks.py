"""Holds the values of the report's pictures, and their colours. Knows nothing of how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COLOURS: Mapping[str, tuple[str, str]] = {
    "fp32": ("#0072b2", "#9ccbe8"),
    "int8": ("#d55e00", "#f6bd90"),
    "bf16": ("#009e73", "#93d3bf"),
    "fp16": ("#5a5a5a", "#b8b8b8"),
}
"""Each precision's colour for ours and for the others, which the colour-blind can tell apart too (all three kinds)."""
INK, SOFT, GREY, PALE = "#222222", "#666666", "#8a8a8a", "#e6e6e6"


@dataclass(frozen=True)
class Bar:
    """Useful tokens per second of one runner on one workload.

    `spread` is the slowest and the fastest round.
    """

    workload: str
    runner: str
    precision: str
    is_ours: bool
    tokens_per_second: float
    spread: tuple[float, float]
    is_wrong: bool


@dataclass(frozen=True)
class Line:
    """Median latency of one runner in `milliseconds`, for single pairs of so many `tokens`, ascending."""

    runner: str
    precision: str
    is_ours: bool
    tokens: list[int]
    milliseconds: list[float]


@dataclass(frozen=True)
class Point:
    """One runner's error against the reference, and its useful tokens per second on `bulk`."""

    runner: str
    precision: str
    is_ours: bool
    max_error: float
    tokens_per_second: float


def colour_of(precision: str, is_ours: bool) -> str:
    """Return the colour of a runner: ours is the dark one of its precision.

    >>> colour_of("fp32", is_ours=True)
    '#0072b2'
    """
    return COLOURS[precision][0 if is_ours else 1]
