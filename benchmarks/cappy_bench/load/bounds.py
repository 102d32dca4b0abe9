"""Says whether a server kept what ours promises under load. Pure: a server's result in, a list of verdicts out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNLOADED_TIMES = 5
REFUSAL_MS = 20.0
LEAST_RATIO = 0.95
OVERHEAD_MS = 1.5
FLAT_BYTES_PER_MINUTE = 1_000_000
"""More is growth. What is below is the noise of samples: pages that come and go with the size of the queue."""
MORE_DESCRIPTORS = 64
"""How many more may be open at the end than before: connections that are kept, one for each request under way."""
GROWTH_SHARE = 0.05
"""How much larger than at its start a process may be at the end of a short step, whose first minute takes the memory
that a load needs: 189 MB became 193 in 60 s of overload. Then it is flat: 0.26 MB a minute in 150 s of it."""
LEAST_SECONDS, MINUTES_COUNT_FROM = 30.0, 120.0
"""A shorter time says nothing about growth; a longer one, and a soak behind the others, how much it is a minute."""
STEPS = ("unloaded", "saturation", "overload", "soak")


def judge(server: Mapping[str, Any], *, batch_ms: float | None) -> list[dict[str, Any]]:
    """Hold the steps that a server took against the bounds; `batch_ms` is how long one full batch takes, if known.

    What could not be measured, as the memory of a server that we did not start, has no verdict. But a step in which
    nothing was accepted, and so has no latencies, breaks a bound of its own.

        >>> judge(server, batch_ms=34.0)[0]
        {'what': 'unloaded: p50 of overhead, ms', 'value': 0.9, 'bound': 'at most 1.5', 'holds': True}
    """
    steps = {name: server[name] for name in STEPS if name in server}
    found = [*_compared(server), *_answers(steps), *_nothing_accepted(steps)]
    if "overload" in steps:
        overload, unloaded = steps["overload"], steps["unloaded"]["accepted"]["p99"]
        if unloaded is not None and batch_ms is not None:
            bound = UNLOADED_TIMES * unloaded + batch_ms
            found.append(_at_most("overload: p99 of accepted requests, ms", overload["accepted"]["p99"], bound))
        found.append(_at_most("overload: p99 of refusals, ms", overload["refused"]["p99"], REFUSAL_MS))
    for name in ("overload", "soak"):
        watched = steps.get(name, {}).get("server")
        if watched and watched["seconds"] >= LEAST_SECONDS:
            found.append(_growth(name, watched))
            more = watched["descriptors"]["last"] - watched["descriptors"]["first"]
            found.append(_at_most(f"{name}: more descriptors at the end", more, MORE_DESCRIPTORS))
    return [verdict for verdict in found if verdict["value"] is not None]


def _growth(name: str, watched: Mapping[str, Any]) -> dict[str, Any]:
    if name == "soak" or watched["seconds"] >= MINUTES_COUNT_FROM:
        slope = watched["resident_bytes_per_minute"]
        return _at_most(f"{name}: growth of memory, bytes a minute", slope, FLAT_BYTES_PER_MINUTE)
    memory = watched["resident_bytes"]
    share = round(memory["last"] / memory["first"] - 1, 4)
    return _at_most(f"{name}: growth of memory, of what it was", share, GROWTH_SHARE)


def _compared(server: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Beside the scorer, where the two took turns."""
    found = []
    if "overhead_ms" in server["unloaded"]:
        overhead = server["unloaded"]["overhead_ms"]["p50"]
        found.append(_at_most("unloaded: p50 of overhead, ms", overhead, OVERHEAD_MS))
    ratio = server["saturation"].get("ratio")
    if ratio:
        median = ratio["median"]
        found.append(
            {
                "what": "saturation: throughput, of Scorer.score",
                "value": median,
                "bound": f"at least {LEAST_RATIO:g}",
                "holds": median >= LEAST_RATIO,
            }
        )
    return found


def _answers(steps: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Require that no step has wrong scores, failed requests or hung requests.

    In the unloaded step, with one request at a time, no request may be refused either.
    """
    every = list(steps.values())
    counts = {
        "all steps: answers with other scores than Scorer.score": sum(
            step["scores"]["different"] + step["scores"]["unreadable"] for step in every
        ),
        "all steps: failed requests": sum(step["failed"] for step in every),
        "all steps: hung requests": sum(step["hung"] for step in every),
        "unloaded: refused requests": steps["unloaded"]["refused"]["count"],
    }
    return [_at_most(what, value, 0) for what, value in counts.items()]


def _nothing_accepted(steps: Mapping[str, Any]) -> list[dict[str, Any]]:
    empty = [name for name, step in steps.items() if step["accepted"]["p99"] is None]
    return [{"what": f"{name}: accepted requests", "value": 0, "bound": "at least 1", "holds": False} for name in empty]


def _at_most(what: str, value: float | None, bound: float) -> dict[str, Any]:
    return {
        "what": what,
        "value": value,
        "bound": f"at most {bound:,.4g}" if bound < 1000 else f"at most {bound:,.0f}",
        "holds": value is not None and value <= bound,
    }
