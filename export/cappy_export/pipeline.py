"""The whole export: load, build, convert, prove, write. And the proof alone, for a bundle that exists."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine import __version__
from cappy_engine.bundle import MANIFEST, MODEL_FILES, PRECISIONS, SCHEMA_VERSION, open_bundle, seal, sha256_of
from cappy_engine.errors import ExportError
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoint import Checkpoint, bundle_config, digest_of_files, load_tokenizer, open_checkpoint
from cappy_export.graph import build_graph
from cappy_export.half import convert_to_half
from cappy_export.pairs import default_pairs, read_pairs
from cappy_export.parity import LIMITS, Limits, describe_pairs, measure, parse_limits, require, score_in_shapes
from cappy_export.quantize import quantize
from cappy_export.reference import Reference, score_with_torch

CALIBRATION_PAIRS = 32
"""Pairs on which the float32 graph is searched for values beyond fp16, the longest ones among them."""
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
    revision: str | None = None,
    max_length: int = 512,
    pairs: str | Path | None = None,
    limits: Mapping[str, Limits] = LIMITS,
    force: bool = False,
    say: Say = log.info,
) -> dict[str, Any]:
    """Export `checkpoint` (a folder, or a hub id at `revision`) to the folder `bundle`; returns the manifest.

    Every precision scores the parity pairs (the package's own, or those of the JSON Lines file `pairs`) before the
    bundle appears; a score set beyond `limits` raises ParityError and nothing is written. A bundle that exists is kept
    unless `force` is set, and then replaced only by a proven one. `say` is told of every step.

    Raises ExportError (CheckpointError, GraphError, ParityError), and ValueError for options out of range.
    """
    chosen = _check_precisions(precisions)
    target = Path(bundle)
    if os.path.lexists(target) and not force:
        raise ExportError(f"{target} exists; choose another name, or replace it with --force")
    parity_pairs, pairs_name = _pairs(pairs)
    opened = open_checkpoint(checkpoint, revision=revision)
    say(f"scoring {len(parity_pairs)} pairs with PyTorch")
    reference = score_with_torch(opened, parity_pairs, max_length=max_length)
    with _staging(target) as staging:
        document = _write_files(staging, opened, chosen, parity_pairs, max_length, say)
        _write_manifest(staging, document)
        parity = _prove(staging, chosen, reference, parity_pairs, pairs_name, limits, say)
        require(parity, limits, f"the export of {opened.name}")
        manifest = _write_manifest(staging, {**document, "parity": parity})
        _publish(staging, target)
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

    `precisions` are all of the bundle's by default. Raises ParityError beyond `limits`, BundleError for a damaged
    bundle, and ExportError.
    """
    manifest = open_bundle(bundle).manifest
    chosen = _check_precisions(manifest.precisions if precisions is None else precisions)
    parity_pairs, pairs_name = _pairs(pairs)
    opened = open_checkpoint(checkpoint, revision=revision)
    if digest_of_files(opened.files) != manifest.document["source"]["sha256"]:
        say(f"note: {checkpoint} is not, file for file, the checkpoint that the bundle was exported from")
    say(f"scoring {len(parity_pairs)} pairs with PyTorch")
    reference = score_with_torch(opened, parity_pairs, max_length=manifest.max_length)
    parity = _prove(Path(bundle), chosen, reference, parity_pairs, pairs_name, limits, say)
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
    staging: Path, checkpoint: Checkpoint, precisions: Sequence[str], pairs: Sequence[Pair], max_length: int, say: Say
) -> dict[str, Any]:
    """Write all of the bundle but the manifest; returns what the manifest says but for files and parity."""
    tokenizer = load_tokenizer(checkpoint, max_length=max_length)
    tokenizer.save_pretrained(staging)
    (staging / "config.json").write_text(json.dumps(bundle_config(checkpoint), indent=2) + "\n", encoding="utf-8")
    (staging / "onnx").mkdir()
    say("building the fp32 graph")
    fp32 = staging / MODEL_FILES["fp32"]
    shape, fp32_facts = build_graph(checkpoint, fp32)
    graphs: dict[str, Any] = {"fp32": fp32_facts}
    if "fp16" in precisions:
        say("converting to fp16")
        encoder = PairTokenizer.from_file(staging / "tokenizer.json", max_length=tokenizer.model_max_length)
        graphs["fp16"] = convert_to_half(fp32, staging / MODEL_FILES["fp16"], calibration_inputs(encoder, pairs))
    if "int8" in precisions:
        say("quantising to int8")
        graphs["int8"] = quantize(fp32, staging / MODEL_FILES["int8"])
    if "fp32" not in precisions:
        fp32.unlink()
    files = checkpoint.files
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {
            "architecture": checkpoint.config["architectures"][0],
            "max_length": tokenizer.model_max_length,
            "pad_token_id": tokenizer.pad_token_id,
            **shape,
        },
        "source": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "format": checkpoint.format,
            "sha256": digest_of_files(files),
            "files": files,
        },
        "precisions": list(precisions),
        "graphs": {name: graphs[name] for name in precisions},
        "versions": _versions(),
        "machine": _machine(),
    }


def calibration_inputs(tokenizer: PairTokenizer, pairs: Sequence[Pair]) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
    """Model inputs of CALIBRATION_PAIRS of `pairs`, one pair each: every n-th by length, and so the longest."""
    encoded = tokenizer.encode(pairs)
    order = np.argsort(encoded.lengths, kind="stable")
    for row in order[:: -max(1, len(order) // CALIBRATION_PAIRS)]:
        ids = encoded.token_ids[row][None, :]
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": encoded.type_ids[row][None, :]}


def _prove(
    folder: Path,
    precisions: Sequence[str],
    reference: Reference,
    pairs: Sequence[Pair],
    pairs_name: str,
    limits: Mapping[str, Limits],
    say: Say,
) -> dict[str, Any]:
    """Score `pairs` with the bundle in `folder` and compare: the parity report."""
    rows = {}
    for precision in precisions:
        say(f"scoring {len(pairs)} pairs in {precision}")
        with Scorer.open(folder, device="cpu", precision=precision) as scorer:
            scores, shapes = score_in_shapes(scorer, pairs)
        measured = measure(reference.scores, scores, pairs, reference.token_counts)
        rows[precision] = {**measured, "batch_shapes": shapes, "limits": dataclasses.asdict(limits[precision])}
    facts = describe_pairs(pairs, reference, pairs_name)
    if facts["score_std"] < MEANINGFUL_STD:
        log.warning("the scores hardly vary (standard deviation %.2g): parity says little here", facts["score_std"])
    return {"reference": reference.description, "machine": _machine(), "pairs": facts, "precisions": rows}


def _write_manifest(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name != MANIFEST
    }
    manifest = seal({**document, "files": entries})
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, removed on the way out unless it was published."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    """Give the complete bundle its name. What had the name before is moved aside first and then removed."""
    for path in [*staging.rglob("*"), staging]:
        _sync(path)
    old = None
    if os.path.lexists(target):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent)) / target.name
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    """Versions of everything that had a hand in the bundle."""
    found = {"cappy-engine": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _machine() -> dict[str, str]:
    """The processor and system: int8 scores depend on them."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "system": f"{platform.system()} {platform.machine()}"}
