"""Tell the whole export: load, build, convert, prove, write. And the proof alone, for a bundle that exists."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cappy_engine.bundle import BUNDLE, Manifest, open_bundle
from cappy_engine.errors import BundleError, ExportError
from cappy_engine.publish import check_folder, check_space, publish, staging_folder
from cappy_engine.storage import write_json
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoints.checkpoint import (
    Checkpoint,
    digest_of_files,
    float32_bytes,
    open_checkpoint,
    shape_model,
)
from cappy_export.checkpoints.config import bundle_config
from cappy_export.checkpoints.fast_tokenizer import doubts_of, load_tokenizer
from cappy_export.checkpoints.refusals import refusing
from cappy_export.cpu_models import check_cpu_models, write_cpu_models
from cappy_export.gpu_models import BUCKETS, check_gpu_models, choose_lengths, write_gpu_models
from cappy_export.manifest import describe_export, keep_chosen, list_files, write_manifest
from cappy_export.options import ExportOptions, Say, VerifyOptions
from cappy_export.precisions.calibration import CalibrationPairs
from cappy_export.proof.canary import make_canary
from cappy_export.proof.limits import check_measured, parse_limits
from cappy_export.proof.pairs import parity_pairs
from cappy_export.proof.parity import check_winners, require
from cappy_export.proof.proving import Proof, prove
from cappy_export.proof.reference import score_with_torch

log = logging.getLogger(__name__)


def export(
    checkpoint: str | Path,
    out: str | Path,
    options: ExportOptions = ExportOptions(),
    *,
    force: bool = False,
    say: Say = log.info,
) -> dict[str, Any]:
    """Export `checkpoint` (a folder, or a hub id) to the bundle `out`; return the manifest.

    >>> export("btan2/cappy-large", "cappy-bundle", ExportOptions(precisions=("fp32", "int8")))

    Every model scores the parity pairs before the bundle appears. Scores beyond the limits raise ParityError, and
    nothing is written. A bundle that exists is kept unless `force` is set, and then replaced only by a proven one.
    `say` is told of every step.

    Raises ExportError (CheckpointError, GraphError, ParityError), OutputError if `out` must not be written or has
    no space, ScoringError where a model gives no number, and OSError where files cannot be written.
    """
    inputs = [Path(checkpoint), *([options.pairs] if options.pairs else [])]
    place = check_folder(Path(out), BUNDLE, force=force, inputs=inputs)
    name, pairs = parity_pairs(options.pairs)
    check_winners(parse_limits(options.limits), pairs)
    opened = open_checkpoint(checkpoint, revision=options.revision)
    check_folder(place, BUNDLE, force=force, inputs=[opened.folder])
    model = shape_model(opened)
    check_gpu_models(opened, model, options)
    check_cpu_models(opened, model, options)
    files = opened.files
    with staging_folder(place, say) as staging:  # a place where nothing can be written is found first
        check_space(place, float32_bytes(opened, model), "the fp32 model alone")  # the others are made from it
        say(f"scoring {len(pairs)} pairs with PyTorch")
        reference = score_with_torch(opened, pairs, max_length=options.max_length)
        proof = Proof(name, pairs, reference, parse_limits(options.limits, spread=reference.spread))
        written = _write(staging, opened, files, options, proof, say)
        parity = prove(staging, {"cpu": written["precisions"], **options.for_gpus}, proof, say)
        require(parity, proof.limits, f"the export of {opened.name}")
        if opened.files != files:
            raise ExportError(f"{checkpoint} changed during the export; run it again")
        canary = make_canary(staging, parity, proof)
        manifest = keep_chosen(staging, {**written, "canary": canary, "parity": parity}, options.kept)
        publish(staging, place, BUNDLE, force=force)
    return manifest


def verify(
    bundle: str | Path, checkpoint: str | Path, options: VerifyOptions = VerifyOptions(), *, say: Say = log.info
) -> dict[str, Any]:
    """Measure the parity of an existing bundle with its checkpoint on this machine; return the report.

    >>> verify("cappy-bundle", "btan2/cappy-large", VerifyOptions(precisions=("int8",)))["precisions"]["int8"]

    Models for GPUs are measured on the CPU provider. Raises ParityError beyond the limits, BundleError for a damaged
    bundle or a model that it lacks, and ExportError.
    """
    found = open_bundle(bundle)
    manifest = found.manifest
    sha256, told = _told_by(manifest, bundle)
    all_models = {"cpu": manifest.precisions, **manifest.targets}
    models = all_models if options.precisions is None else {"cpu": options.precisions}
    check_measured(options.limits, {precision for precisions in models.values() for precision in precisions})
    for target, precisions in models.items():
        for precision in precisions:
            found.model(precision, target)  # one that is not there is found before PyTorch scores
    name, pairs = parity_pairs(options.pairs)
    check_winners(parse_limits(options.limits), pairs)
    opened = open_checkpoint(checkpoint, revision=options.revision)
    if digest_of_files(opened.files) != sha256:
        say(f"note: {checkpoint} is not, file for file, the checkpoint that the bundle was exported from")
    _check_told(told, opened, manifest.max_length, f"bundle {bundle}")
    say(f"scoring {len(pairs)} pairs with PyTorch")
    reference = score_with_torch(opened, pairs, max_length=manifest.max_length)
    proof = Proof(name, pairs, reference, parse_limits(options.limits, spread=reference.spread))
    parity = prove(Path(bundle), models, proof, say)
    require(parity, proof.limits, f"bundle {bundle}")
    return parity


def _told_by(manifest: Manifest, bundle: str | Path) -> tuple[str, dict[str, Any]]:
    """Read what a manifest tells: the checkpoint's digest, and facts of the model and its scores."""
    document = manifest.document
    try:
        return document["source"]["sha256"], {**document["model"], **document.get("score", {})}
    except (KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BundleError(f"the manifest of {bundle} does not tell its source ({reason}); export it again") from error


def _check_told(model: Mapping[str, Any], checkpoint: Checkpoint, max_length: int, subject: str) -> None:
    """Raise BundleError if a manifest says of scores what the checkpoint does not; older ones say less."""
    tokenizer = load_tokenizer(checkpoint, max_length=max_length)
    expected = {
        "architecture": checkpoint.config["architectures"][0],
        "max_length": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "labels": 1,
        "activation": checkpoint.score["activation"],
    }
    told = {**expected, **model}
    wrong = [
        f"the {name} {told[name]!r}, and the checkpoint has {value!r}"
        for name, value in expected.items()
        if told[name] != value
    ]
    if wrong:
        raise BundleError(f"the manifest of {subject} has {'; '.join(wrong)}; export it again from this checkpoint")


def _write(
    staging: Path, checkpoint: Checkpoint, files: Mapping[str, str], options: ExportOptions, proof: Proof, say: Say
) -> dict[str, Any]:
    """Write all of the bundle but its parity into `staging`; return the manifest so far."""
    tokenizer = load_tokenizer(checkpoint, max_length=sys.maxsize)
    longest = tokenizer.model_max_length
    if longest < options.max_length:
        say(
            f"note: pairs are cut at {longest} tokens, not at {options.max_length}: "
            f"{checkpoint.name} and its tokenizer take no longer ones"
        )
    elif longest > options.max_length:
        say(
            f"note: pairs are cut at {options.max_length} tokens; {checkpoint.name} takes up to {longest}, "
            f"with --max-length {longest}"
        )
        tokenizer.model_max_length = options.max_length  # which leaves a pair some text: PyTorch's scores needed it
    for doubt in doubts_of(checkpoint, tokenizer):
        say(doubt)
    write_json(staging / "config.json", bundle_config(checkpoint.config))
    model = {"max_length": tokenizer.model_max_length, "pad_token_id": tokenizer.pad_token_id}
    with refusing(f"the tokenizer of {checkpoint.name} cannot be put into a bundle"):
        tokenizer.save_pretrained(staging)
        encoder = PairTokenizer.from_file(staging / "tokenizer.json", max_length=tokenizer.model_max_length)
    calibration = CalibrationPairs(encoder.encode(proof.pairs), tokenizer.pad_token_id)
    shape, graphs = write_cpu_models(checkpoint, staging, options, calibration, say)
    document = describe_export(checkpoint, files, {**model, **shape}, graphs)
    if options.for_gpus:
        own_lengths = None if options.pairs is None else proof.reference.token_counts
        buckets = choose_lengths(own_lengths, options.buckets or BUCKETS, max_length=tokenizer.model_max_length)
        document["targets"] = write_gpu_models(checkpoint, staging, options, calibration, buckets, say)
    return write_manifest(staging, {**document, "files": list_files(staging)})
