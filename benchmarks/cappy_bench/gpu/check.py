"""Checks a machine with an NVIDIA GPU: its scores, its speed, and its refusals.

    python -m cappy_bench.gpu.check --checkpoint CHECKPOINT --bundle BUNDLE --out RESULT.json [--data DATA]

BUNDLE is exported from CHECKPOINT for cuda in fp32 and fp16, and maybe for tensorrt, in int8 too; `make gpu-check`
makes it first. Every step runs in a process of its own, in an environment of its own, and a step that fails stops no
other. What cannot be there is skipped, with the reason: everything without a GPU, TensorRT's steps without its
libraries. The most valuable steps come first, and the result is written after every step; a figure that was not
measured is null. At the end come the tables and, as the last line on standard output, the result as one JSON document.
Exit status: 0 if every step that was asked for is ok, else 1. What the bundle has no model for was not asked for.

With little time, run one group after the other (`--only open`, then `--only parity --resume`, ...): `--resume` keeps
the steps in --out that went well, and the engines, whose building takes minutes. It refuses a result of another bundle,
machine, commit, effort, packages or texts. `--keep-engines` keeps the engines alone. Two checks at once need an --out
each.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cappy_bench.gpu.drills import drill_steps
from cappy_bench.gpu.facts import DEVICES, lengths_of, not_exported
from cappy_bench.gpu.host import Machine, this_machine
from cappy_bench.gpu.plan import FULL, QUICK, Check, CheckFailed, Step
from cappy_bench.gpu.results import Figures, summary
from cappy_bench.gpu.resuming import kept_steps, what_is_measured
from cappy_bench.gpu.steps import measuring_steps
from cappy_bench.gpu.watching import attention_kernels, first_gpu, gpu_facts, watched
from cappy_bench.machine import describe_machine
from cappy_bench.peers.process import in_short, last_lines
from cappy_bench.seconds import read_seconds
from cappy_engine.bulk.output.places import check_output
from cappy_engine.bundle import Bundle, open_bundle
from cappy_engine.errors import BenchmarkError, CappyError
from cappy_engine.gpu.installation import Installation
from cappy_engine.gpu.preflight import diagnose
from cappy_engine.gpu.start import NO_TF32
from cappy_engine.storage import write_json

GROUPS = ("open", "attention", "throughput", "parity", "profile", "questions", "drill")
NOT_ASKED = "not asked for (--only)"
NOT_EXPORTED = "not asked for: the bundle has no model for it"
Entry = dict[str, Any]
Say = Callable[[str], object]


@dataclass(frozen=True)
class Order:
    """Which steps run, for how long, and where the document goes; `only` may name groups.

    Each step's process is called with the same `arguments`, and its name.
    """

    title: str
    out: Path
    max_seconds: float
    arguments: Sequence[str]
    only: Sequence[str] = ()
    keep_engines: bool = False
    resume: bool = False


def _run_all(order: Order, check: Check, bundle: Bundle, say: Say) -> Entry:
    """Run every step that was asked for, write the document after each, and return it."""
    began, started = time.monotonic(), datetime.now(UTC)
    installation = check.machine.inspect()  # before anything imports PyTorch, which brings CUDA's libraries with it
    facts = gpu_facts()
    same = what_is_measured(check, bundle, installation)
    kept = kept_steps(order.out, same, check) if order.resume else {}
    kept_names = list(kept)
    lacking = {**why_unusable(installation), **dict.fromkeys(not_exported(bundle), NOT_EXPORTED)}
    entries = [{**_preflight(installation, lacking), "seconds": round(time.monotonic() - began, 1)}]

    def document(is_complete: bool) -> Entry:
        return {
            **{name: same[name] for name in ("schema", "model", "versions", "commit")},
            "title": order.title,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
            "is_complete": is_complete,
            "machine": {
                **describe_machine(),
                **{name: same[name] for name in ("gpus", "cuda_of_driver")},
                "nvidia_smi": facts,
            },
            "settings": {
                **{name: same[name] for name in ("effort", "texts")},
                "max_seconds": order.max_seconds,
                "only": list(order.only) or None,
                "keep_engines": order.keep_engines,
                "kept": kept_names or None,
            },
            "steps": [*entries, *([] if is_complete else kept.values())],
        }

    for step in all_steps(bundle):
        if step.name in kept:
            entries.append(kept.pop(step.name))
            continue
        left = order.max_seconds - (time.monotonic() - began)
        reason = why_not(step, lacking, order.only, left)
        if reason is None:
            say(step.name)
            entries.append(_in_child(step, check, order, left))
        else:
            entries.append(_entry(step.name, "skipped", reason))
        write_json(order.out, document(is_complete=False))
    found = document(is_complete=True)
    write_json(order.out, found)
    return found


def _run_one(name: str, check: Check, bundle: Bundle) -> Entry:
    """Run the step of that name in this process; return status, reason and figures."""
    step = next(step for step in all_steps(bundle) if step.name == name)
    try:
        return _entry(name, "ok", None, step.run(check))
    except CheckFailed as error:
        return _entry(name, "failed", in_short(str(error)), error.figures)
    except Exception as error:  # whatever the libraries raise, the other steps go on
        traceback.print_exc()
        return _entry(name, "failed", in_short(f"{type(error).__name__}: {error}"))


def all_steps(bundle: Bundle) -> list[Step]:
    """List the steps for this bundle, in the order in which they run.

    >>> all_steps(bundle)[0].name
    'open/cuda/fp32'
    """
    return [*measuring_steps(lengths_of(bundle)), *drill_steps()]


def why_unusable(installation: Installation) -> dict[str, str | None]:
    """Say why each device cannot be used, on one line; None where nothing is missing. A missing GPU is the one reason.

    >>> why_unusable(installation)
    {'cuda': None, 'tensorrt': 'TensorRT: not found: libnvinfer.so.10'}
    """
    reasons: dict[str, str | None] = {}
    for device in DEVICES:
        lacking = [finding for finding in diagnose(installation, device) if not finding.is_ok]
        if not installation.gpus:
            lacking = [finding for finding in lacking if finding.name in ("driver", "GPU")]
        causes = in_short("; ".join(f"{finding.name}: {finding.detail}" for finding in lacking))
        reasons[device] = (causes if installation.gpus else f"there is no GPU here: {causes}") if lacking else None
    return reasons


def why_not(step: Step, lacking: Mapping[str, str | None], only: Sequence[str], seconds_left: float) -> str | None:
    """Say why the step is skipped; None if it is to run.

    >>> why_not(step, {"cuda": None}, only=["drill"], seconds_left=60.0)
    'not asked for (--only)'
    """
    if lacking[step.device] is not None:
        return lacking[step.device]
    if only and step.group not in only:
        return NOT_ASKED
    return "the time was used up (--max-seconds)" if seconds_left <= 0 else None


def exit_status(entries: Sequence[Mapping[str, Any]]) -> int:
    """Return 0 if every step that was asked for is ok, else 1.

    >>> exit_status([{"status": "skipped", "reason": "there is no GPU here"}])
    1
    """
    return int(any(entry["status"] != "ok" and entry["reason"] not in (NOT_ASKED, NOT_EXPORTED) for entry in entries))


def _preflight(installation: Installation, lacking: Mapping[str, str | None]) -> Entry:
    findings = {device: [asdict(found) for found in diagnose(installation, device)] for device in DEVICES}
    figures = {"installation": asdict(installation), "findings": findings}
    reasons = dict.fromkeys(reason for reason in lacking.values() if reason not in (None, NOT_EXPORTED))
    return _entry("preflight", "failed" if reasons else "ok", " | ".join(filter(None, reasons)) or None, figures)


def _in_child(step: Step, check: Check, order: Order, seconds: float) -> Entry:
    """Run the step in a process of its own, which may crash or hang."""
    file = check.work / f"{step.name.replace('/', '-')}.json"
    file.unlink(missing_ok=True)
    environment = {"CAPPY_CACHE": str(check.cache), NO_TF32: None, "HF_HUB_OFFLINE": "1", **step.environment}
    began = time.monotonic()
    with watched(first_gpu()) as seen:
        child = check.machine.run_child([*order.arguments, "--step", step.name], environment, seconds)
    took = round(time.monotonic() - began, 1)
    file.with_suffix(".log").write_text(child.output, encoding="utf-8")
    entry = json.loads(file.read_text(encoding="utf-8")) if file.exists() else _entry(step.name, "failed", None)
    entry |= {"gpu": seen or None, "attention": attention_kernels(child.output) or None}
    if child.status == 0 and file.exists():
        return {**entry, "seconds": took}
    ended = f"was ended after {seconds:.0f} s" if child.status is None else f"ended with status {child.status}"
    reason = "; ".join(filter(None, (entry["reason"], f"its process {ended}: {last_lines(child.output)}")))
    return {**entry, "status": "failed", "reason": reason, "seconds": took}


def _entry(name: str, status: str, reason: str | None, figures: Figures | None = None) -> Entry:
    return {"name": name, "status": status, "seconds": None, "reason": reason, "figures": figures}


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="for PyTorch: the reference, and a peer")
    parser.add_argument(
        "--bundle", type=Path, required=True, help="exported from it; a model that it lacks is not measured"
    )
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    parser.add_argument("--force", action="store_true", help="replace the result if it exists")
    parser.add_argument("--data", type=Path, help="folder with PromptSource's and BIG-Bench's tasks, for real texts")
    parser.add_argument(
        "--questions", type=Path, help="pairs of Natural Questions, JSON Lines; else texts of such lengths"
    )
    parser.add_argument("--title", default="GPU check")
    parser.add_argument("--work", type=Path, help="engines, and the output of every step; default: beside --out")
    parser.add_argument(
        "--max-seconds", type=read_seconds, default=7200.0, help="no step goes on after this; default: 7200"
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=GROUPS, help="only the steps of this group (repeat)"
    )
    parser.add_argument("--keep-engines", action="store_true", help="use an earlier run's: no first opening then")
    parser.add_argument("--resume", action="store_true", help="keep the steps that went well before, and the engines")
    parser.add_argument("--quick", action="store_true", help="few runs: does all of it work?")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None, *, machine: Machine | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = _parse(arguments)
    check = Check(
        machine=machine or this_machine(),
        checkpoint=options.checkpoint,
        bundle=options.bundle,
        work=options.work or options.out.parent / f"{options.out.stem}-work",
        data=options.data,
        questions=options.questions,
        effort=QUICK if options.quick else FULL,
    )
    try:
        bundle = open_bundle(check.bundle)
        check_output(options.out, force=options.force or options.resume or options.step is not None)
    except CappyError as error:
        sys.exit(f"error: {error}")
    if options.step:
        write_json(check.work / f"{options.step.replace('/', '-')}.json", _run_one(options.step, check, bundle))
        if options.step.startswith("profile/") and machine is None:
            sys.stdout.flush()
            os._exit(0)  # CUPTI and ONNX Runtime free something twice when the process ends (seen with 1.31.1)
        return 0
    order = Order(
        title=options.title,
        out=options.out,
        max_seconds=options.max_seconds,
        arguments=arguments,
        only=options.only,
        keep_engines=options.keep_engines,
        resume=options.resume,
    )
    for folder in (check.work, order.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if not (order.keep_engines or order.resume):
        shutil.rmtree(check.cache, ignore_errors=True)
    try:
        document = _run_all(order, check, bundle, _say)
    except (BenchmarkError, OSError) as error:
        sys.exit(f"error: {error}")
    print(summary(document), "\n")
    print(json.dumps(document, allow_nan=False, ensure_ascii=False))
    return exit_status(document["steps"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sys.exit(main())
