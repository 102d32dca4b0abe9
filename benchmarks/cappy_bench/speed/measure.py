"""Measures what `cappy bench run` is asked for; the result is one JSON document."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import cappy_bench
import cappy_engine
import cappy_export
from cappy_bench.machine import code_digest, cpu_kind, current_commit, describe_machine, file_word
from cappy_bench.peers.cappy import default_settings
from cappy_bench.peers.peer import Model
from cappy_bench.peers.process import environment_versions, start_worker, telling_variables
from cappy_bench.peers.specs import SPECS, Spec
from cappy_bench.shapes import count_parameters, read_shape
from cappy_bench.speed.figures import SCHEMA, useful_flops
from cappy_bench.speed.run_options import ENVIRONMENTS, RESULTS, SUITES, RunOptions
from cappy_bench.speed.suite import Plan, Say, measure_peak, run_suite
from cappy_bench.speed.texts import choose_pool, read_files
from cappy_bench.speed.workloads import MAX_LENGTH, PROOF, Workload, make_workloads
from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.bulk.output.places import check_output
from cappy_engine.bundle import MANIFEST, Bundle, open_bundle
from cappy_engine.cpu.cores import usable_cores
from cappy_engine.errors import BenchmarkError
from cappy_engine.storage import json_bytes, sha256_of
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoints.checkpoint import digest_of_files, open_checkpoint

WEIGHTS = (".safetensors", ".bin", ".msgpack")
SMALL = (".json", ".txt", ".model")
"""Endings of what else tools read of a checkpoint: its config and its tokenizer."""

Result = dict[str, Any]


def measure(options: RunOptions, *, say: Say) -> Result:
    """Measure what `options` ask for, write the result, and return it.

    Raises BenchmarkError, also for a bundle of another checkpoint, BundleError, CheckpointError, and OutputError if
    there is such a file. A tool that cannot run is part of the result.

        >>> measure(RunOptions(suite="smoke"), say=print)["runners"][0]["name"]
        'cappy-int8'
    """
    started, clock, commit = datetime.now(UTC), time.monotonic(), current_commit()
    bundle, machine = open_bundle(options.bundle), describe_machine()
    described = describe_model(bundle, options.checkpoint)
    model = Model(
        bundle=bundle.path,
        folder=options.work / _model_folder(described, options.checkpoint),
        threads=options.threads or usable_cores(),
        checkpoint=options.checkpoint,
        max_length=min(MAX_LENGTH, bundle.manifest.max_length),
    )
    out = options.out or RESULTS / f"{described['name']}-{file_word(cpu_kind(machine))}.json"
    read = read_files(options.pairs, options.data, options.bundle, options.checkpoint)
    check_output(out, force=options.force, inputs=read)
    workloads, source = _take_workloads(options, model)
    plan = _make_plan(options, bundle, model, workloads, described["weights_bytes"])
    variables = telling_variables(model.threads)
    conditions = [machine, described, variables, _own_settings(bundle, model), _other_versions(options.tools)]
    notes = options.work / f"notes-{_key(conditions, model, workloads)}.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    is_resumed = notes.exists()
    start = partial(start_worker, tools=options.tools)
    measured = run_suite(plan, notes=notes, peak=measure_peak, start=start, say=say)
    for entry, workload in zip(measured["workloads"], plan.timed, strict=True):
        entry["flops"] = useful_flops(described["shape"], workload.token_counts.tolist())
    result = {
        "schema": SCHEMA,
        "title": options.title or described["name"],
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
        "is_resumed": is_resumed,
        "commit": commit,
        "machine": machine,
        "variables": variables,
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
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_output(out, force=options.force, say=say) as file:
        file.write(json_bytes(result))
    say(f"the result is in {out}")
    notes.unlink()
    return result


def _make_plan(
    options: RunOptions, bundle: Bundle, model: Model, workloads: Sequence[Workload], weights_bytes: int
) -> Plan:
    """Plan the runners that were asked for, with the suite's rounds."""
    return Plan(
        specs=choose_runners(options, bundle),
        workloads=workloads,
        model=model,
        rounds=options.rounds or SUITES[options.suite][0],
        max_seconds=options.max_seconds,
        reserve_bytes=4 * weights_bytes,
        exported=exported_parity(bundle),
    )


def exported_parity(bundle: Bundle) -> dict[str, Any]:
    """Read the parity that the export measured, by precision, without the texts of its pairs.

    >>> exported_parity(open_bundle(EMBEDDED))["int8"]["pairs"]
    279
    """
    exported = bundle.manifest.document.get("parity", {})
    pairs = exported.get("pairs", {}).get("count")
    return {name: {**_without_texts(row), "pairs": pairs} for name, row in exported.get("precisions", {}).items()}


def _without_texts(parity: Any) -> Any:
    """Leave out the worst pairs of a proof, with their texts, wherever they stand: a result is passed on."""
    if isinstance(parity, dict):
        return {name: _without_texts(value) for name, value in parity.items() if name != "worst"}
    return [_without_texts(value) for value in parity] if isinstance(parity, list) else parity


def choose_runners(options: RunOptions, bundle: Bundle) -> list[Spec]:
    """Choose the runners that were asked for by name and by environment; all by default.

    Without a checkpoint they are our own, in the bundle's precisions. Raises BenchmarkError if none is left.

        >>> [spec.name for spec in choose_runners(RunOptions(), open_bundle(EMBEDDED))]
        ['cappy-int8']
    """
    found = [
        spec
        for spec in SPECS
        if (not options.runners or spec.name in options.runners)
        and (not options.environments or spec.environment in options.environments)
        and (options.checkpoint is not None or (spec.is_ours and spec.precision in bundle.manifest.precisions))
    ]
    left_out = [name for name in options.runners if name not in [spec.name for spec in found]]
    if left_out or not found:
        which = ", ".join(left_out or options.environments) or "every runner"
        raise BenchmarkError(
            f"nothing to measure for {which}: without --checkpoint only our own runners are measured, in the "
            f"bundle's precisions (its models for CPUs: {', '.join(bundle.manifest.precisions) or 'none'})"
        )
    return found


def describe_model(bundle: Bundle, checkpoint: Path | None) -> dict[str, Any]:
    """Describe the model: its name, digest, shape and size.

    Raises CheckpointError for a folder without a checkpoint, and BenchmarkError for another checkpoint than the
    bundle's.

    >>> describe_model(open_bundle(EMBEDDED), None)["name"]
    'cappy-mini'
    """
    source, shape = bundle.manifest.document.get("source", {}), read_shape(bundle.path)
    if checkpoint is None:
        name = Path(source.get("name") or os.path.realpath(bundle.path)).name
        digests = {file: digest for file, digest in source.get("files", {}).items() if file.endswith(WEIGHTS)}
        size = max(entry.size_bytes for entry in bundle.manifest.files.values())
    else:
        paths = open_checkpoint(checkpoint).weight_paths
        require_same_model(bundle, checkpoint)
        name = Path(os.path.realpath(checkpoint)).name
        digests, size = {path.name: sha256_of(path) for path in paths}, sum(path.stat().st_size for path in paths)
    return {
        "name": name,
        "weights_sha256": next(iter(digests.values())) if len(digests) == 1 else digest_of_files(digests),
        "weights_bytes": size,
        "parameters": count_parameters(shape),
        "shape": {name: shape[name] for name in ("hidden_size", "intermediate_size", "layers", "wide_products")},
    }


def require_same_model(bundle: Bundle, checkpoint: Path) -> None:
    """Raise BenchmarkError unless the bundle was made of this checkpoint.

    Files are compared by the digests in the bundle's manifest. A file that only one of them has says nothing: a
    checkpoint may hold its weights in several formats.

        >>> require_same_model(open_bundle("cappy-bundle"), Path("my-checkpoint"))
    """
    made_of = bundle.manifest.document.get("source", {}).get("files", {})
    found = {name: checkpoint / name for name in made_of if (checkpoint / name).is_file()}
    others = [name for name, path in found.items() if sha256_of(path) != made_of[name]]
    if others:
        raise BenchmarkError(
            f"the bundle {bundle.path} was made of another checkpoint than {checkpoint} (not the same: "
            f"{', '.join(others)}); export this one with 'cappy export', or name the other one"
        )


def _model_folder(described: dict[str, Any], checkpoint: Path | None) -> str:
    """Name the folder for what tools convert: one for each model, so that no tool scores with another one's weights."""
    small = () if checkpoint is None else sorted(path for path in checkpoint.iterdir() if path.suffix in SMALL)
    read = {path.name: sha256_of(path) for path in small}
    return f"{described['name']}-{digest_of_files({'weights': described['weights_sha256'], **read})[:12]}"


def _take_workloads(options: RunOptions, model: Model) -> tuple[list[Workload], str]:
    """Take the workloads that were asked for, and say from which texts.

    Raises BenchmarkError if there are too few texts, or the suite has no such workload, and InvalidLine for a line of a
    file that holds no pair.
    """
    sizes = SUITES[options.suite][1]
    if model.checkpoint is None:
        sizes = replace(sizes, proof=0)  # there is nothing to compare its scores with
    has = [*sizes.names, *([PROOF] if sizes.proof else [])]
    missing = [name for name in options.workloads if name not in has]
    if missing:
        raise BenchmarkError(
            f"the suite {options.suite} has no workload {', '.join(missing)}, only {', '.join(has)}; choose "
            "one of these, or another --suite"
        )
    if set(options.workloads) == {PROOF}:
        raise BenchmarkError(f"the workload {PROOF} has no time; name another one, too")
    tokenizer = PairTokenizer.from_file(model.bundle / "tokenizer.json", max_length=model.max_length)
    pairs, source = choose_pool(options.pairs, options.data, seed=options.seed)
    return make_workloads(pairs, tokenizer, sizes, seed=options.seed, wanted=options.workloads), source


def _own_settings(bundle: Bundle, model: Model) -> dict[str, Any]:
    """Tell how our runners compute, in each precision, however many of them are measured."""
    return {name: default_settings(bundle.path, name, model.threads) for name in bundle.manifest.precisions}


def _other_versions(tools: Path) -> dict[str, dict[str, str]]:
    """Read the versions of all packages in the environments of other tools."""
    return {name: environment_versions(name, tools) for name in ENVIRONMENTS if name != "main"}


def _key(conditions: Sequence[Any], model: Model, workloads: Sequence[Workload]) -> str:
    """Name the notes of a run.

    What was measured on another machine, model or workload, in other `conditions`, or with other code, is not taken up;
    with more or fewer rounds or runners a run goes on from the same notes.
    """
    code = code_digest([Path(package.__path__[0]) for package in (cappy_engine, cappy_export, cappy_bench)])
    bundle, has_checkpoint = sha256_of(model.bundle / MANIFEST), model.checkpoint is not None
    digests = [workload.sha256 for workload in workloads]
    facts = [*conditions, model.threads, has_checkpoint, bundle, digests, code]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
