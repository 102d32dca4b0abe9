"""Choose how a scorer uses the cores: which sessions are open, and how large a batch is.

One pair alone is fastest with all threads on it (the "wide" session). Many batches are fastest with one thread each and
as many callers as cores (the "narrow" session): no thread waits for another inside a layer. A session is a copy of the
weights. So both are opened for small models only, the second when it is first needed; a large model has the wide
session alone. `cappy tune` measures instead of assuming (`tuned.py` keeps its answer).
"""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("latency", "throughput", "both")
"""latency: the wide session only; throughput: the narrow one only; both: each for what it does best."""
SMALL_MODEL_BYTES = 2**29
"""Models up to this size (cappy-large's int8 has 389 MB) are held twice once there are several batches to run."""
BATCH_TOKENS = 512
"""Default `max_batch_tokens` on a CPU: larger batches win nothing and wait longer for each other."""


@dataclass(frozen=True)
class Execution:
    """`mode` is one of MODES; `reason` says where it comes from."""

    mode: str
    max_batch_tokens: int
    reason: str


def choose_execution(
    mode: str, *, threads: int, model_bytes: int, tuned: Execution | None, max_batch_tokens: int | None
) -> Execution:
    """Choose how to run on a CPU: as asked for, else as `cappy tune` found, else by the model's size.

    With one thread there is one session, whatever the mode: it is called "latency".

        >>> choose_execution("auto", threads=4, model_bytes=10**9, tuned=None, max_batch_tokens=None).mode
        'latency'
    """
    budget = max_batch_tokens or (tuned.max_batch_tokens if tuned else BATCH_TOKENS)
    if threads == 1:
        return Execution("latency", budget, "one session")
    if mode != "auto":
        return Execution(mode, budget, "asked for")
    if tuned is not None:
        return Execution(tuned.mode, budget, "measured by cappy tune")
    if model_bytes <= SMALL_MODEL_BYTES:
        return Execution("both", budget, "auto: a small model is held twice")
    return Execution("latency", budget, "auto: a large model is held once")
