"""Benchmarks: parity and speed beside every peer.

    cappy bench run --suite quick --checkpoint export/cappy_mini/checkpoint --bundle BUNDLE --out RESULT.json
    cappy bench compare RESULT.json             every runner, workload by workload
    cappy bench compare BEFORE.json AFTER.json  what changed
    cappy bench report                          results/*.json as a page with plots

Numbers are useful tokens: padding counts for nothing. `run` prints its progress on standard error and, as its last line
on standard output, the result as one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cappy_bench.machine import describe_machine
from cappy_bench.peers import SPECS, Spec
from cappy_bench.peers.peer import Model
from cappy_bench.peers.process import ROOT, current_commit
from cappy_bench.speed.figures import useful_flops
from cappy_bench.speed.report import write_report
from cappy_bench.speed.tables import change_table, markdown, missing_table, runner_table, workload_table
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
from cappy_engine.tokenizer import PairTokenizer

SCHEMA = 1
SUITES = {
    "quick": (3, Sizes(interactive=32, lengths=4, rerank=4, bulk=128, long=12, padded=8)),
    "full": (3, Sizes(interactive=8, lengths=1, rerank=1, bulk=32, long=2, padded=2)),
    "smoke": (2, Sizes(interactive=4, lengths=1, rerank=1, bulk=16, long=2, padded=2)),
}
"""Rounds, and the sizes of the workloads: quick is meant for cappy-mini, full for a model of cappy-large's size."""
RESULTS = ROOT / "benchmarks" / "results"


def run(options: argparse.Namespace) -> None:
    """Measure, write the result to `--out`, print the tables and the result."""
    from cappy_bench.speed.suite import (  # it needs PyTorch, which tables and reports do not
        Plan,
        measure_peak,
        run_suite,
    )

    started, clock, commit = datetime.now(UTC), time.monotonic(), current_commit()
    rounds, sizes = SUITES[options.suite]
    model = Model(options.checkpoint, options.bundle, options.work, options.threads)
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
    settings = {
        "suite": options.suite,
        "rounds": plan.rounds,
        "threads": model.threads,
        "seed": options.seed,
        "max_seconds": plan.max_seconds,
        "pairs": source,
    }
    machine = describe_machine()
    notes = options.work / f"notes-{_key(machine, model, described, workloads)}.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    is_resumed = notes.exists()
    measured = run_suite(plan, notes=notes, peak=measure_peak, say=_say)
    for entry, workload in zip(measured["workloads"], workloads, strict=True):
        entry["flops"] = useful_flops(described["shape"], workload.worked_lengths.tolist())
    result = {
        "schema": SCHEMA,
        "title": options.title,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "is_resumed": is_resumed,
        "commit": commit,
        "machine": machine,
        "settings": settings,
        "model": described,
        "versions": {"cappy-engine": metadata.version("cappy-engine")},
        **measured,
    }
    text = json.dumps(result, allow_nan=False, ensure_ascii=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, allow_nan=False, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    notes.unlink()
    print_result(result)
    print(text)


def compare(options: argparse.Namespace) -> None:
    """Print one result's tables, or what changed from the first to the second."""
    if len(options.results) > 2:
        sys.exit("compare takes one result, or two")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    if len(results) == 1:
        print_result(results[0])
        return
    print(f"useful tokens/s of {options.results[1].name} over those of {options.results[0].name}\n")
    print(change_table(*results))
    for name in ("machine", "model", "settings"):
        if results[0][name] != results[1][name]:
            print(f"\nThe two differ in their {name}, so these ratios compare that too.")


def print_result(result: dict[str, Any]) -> None:
    """Every table of one result."""
    print(f"{result['title']}: {result['machine']['cpu']}, {result['settings']['threads']} threads\n")
    for workload in result["workloads"]:
        print(
            f"{workload['name']}: {workload['description']} ({workload['pairs']} pairs, {workload['tokens']} tokens)\n"
        )
        print(workload_table(result, workload["name"]), "\n")
    print(runner_table(result), "\n")
    missing = missing_table(result)
    print(f"Did not run:\n\n{missing}\n" if missing else "All runners ran.\n")


def list_runners(options: argparse.Namespace) -> None:
    """Print the runners with their settings."""
    print(
        markdown(
            ("runner", "precision", "environment", "setting"),
            [(s.name, s.precision, s.environment, s.setting) for s in SPECS],
        )
    )


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


def _chosen(options: argparse.Namespace) -> list[Spec]:
    """The runners that were asked for by name and by environment: all, if nothing was."""
    return [
        spec
        for spec in SPECS
        if (not options.runners or spec.name in options.runners)
        and (not options.environments or spec.environment in options.environments)
    ]


def _pool(options: argparse.Namespace) -> tuple[list[tuple[str, str]], str]:
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


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(function=run)
    command.add_argument("--suite", choices=SUITES, default="quick")
    command.add_argument("--title", default="benchmarks", help="heads the result's tables and the report's section")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument(
        "--bundle", type=Path, required=True, help="exported from the checkpoint, in every precision to measure"
    )
    command.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    command.add_argument(
        "--work", type=Path, default=Path("bench"), help="what runners convert, and the notes to resume from"
    )
    command.add_argument(
        "--runner",
        dest="runners",
        action="append",
        choices=[spec.name for spec in SPECS],
        help="only this one (repeat)",
    )
    command.add_argument(
        "--environment",
        dest="environments",
        action="append",
        choices=sorted({spec.environment for spec in SPECS}),
        help="only runners of this one (repeat)",
    )
    command.add_argument(
        "--workload", dest="workloads", action="append", choices=list(DESCRIPTIONS), help="only this one (repeat)"
    )
    command.add_argument("--rounds", type=int, help="instead of the suite's own number")
    command.add_argument("--threads", type=int, default=describe_machine()["cores"])
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--max-seconds", type=float, default=60.0, help="a runner slower than this at a workload runs it once"
    )
    command.add_argument("--pairs", type=Path, help="JSON Lines to take the texts from")
    command.add_argument(
        "--data", type=Path, help="folder with PromptSource's and BIG-Bench's tasks to take the texts from"
    )
    command = commands.add_parser("compare", help="print a result, or what changed between two")
    command.set_defaults(function=compare)
    command.add_argument("results", type=Path, nargs="+", help="one or two results")
    command = commands.add_parser("report", help="render results as a page with plots")
    command.set_defaults(function=lambda options: write_report(options.results))
    command.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON files, where the page goes too"
    )
    command = commands.add_parser("list", help="print the runners and their settings")
    command.set_defaults(function=list_runners)
    options = parser.parse_args(argv)
    options.function(options)


if __name__ == "__main__":
    main()
