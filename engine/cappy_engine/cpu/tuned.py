"""Keep what `cappy tune` measured, outside of the bundle: one file for each processor, model and runtime."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from cappy_engine.bundle import Bundle
from cappy_engine.cpu.cores import cpu_name
from cappy_engine.cpu.execution import MODES, Execution
from cappy_engine.cpu.kernels import choose_kernels
from cappy_engine.errors import OutputError, is_callers, reason_of
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
    """Read the answer kept under `key`, or None. One that cannot be read is left out, and a warning says so."""
    path = folder / f"{key}.json"
    try:
        return _execution_of(json.loads(read_regular(path, limit=MAX_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if is_callers(error):
            raise
        if isinstance(error, OSError) and not os.path.lexists(path):  # also in a folder that cannot be entered
            return None
        log.warning(
            "the answer of cappy tune in %s cannot be read (%s), so defaults are used; measure again with cappy tune, "
            "or remove it with cappy tune --clear",
            path,
            reason_of(error)[:200],
        )
        return None


def _execution_of(document: object) -> Execution:
    """Make an answer of its JSON. Raises TypeError and ValueError."""
    if not isinstance(document, dict) or not {"mode", "max_batch_tokens", "reason"} <= document.keys():
        raise ValueError("it is not a JSON object with mode, max_batch_tokens and reason")
    found = Execution(text(document["mode"]), whole(document["max_batch_tokens"]), text(document["reason"]))
    if found.mode not in MODES or found.max_batch_tokens < 1:
        raise ValueError(f"mode {found.mode!r}, max_batch_tokens {found.max_batch_tokens}")
    return found


def prepare_folder(folder: Path) -> None:
    """Make the folder of answers, and try to write there. Raises OutputError if one of them fails.

    >>> prepare_folder(cache_folder())
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if is_callers(error):
            raise
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

    A file that does not tell its models is removed, too. If one cannot be removed, the others are, and then this
    raises OSError.
    """
    kept = [path for path in folder.glob("*.json") if re.fullmatch(r"[0-9a-f]{32}", path.stem)]
    found = [path for path in kept if models is None or _is_for(path, models)]
    failed: list[OSError] = []
    for path in found:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return len(found)


def _is_for(path: Path, models: Collection[str]) -> bool:
    """Tell if a file is an answer for a model with one of these digests. Also true if it is not an answer."""
    try:
        document = json.loads(read_regular(path, limit=MAX_BYTES))
        return not set(models).isdisjoint(map(text, document["facts"]["model"]))
    except OSError as error:  # what only this process cannot read may be another's
        return error.errno == errno.EFBIG or _is_special(path)
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def _is_special(path: Path) -> bool:
    """True for a link, a FIFO, a socket or a device. False for what is not there."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
