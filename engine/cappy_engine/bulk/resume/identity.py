"""Say what decides an output's bytes, so that a run goes on as it began."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine import storage
from cappy_engine.scorer import Scorer

BLOCKS = 256
BLOCK_BYTES = 2**20


def fingerprint(path: Path) -> str:
    """Make a digest of a file's size and content. Of more than 256 MiB, as much is read, spread over it.

        >>> fingerprint(Path("pairs.jsonl"))
        '1042 bytes, sha256 3f786850e387550f'

    Raises OSError.
    """
    with storage.open_regular(path) as file:  # a pipe would be read empty here
        return fingerprint_of(file)


def fingerprint_of(file: BinaryIO) -> str:
    """Make the `fingerprint` of an open file. Raises OSError.

    >>> fingerprint_of(open("pairs.jsonl", "rb"))
    '1042 bytes, sha256 3f786850e387550f'
    """
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256()
    file.seek(0)
    if size <= BLOCKS * BLOCK_BYTES:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    else:
        for number in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return f"{size} bytes, sha256 {digest.hexdigest()[:16]}"


def inputs_of(paths: Sequence[Path]) -> dict[str, str]:
    """Make the fingerprints of inputs, by name; the folder does not matter.

    >>> inputs_of([Path("pairs.jsonl")])
    {'pairs.jsonl': '1042 bytes, sha256 3f786850e387550f'}
    """
    names = [path.name for path in paths]
    if len(names) != len(set(names)):
        names = list(map(str, paths))
    numbered = [f"{place}:{name}" if place else name for place, name in enumerate(names)]
    return {name: fingerprint(path) for name, path in zip(numbered, paths, strict=True)}


def scorer_settings(scorer: Scorer) -> dict[str, Any]:
    """Say what decides scores to the last bit: the bundle, and how batches are run.

    >>> scorer_settings(scorer)["precision"]
    'int8'
    """
    grouping = scorer.dispatcher.grouping
    found: dict[str, Any] = {
        "padding": grouping.padding,
        "max_batch_tokens": grouping.max_batch_tokens,
        "buckets": list(grouping.buckets),
        "workers": scorer.dispatcher.workers,
    }
    try:
        info, bundle = scorer.info, scorer.exact.bundle
    except AttributeError:  # not from Scorer.open
        return found
    manifest = hashlib.sha256(storage.json_bytes(bundle.manifest.document)).hexdigest()
    chosen = {name: getattr(info, name) for name in ("device", "precision", "threads", "mode", "max_length")}
    return {"bundle": f"manifest sha256 {manifest[:16]}", **found, **chosen, "gpus": list(info.gpus)}


def versions(scorer: Scorer) -> dict[str, str]:
    """Name the versions, and the kernels, that may change a score. A run may go on with others, and says so.

    >>> versions(scorer)["kernels"]
    'avx512'
    """
    found = {"python": platform.python_version(), "machine": platform.machine()}
    with contextlib.suppress(AttributeError):  # not from Scorer.open
        found["kernels"] = scorer.info.kernels.partition(" ")[0].rstrip(":")
    for name in ("cappy-engine", "onnxruntime", "onnxruntime-gpu", "tokenizers", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
