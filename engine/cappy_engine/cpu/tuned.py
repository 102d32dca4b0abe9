"""Keep what `cappy tune` measured, outside of the bundle: one file for each processor, model and runtime."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from cappy_engine.bundle import Bundle
from cappy_engine.cpu.cores import cpu_name
from cappy_engine.cpu.execution import MODES, Execution
from cappy_engine.cpu.kernels import choose_kernels
from cappy_engine.errors import OutputError, reason_of
from cappy_engine.json_values import text, whole
from cappy_engine.session import load_runtime
from cappy_engine.storage import read_regular, write_json

MAX_BYTES = 2**20
"""The largest file that is read as an answer; one has some 500 bytes."""

log = logging.getLogger(__name__)


def tuning_facts(bundle: Bundle, precision: str, threads: int) -> dict[str, object]:
    """Gather all that the best mode and batch size depend on: processor, kernels, threads, ONNX Runtime, the model."""
    return {
        "cpu": cpu_name(),
        "kernels": choose_kernels(bundle, precision).used,
        "threads": threads,
        "onnxruntime": str(load_runtime().__version__),
        "model": [bundle.manifest.files[name].sha256 for name in bundle.model_files(precision)],
    }


def tuned_key(facts: Mapping[str, object]) -> str:
    """Name an answer by a digest of its facts, 32 hexadecimal digits.

    >>> len(tuned_key({"threads": 2}))
    32
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def read_tuned(folder: Path, key: str) -> Execution | None:
    """Read the answer kept under `key`, or None. A damaged file is ignored, and a warning says so."""
    path = folder / f"{key}.json"
    try:
        document = json.loads(read_regular(path, limit=MAX_BYTES))
        found = Execution(text(document["mode"]), whole(document["max_batch_tokens"]), text(document["reason"]))
        if found.mode not in MODES or found.max_batch_tokens < 1:
            raise ValueError(f"mode {found.mode!r}, max_batch_tokens {found.max_batch_tokens}")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("ignoring %s, which is not an answer of cappy tune (%r); run it again", path, error)
        return None
    return found


def check_kept(folder: Path) -> None:
    """Make the folder of answers. Raises OutputError if it is none that can be written to.

    >>> check_kept(cache_folder())
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(
            f"the answer cannot be kept in {folder} ({reason_of(error)}); name another folder in CAPPY_CACHE"
        ) from error


def write_tuned(folder: Path, key: str, execution: Execution, facts: Mapping[str, object]) -> Path:
    """Keep the answer under `key`, with the `facts` it was measured with; returns its path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    write_json(path, {**asdict(execution), "facts": dict(facts)})
    return path


def forget_tuned(folder: Path, models: Collection[str] | None = None) -> int:
    """Remove the answers that are kept, of the models with these digests (None: all); returns how many.

    >>> forget_tuned(cache_folder())
    2

    Raises OSError.
    """
    kept = [path for path in folder.glob("*.json") if re.fullmatch(r"[0-9a-f]{32}", path.stem)]
    found = [path for path in kept if models is None or not set(models).isdisjoint(_models_of(path))]
    for path in found:
        path.unlink()
    return len(found)


def _models_of(path: Path) -> list[str]:
    """The digests of the model that an answer is for; empty if the file is not an answer."""
    try:
        return list(map(str, json.loads(read_regular(path, limit=MAX_BYTES))["facts"]["model"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
