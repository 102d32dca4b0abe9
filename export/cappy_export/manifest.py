"""Write a bundle's manifest: where it comes from, what is in it, and what made it. Knows nothing of models."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cappy_engine import __version__
from cappy_engine.bundle import MANIFEST, MODEL_FILES, SCHEMA_VERSION, seal
from cappy_engine.bundle_files import EXTERNAL_SUFFIX
from cappy_engine.cpu.cores import cpu_name
from cappy_engine.storage import sha256_of, write_json
from cappy_export.checkpoints.checkpoint import Checkpoint, digest_of_files

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


def describe_export(
    checkpoint: Checkpoint, files: Mapping[str, str], model: Mapping[str, Any], graphs: Mapping[str, Any]
) -> dict[str, Any]:
    """Say everything of an export but its files and its parity.

    >>> describe_export(opened, opened.files, {"max_length": 512}, {"fp32": facts})["precisions"]
    ['fp32']

    `files` are the checkpoint's, by sha256; `model` is its shape, and `graphs` the facts of the CPU's models.
    Scores are raw, and `score` says what the authors' tools apply to them.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": {"architecture": checkpoint.config["architectures"][0], **model},
        "score": {"labels": 1, **checkpoint.score},
        "source": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "format": checkpoint.format,
            "sha256": digest_of_files(files),
            "files": dict(files),
        },
        "precisions": list(graphs),
        "graphs": dict(graphs),
        "versions": versions(),
        "machine": machine(),
    }


def write_manifest(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Seal `document`, which names its `files`, and write it to the manifest of `folder`; return it sealed.

    >>> write_manifest(staging, {**document, "files": list_files(staging)})

    Raises OSError.
    """
    manifest = seal(document)
    write_json(folder / MANIFEST, manifest)
    return manifest


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Take the sha256 and the size of every file in `folder`, but for the manifest.

    >>> list_files(Path("my-bundle"))["config.json"]["bytes"]
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths
    }


def keep_chosen(folder: Path, document: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """Remove the CPU's models that were not `chosen`; write the final manifest, with the digests that were proven.

    >>> keep_chosen(staging, {**written, "parity": parity}, ["int8"])["precisions"]
    ['int8']

    Raises OSError.
    """
    files = dict(document["files"])
    for precision in sorted(set(document["precisions"]) - set(chosen)):
        for name in [name for name in files if name.removesuffix(EXTERNAL_SUFFIX) == MODEL_FILES[precision]]:
            (folder / name).unlink()
            del files[name]
    graphs = {precision: document["graphs"][precision] for precision in chosen}
    return write_manifest(folder, {**document, "precisions": list(chosen), "graphs": graphs, "files": files})


def versions() -> dict[str, str]:
    """List the versions of everything that had a hand in the bundle.

    >>> sorted(versions())[:2]
    ['cappy-engine', 'numpy']
    """
    found = {"cappy-engine": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> dict[str, str]:
    """Name the processor and system, on which rounding depends.

    >>> machine()["system"]
    'Linux x86_64'
    """
    return {"cpu": cpu_name(), "system": f"{platform.system()} {platform.machine()}"}
