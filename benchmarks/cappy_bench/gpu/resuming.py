"""Go on with a GPU check that was stopped: what of its result can stand beside what is measured now."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from cappy_bench.gpu.facts import describe_bundle, installed_versions
from cappy_bench.gpu.plan import Check
from cappy_bench.gpu.results import Figures
from cappy_bench.gpu.steps import REFERENCE
from cappy_bench.machine import current_commit, describe_machine
from cappy_bench.speed.figures import check_parity
from cappy_bench.speed.texts import pool_files
from cappy_engine.bundle import Bundle
from cappy_engine.errors import BenchmarkError
from cappy_engine.gpu.installation import Installation
from cappy_engine.storage import sha256_of

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
        "texts": _texts(check),
        "cpu": describe_machine()["cpu"],
        "gpus": [asdict(gpu) for gpu in installation.gpus],
        "cuda_of_driver": installation.driver,
    }


def kept_steps(out: Path, same: Figures, check: Check) -> dict[str, Figures]:
    """Read the measured steps that went well of an earlier result; none if there is no such file.

    PyTorch's reference counts only where its scores are still in the folder of work, and TensorRT's first openings only
    where engines are. Raises BenchmarkError for a file of something else, for a result of which one of `same` differs,
    and for a parity that is not finite.

        >>> kept_steps(Path("gpu.json"), what_is_measured(check, bundle, installation), check)
        {}
    """
    if not out.exists():
        return {}
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))
        found = {**earlier, **earlier["settings"], **earlier["machine"]}
        steps = {step["name"]: step for step in earlier["steps"] if step["status"] == "ok"}
        parities = {name: dict(step["figures"]) for name, step in steps.items() if name.startswith("parity/")}
    except (ValueError, TypeError, KeyError) as error:
        raise BenchmarkError(f"{out} is not a result of a GPU check ({error!r}); choose another --out") from error
    for name, here in same.items():
        if found.get(name) != here:
            raise BenchmarkError(
                f"{out} differs in its {name} ({found.get(name)}, here {here}), so --resume would mix what cannot be "
                "compared; choose another --out, or start anew with --force"
            )
    for name, parity in parities.items():
        check_parity(parity, f"{out}, {name}", "choose another --out, or start anew with --force")
    anew = {"preflight", *([] if (check.work / REFERENCE).exists() else ["parity/reference"])}
    anew |= set() if check.cache.exists() else {name for name in steps if name.endswith("/first")}
    return {name: step for name, step in steps.items() if name not in anew}


def _texts(check: Check) -> str | None:
    """Name the texts that are read by a digest of their files; None where they are made up."""
    files = [*(pool_files(check.data) if check.data else ()), *([check.questions] if check.questions else ())]
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest() if files else None
