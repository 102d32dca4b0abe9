"""Go on with a GPU check that was stopped: what of its result can stand beside what is measured now."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cappy_bench.gpu.facts import describe_bundle, installed_versions
from cappy_bench.gpu.plan import Check
from cappy_bench.gpu.results import Figures
from cappy_bench.gpu.steps import REFERENCE
from cappy_bench.machine import current_commit
from cappy_engine.bundle import Bundle
from cappy_engine.errors import BenchmarkError
from cappy_engine.gpu.installation import Installation

SCHEMA = 1


def what_is_measured(check: Check, bundle: Bundle, installation: Installation) -> Figures:
    """Tell all that must be the same for figures to stand in one result.

    >>> what_is_measured(check, bundle, installation)["gpus"]
    [{'name': 'NVIDIA H200', 'compute_capability': '9.0', 'memory_bytes': 150109880320}]
    """
    return {
        "schema": SCHEMA,
        "model": describe_bundle(bundle),
        "versions": installed_versions(),
        "commit": current_commit(),
        "effort": asdict(check.effort),
        "gpus": [asdict(gpu) for gpu in installation.gpus],
    }


def kept_steps(out: Path, same: Figures, work: Path) -> dict[str, Figures]:
    """Read the measured steps that went well of an earlier result; none if there is no such file.

    PyTorch's reference counts only where its scores are still in `work`. Raises BenchmarkError for a file of something
    else, and for a result of which one of `same` differs.

        >>> kept_steps(Path("gpu.json"), what_is_measured(check, bundle, installation), check.work)
        {}
    """
    if not out.exists():
        return {}
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))
        found = {name: earlier[name] for name in same if name not in ("effort", "gpus")}
        found |= {"effort": earlier["settings"]["effort"], "gpus": earlier["machine"]["gpus"]}
        steps = {step["name"]: step for step in earlier["steps"] if step["status"] == "ok"}
    except (ValueError, TypeError, KeyError) as error:
        raise BenchmarkError(f"{out} is no result of a GPU check ({error!r}); choose another --out") from error
    others = [name for name in same if found[name] != same[name]]
    if others:
        raise BenchmarkError(
            f"{out} has another {others[0]} ({found[others[0]]}, here {same[others[0]]}), so --resume would mix what "
            "cannot be compared; choose another --out, or start anew with --force"
        )
    anew = {"preflight", "published", *([] if (work / REFERENCE).exists() else ["parity/reference"])}
    return {name: step for name, step in steps.items() if name not in anew}
