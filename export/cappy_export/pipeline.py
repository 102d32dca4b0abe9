"""The whole export: load, build, convert, prove, write. And the proof alone, for a bundle that exists."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cappy_engine import __version__
from cappy_engine.batching import Grouping, position_ids
from cappy_engine.buckets import choose_buckets, default_buckets
from cappy_engine.bundle import (
    EXTERNAL_SUFFIX,
    MANIFEST,
    MODEL_FILES,
    PRECISIONS,
    SCHEMA_VERSION,
    open_bundle,
    seal,
    sha256_of,
)
from cappy_engine.cpu.cores import cpu_name, usable_cores
from cappy_engine.errors import ExportError
from cappy_engine.options import Precision, ScorerOptions
from cappy_engine.pairs import Pair
from cappy_engine.runner import Runner
from cappy_engine.scorer import Scorer
from cappy_engine.session import open_session
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoints.checkpoint import Checkpoint, digest_of_files, load_tokenizer, open_checkpoint
from cappy_export.checkpoints.config import bundle_config
from cappy_export.gpu_models import check_target_precisions, runnable_on_cpu, write_target
from cappy_export.graphs.optimum import build_fused_graph, build_graph, model_shape
from cappy_export.precisions.fp16 import convert_to_half
from cappy_export.precisions.int8 import quantize
from cappy_export.proof.limits import LIMITS, Limits, parse_limits
from cappy_export.proof.pairs import default_pairs, read_pairs
from cappy_export.proof.parity import (
    canary_rows,
    canary_tolerance,
    describe_pairs,
    measure,
    require,
    require_same_tokens,
    score_in_shapes,
)
from cappy_export.proof.reference import Reference, score_with_torch
from cappy_export.publish import check_target, publish, staging_folder

DEFAULT_BUCKETS = 4
CALIBRATION_PAIRS = 32
"""Pairs on which the float32 graph is searched for values beyond fp16, and int8's biases are corrected."""
ACCURATE_CALIBRATION_PAIRS = 512
"""Pairs on which accurate int8 weighs its errors: with a few it would fit what these have by chance."""
PACKAGES = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tokenizers",
    "numpy",
)

MEANINGFUL_STD = 0.01

__all__ = ["export", "parse_limits", "verify"]

log = logging.getLogger(__name__)
Say = Callable[[str], object]


def export(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    precisions: Sequence[str] = ("fp32",),
    targets: Sequence[str] = ("cpu",),
    keep: Sequence[str] | None = None,
    float32_products: Sequence[str] = (),
    is_int8_accurate: bool = False,
    revision: str | None = None,
    max_length: int = 512,
    pairs: str | Path | None = None,
    buckets: int = DEFAULT_BUCKETS,
    limits: Mapping[str, Limits] = LIMITS,
    force: bool = False,
    say: Say = log.info,
) -> dict[str, Any]:
    """Export `checkpoint` (a folder, or a hub id at `revision`) to the folder `bundle`; returns the manifest.

    Every precision scores the parity pairs (the package's own, or those of the JSON Lines file `pairs`) before the
    bundle appears; scores beyond `limits` (LIMITS where a precision is not named) raise ParityError and nothing is
    written. With `keep` only these of `precisions` are written; the manifest has the parity of all. Under the CPU's
    int8 matrix products whose names hold one of `float32_products` stay in float32; with `is_int8_accurate` the others
    lose less (see `quantize`). `targets` are the devices to export for, each in those of `precisions` that it runs;
    TensorRT gets at most `buckets` lengths, chosen for those of `pairs`. A bundle that exists is kept unless `force` is
    set, and then replaced only by a proven one. `say` is told of every step.

    Raises ExportError (CheckpointError, GraphError, ParityError), ScoringError where a model gives no number, OSError
    where files cannot be written, and ValueError for options out of range.
    """
    asked, limits = _check_precisions(precisions), {**LIMITS, **limits}
    by_target = check_target_precisions(targets, asked)
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, got {buckets}")
    chosen = by_target.pop("cpu", [])
    kept = chosen if keep is None else _check_precisions(keep)
    if not set(kept) <= set(chosen):
        raise ExportError(f"cannot keep {', '.join(kept)} of {', '.join(chosen)}; name it as a precision too")
    if (float32_products or is_int8_accurate) and "int8" not in chosen:
        what = "float32 products are" if float32_products else "accurate int8 is"
        raise ExportError(f"{what} for the CPU's int8; name it as a precision too")
    target = Path(bundle)
    check_target(target, force=force)
    parity_pairs, pairs_name = _pairs(pairs)
    opened = open_checkpoint(checkpoint, revision=revision)
    if target.resolve() in (opened.folder.resolve(), *opened.folder.resolve().parents):
        raise ExportError(f"{target} is or holds the checkpoint {checkpoint}; choose another name")
    files = opened.files
    say(f"scoring {len(parity_pairs)} pairs with PyTorch")
    reference = score_with_torch(opened, parity_pairs, max_length=max_length)
    with staging_folder(target, say) as staging:
        document = _write_files(
            staging, opened, files, chosen, float32_products, is_int8_accurate, parity_pairs, max_length, say
        )
        if by_target:
            lengths = _lengths(reference.token_counts) if pairs is not None else None
            shape = (document["model"]["max_length"], document["model"]["pad_token_id"])
            document["targets"] = _write_targets(staging, opened, shape, by_target, parity_pairs, lengths, buckets, say)
        written = _write_manifest(staging, document, _entries(staging))
        models = {"cpu": document["precisions"], **by_target}
        parity = _prove(staging, models, reference, parity_pairs, pairs_name, limits, say)
        require(parity, limits, f"the export of {opened.name}")
        if opened.files != files:
            raise ExportError(f"{checkpoint} changed during the export; run it again")
        canary = _canary(staging, parity, reference, parity_pairs, limits) if by_target else {}
        manifest = _keep_chosen(staging, {**written, **canary, "parity": parity}, kept)
        publish(staging, target, force=force)
    return manifest


def verify(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    precisions: Sequence[str] | None = None,
    revision: str | None = None,
    pairs: str | Path | None = None,
    limits: Mapping[str, Limits] = LIMITS,
    say: Say = log.info,
) -> dict[str, Any]:
    """Measure the parity of an existing bundle with its checkpoint on this machine; returns the report.

    `precisions` are the CPU's; by default all of the bundle's models are measured, those for GPUs on the CPU provider.
    Raises ParityError beyond `limits`, BundleError for a damaged bundle, and ExportError.
    """
    manifest, limits = open_bundle(bundle).manifest, {**LIMITS, **limits}
    chosen = [*manifest.precisions] if precisions is None else _check_precisions(precisions)
    targets = {"cpu": chosen, **{name: [*there] for name, there in manifest.targets.items() if precisions is None}}
    parity_pairs, pairs_name = _pairs(pairs)
    opened = open_checkpoint(checkpoint, revision=revision)
    if digest_of_files(opened.files) != manifest.document["source"]["sha256"]:
        say(f"note: {checkpoint} is not, file for file, the checkpoint that the bundle was exported from")
    say(f"scoring {len(parity_pairs)} pairs with PyTorch")
    reference = score_with_torch(opened, parity_pairs, max_length=manifest.max_length)
    parity = _prove(Path(bundle), targets, reference, parity_pairs, pairs_name, limits, say)
    require(parity, limits, f"bundle {bundle}")
    return parity


def _check_precisions(precisions: Sequence[str]) -> list[str]:
    unknown = [name for name in precisions if name not in PRECISIONS]
    if isinstance(precisions, str) or unknown or not precisions:
        raise ValueError(f"precisions must be a list from {', '.join(PRECISIONS)}, got {precisions!r}")
    return [name for name in PRECISIONS if name in precisions]


def _pairs(source: str | Path | None) -> tuple[list[Pair], str]:
    return (default_pairs(), "default") if source is None else (read_pairs(source), Path(source).name)


def _write_files(
    staging: Path,
    checkpoint: Checkpoint,
    files: Mapping[str, str],
    precisions: Sequence[str],
    float32_products: Sequence[str],
    is_int8_accurate: bool,
    pairs: Sequence[Pair],
    max_length: int,
    say: Say,
) -> dict[str, Any]:
    """Write all of the bundle but the manifest; returns what the manifest says but for files and parity.

    The CPU's fp32 model, from which its others are made, is written and so proven even where it was not asked for.
    """
    tokenizer = load_tokenizer(checkpoint, max_length=max_length)
    tokenizer.save_pretrained(staging)
    (staging / "config.json").write_text(
        json.dumps(bundle_config(checkpoint.config), indent=2) + "\n", encoding="utf-8"
    )
    encoder = PairTokenizer.from_file(staging / "tokenizer.json", max_length=tokenizer.model_max_length)
    graphs: dict[str, Any] = {}
    shape: dict[str, int] = {}
    if precisions:
        (staging / "onnx").mkdir()
        say("building the fp32 graph")
        fp32 = staging / MODEL_FILES["fp32"]
        shape, graphs["fp32"] = build_graph(checkpoint, fp32)
    if "fp16" in precisions:
        say("converting to fp16")
        inputs = calibration_inputs(encoder, pairs, pad_token_id=tokenizer.pad_token_id)
        graphs["fp16"] = _write_half(checkpoint, fp32, graphs["fp32"], staging / MODEL_FILES["fp16"], inputs)
    if "int8" in precisions:
        say("quantising to int8")
        count = ACCURATE_CALIBRATION_PAIRS if is_int8_accurate else CALIBRATION_PAIRS
        inputs = calibration_inputs(encoder, pairs, pad_token_id=tokenizer.pad_token_id, count=count)
        int8_facts = quantize(
            fp32,
            staging / MODEL_FILES["int8"],
            inputs,
            float32_products=float32_products,
            is_accurate=is_int8_accurate,
        )
        graphs["int8"] = {**int8_facts, "unpadded": graphs["fp32"]["unpadded"]}
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {
            "architecture": checkpoint.config["architectures"][0],
            "max_length": tokenizer.model_max_length,
            "pad_token_id": tokenizer.pad_token_id,
            **(shape or model_shape(checkpoint)),
        },
        "source": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "format": checkpoint.format,
            "sha256": digest_of_files(files),
            "files": files,
        },
        "precisions": list(graphs),
        "graphs": graphs,
        "versions": _versions(),
        "machine": _machine(),
    }


def _write_targets(
    staging: Path,
    checkpoint: Checkpoint,
    shape: tuple[int, int],
    by_target: Mapping[str, Sequence[str]],
    pairs: Sequence[Pair],
    lengths: Mapping[int, int] | None,
    buckets: int,
    say: Say,
) -> dict[str, Any]:
    """Write the models for GPUs; returns what the manifest says of them. `shape` is max_length and pad_token_id."""
    max_length, pad_token_id = shape
    encoder = PairTokenizer.from_file(staging / "tokenizer.json", max_length=max_length)
    chosen = default_buckets(max_length)[-buckets:]
    if lengths is not None:
        chosen = choose_buckets(lengths, buckets, max_length=max_length)
    found: dict[str, Any] = {}
    for target, precisions in by_target.items():
        say(f"building the graphs for {target}: {', '.join(precisions)}")

        def calibration() -> Iterator[dict[str, npt.NDArray[np.int64]]]:
            return calibration_inputs(encoder, pairs, pad_token_id=pad_token_id)

        graphs = write_target(checkpoint, staging, target, precisions, calibration, chosen)
        found[target] = {"precisions": list(precisions), "graphs": graphs}
        if target == "tensorrt":
            found[target]["buckets"] = list(chosen)
    return found


def _lengths(token_counts: npt.NDArray[np.int64]) -> dict[int, int]:
    """How many pairs there are of each length."""
    return {int(length): int(count) for length, count in zip(*np.unique(token_counts, return_counts=True), strict=True)}


def _write_half(
    checkpoint: Checkpoint,
    fp32: Path,
    fp32_facts: Mapping[str, Any],
    out: Path,
    inputs: Iterator[dict[str, npt.NDArray[np.int64]]],
) -> dict[str, Any]:
    """Write fp16 from a fused graph: the fp32 model if that is one, else one that is made for it."""
    if not fp32_facts["unpadded"]:
        return {**convert_to_half(fp32, out, inputs), "unpadded": False}
    with tempfile.TemporaryDirectory(dir=out.parent.parent) as folder:
        fused = Path(folder, "fused.onnx")
        build_fused_graph(checkpoint, fused)
        return {**convert_to_half(fused, out, inputs), "unpadded": False}


def calibration_inputs(
    tokenizer: PairTokenizer, pairs: Sequence[Pair], *, pad_token_id: int, count: int = CALIBRATION_PAIRS
) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
    """Model inputs of about `count` of `pairs`, one pair each: every n-th by length, and so the longest."""
    encoded = tokenizer.encode(pairs)
    order = np.argsort(encoded.lengths, kind="stable")
    for row in order[:: -max(1, len(order) // count)]:
        ids = encoded.token_ids[row][None, :]
        yield {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": encoded.type_ids[row][None, :],
            "position_ids": position_ids(ids, pad_token_id=pad_token_id),
        }


def _prove(
    folder: Path,
    models: Mapping[str, Sequence[str]],
    reference: Reference,
    pairs: Sequence[Pair],
    pairs_name: str,
    limits: Mapping[str, Limits],
    say: Say,
) -> dict[str, Any]:
    """Score `pairs` with the models (target to precisions) of the bundle in `folder` and compare: the parity report.

    Models for GPUs are run on the CPU provider: `targets` says how.
    """
    rows: dict[str, dict[str, Any]] = {target: {} for target in models}
    for target, precisions in models.items():
        for precision in precisions:
            where = "" if target == "cpu" else f" of {target}, on the CPU provider"
            say(f"scoring {len(pairs)} pairs in {precision}{where}")
            with _open_for_proof(folder, target, precision) as scorer:
                scored, shapes = score_in_shapes(scorer, pairs)
            require_same_tokens(scored, reference, pairs)
            measured = measure(reference.scores, scored.scores, pairs, reference.token_counts)
            rows[target][precision] = {
                **measured,
                "batch_shapes": shapes,
                "limits": dataclasses.asdict(limits[precision]),
            }
    facts = describe_pairs(pairs, reference, pairs_name)
    if facts["score_std"] < MEANINGFUL_STD:
        log.warning("the scores hardly vary (standard deviation %.2g): parity says little here", facts["score_std"])
    if not facts["truncated"]:
        log.warning("none of the pairs of %s is long enough to be truncated: that is not proven here", pairs_name)
    report = {"reference": reference.description, "machine": _machine(), "pairs": facts, "precisions": rows.pop("cpu")}
    return {**report, "targets": rows} if rows else report


@contextlib.contextmanager
def _open_for_proof(folder: Path, target: str, precision: str) -> Iterator[Scorer]:
    """A scorer on the CPU for a model of the bundle in `folder`, whatever it was made for."""
    if target == "cpu":
        with Scorer.open_with(folder, ScorerOptions(device="cpu", precision=cast(Precision, precision))) as scorer:
            yield scorer
        return
    bundle = open_bundle(folder)
    bundle.check_model(precision, target)
    with tempfile.TemporaryDirectory() as temporary:
        model = runnable_on_cpu(bundle.model(precision, target), target, Path(temporary))
        session, pad_token_id = open_session(model, threads=usable_cores()), bundle.manifest.pad_token_id
        runner = Runner(session, Grouping(512), pad_token_id=pad_token_id)
        tokenizer = PairTokenizer.from_file(bundle.file("tokenizer.json"), max_length=bundle.manifest.max_length)
        with Scorer(tokenizer, runner) as scorer:
            yield scorer


def _canary(
    staging: Path,
    parity: Mapping[str, Any],
    reference: Reference,
    pairs: Sequence[Pair],
    limits: Mapping[str, Limits],
) -> dict[str, Any]:
    """Pairs with PyTorch's scores, and how far a GPU's may be from them (see cappy_engine.gpu.canary)."""
    manifest = open_bundle(staging).manifest
    rows = canary_rows(reference.scores, reference.token_counts)
    encoder = PairTokenizer.from_file(staging / "tokenizer.json", max_length=manifest.max_length)
    encoded = encoder.encode([pairs[row] for row in rows])
    tolerance = {
        target: {precision: canary_tolerance(row, limits[precision]) for precision, row in measured.items()}
        for target, measured in parity["targets"].items()
    }
    return {
        "canary": {
            "tolerance": tolerance,
            "pairs": [
                {
                    "input_ids": encoded.token_ids[place].tolist(),
                    "token_type_ids": encoded.type_ids[place].tolist(),
                    "score": float(reference.scores[row]),
                }
                for place, row in enumerate(rows)
            ],
        }
    }


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The sha256 and the size of every file in `folder`, but for the manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths
    }


def _write_manifest(folder: Path, document: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    manifest = seal({**document, "files": files})
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _keep_chosen(folder: Path, document: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """Remove the fp32 model where it was only a step; write the final manifest with the digests that were proven."""
    files = dict(document["files"])
    for precision in sorted(set(document["precisions"]) - set(chosen)):
        for name in [name for name in files if name.removesuffix(EXTERNAL_SUFFIX) == MODEL_FILES[precision]]:
            (folder / name).unlink()
            del files[name]
    graphs = {precision: document["graphs"][precision] for precision in chosen}
    return _write_manifest(folder, {**document, "precisions": list(chosen), "graphs": graphs}, files)


def _versions() -> dict[str, str]:
    """Versions of everything that had a hand in the bundle."""
    found = {"cappy-engine": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _machine() -> dict[str, str]:
    """The processor and system: rounding depends on them."""
    return {"cpu": cpu_name(), "system": f"{platform.system()} {platform.machine()}"}
