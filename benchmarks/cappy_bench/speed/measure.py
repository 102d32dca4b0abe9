"""Measure what was asked for, and write the result: from the options of `cappy bench run` to one JSON document."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from cappy_bench.machine import describe_machine
from cappy_bench.peers import SPECS, Spec
from cappy_bench.peers.peer import Model
from cappy_bench.peers.process import current_commit
from cappy_bench.speed.figures import useful_flops
from cappy_bench.speed.workloads import (
    DESCRIPTIONS,
    Sizes,
    Workload,
    make_pool_like,
    make_workloads,
    read_pairs_file,
    read_pool,
)
from cappy_engine.bundle import MANIFEST, sha256_of
from cappy_engine.options import Asked
from cappy_engine.tokenizer import PairTokenizer

SCHEMA = 1
SUITES = {
    "quick": (3, Sizes(interactive=32, lengths=4, rerank=4, bulk=128, long=12, padded=8)),
    "full": (3, Sizes(interactive=8, lengths=1, rerank=1, bulk=32, long=2, padded=2)),
    "smoke": (2, Sizes(interactive=4, lengths=1, rerank=1, bulk=16, long=2, padded=2)),
}
"""Rounds, and the sizes of the workloads: quick is meant for cappy-mini, full for a model of cappy-large's size."""

Result = dict[str, Any]
Say = Callable[[str], object]


@dataclass(frozen=True)
class RunOptions:
    """What `cappy bench run` measures, and where it writes."""

    checkpoint: Annotated[Path, Asked("a checkpoint folder")]
    bundle: Annotated[Path, Asked("exported from the checkpoint, in every precision to measure")]
    out: Annotated[Path, Asked("the result, as JSON")]
    suite: Annotated[str, Asked("sizes of the workloads", choices=tuple(SUITES))] = "quick"
    title: Annotated[str, Asked("heads the result's tables and the report's section")] = "benchmarks"
    work: Annotated[Path, Asked("what runners convert, and the notes to resume from")] = Path("bench")
    runners: Annotated[
        tuple[str, ...],
        Asked("only this one (repeat)", flag="--runner", choices=tuple(spec.name for spec in SPECS)),
    ] = ()
    environments: Annotated[
        tuple[str, ...],
        Asked(
            "only runners of this one (repeat)",
            flag="--environment",
            choices=tuple(sorted({spec.environment for spec in SPECS})),
        ),
    ] = ()
    workloads: Annotated[
        tuple[str, ...], Asked("only this one (repeat)", flag="--workload", choices=tuple(DESCRIPTIONS))
    ] = ()
    rounds: Annotated[int | None, Asked("instead of the suite's own number", least=1)] = None
    threads: Annotated[int | None, Asked("CPU threads (default: all cores)", least=1)] = None
    seed: Annotated[int, Asked("seed of the workloads")] = 0
    max_seconds: Annotated[float, Asked("a runner slower than this at a workload runs it once")] = 60.0
    pairs: Annotated[Path | None, Asked("JSON Lines to take the texts from")] = None
    data: Annotated[
        Path | None, Asked("folder with PromptSource's and BIG-Bench's tasks to take the texts from", metavar="FOLDER")
    ] = None


def measure(options: RunOptions, *, say: Say) -> Result:
    """Measure what `options` ask for, write the result to `options.out`, and return it."""
    from cappy_bench.speed.suite import (  # it needs PyTorch, which tables and reports do not
        Plan,
        measure_peak,
        run_suite,
    )

    started, clock = datetime.now(UTC), time.monotonic()
    rounds, sizes = SUITES[options.suite]
    machine = describe_machine()
    model = Model(options.checkpoint, options.bundle, options.work, options.threads or machine["cores"])
    tokenizer = PairTokenizer.from_file(options.bundle / "tokenizer.json", max_length=model.max_length)
    pairs, source = _pool(options)
    workloads = [
        workload
        for workload in make_workloads(pairs, tokenizer, sizes, seed=options.seed)
        if not options.workloads or workload.name in options.workloads
    ]
    described = describe_model(options.checkpoint)
    plan = Plan(
        specs=_chosen(options),
        workloads=workloads,
        model=model,
        rounds=options.rounds or rounds,
        max_seconds=options.max_seconds,
        reserve_bytes=4 * described["weights_bytes"],
    )
    notes = options.work / f"notes-{_key(machine, model, described, workloads)}.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    is_resumed = notes.exists()
    measured = run_suite(plan, notes=notes, peak=measure_peak, say=say)
    for entry, workload in zip(measured["workloads"], workloads, strict=True):
        entry["flops"] = useful_flops(described["shape"], workload.worked_lengths.tolist())
    result = {
        "schema": SCHEMA,
        "title": options.title,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "is_resumed": is_resumed,
        "commit": current_commit(),
        "machine": machine,
        "settings": {
            "suite": options.suite,
            "rounds": plan.rounds,
            "threads": model.threads,
            "seed": options.seed,
            "max_seconds": plan.max_seconds,
            "pairs": source,
        },
        "model": described,
        "versions": {"cappy-engine": metadata.version("cappy-engine")},
        **measured,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, allow_nan=False, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    notes.unlink()
    return result


def describe_model(checkpoint: Path) -> dict[str, Any]:
    """Name, digests, shape and size of the checkpoint that is measured.

    Raises CheckpointError if the folder is none.
    """
    from cappy_export.checkpoints.checkpoint import (  # PyTorch, which tables and reports need not
        digest_of_files,
        open_checkpoint,
    )

    opened = open_checkpoint(checkpoint)
    config = opened.config
    digests = {path.name: sha256_of(path) for path in opened.weight_paths}
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    layers, embedded = config["num_hidden_layers"], config["vocab_size"] + config["max_position_embeddings"]
    parameters = layers * (4 * hidden**2 + 2 * hidden * wide) + hidden * embedded + hidden**2
    return {
        "name": checkpoint.resolve().name,
        "weights_sha256": next(iter(digests.values())) if len(digests) == 1 else digest_of_files(digests),
        "weights_bytes": sum(path.stat().st_size for path in opened.weight_paths),
        "parameters": parameters,
        "shape": {"hidden_size": hidden, "intermediate_size": wide, "layers": layers},
    }


def _chosen(options: RunOptions) -> list[Spec]:
    """The runners that were asked for by name and by environment: all, if nothing was."""
    return [
        spec
        for spec in SPECS
        if (not options.runners or spec.name in options.runners)
        and (not options.environments or spec.environment in options.environments)
    ]


def _pool(options: RunOptions) -> tuple[list[tuple[str, str]], str]:
    """The pairs that workloads are taken from, and what to call them."""
    if options.pairs is not None:
        return read_pairs_file(options.pairs), f"the file {options.pairs.name}"
    found = read_pool(options.data, seed=options.seed) if options.data is not None else []
    if found:
        return found, "PromptSource's and BIG-Bench's tasks"
    from cappy_export.proof.pairs import default_pairs

    return make_pool_like(default_pairs(), seed=options.seed), "made of words of the package's parity pairs"


def _key(machine: dict[str, Any], model: Model, described: dict[str, Any], workloads: Sequence[Workload]) -> str:
    """Names the notes of a run. What was measured on another machine, model or workload is not taken up; more or fewer
    rounds or runners go on with what there is."""
    bundle = sha256_of(model.bundle / MANIFEST)
    text = json.dumps([machine, model.threads, described, bundle, [workload.sha256 for workload in workloads]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
