"""How a scorer uses the cores: which sessions are open, how large a batch is, and what was measured to be best here.

One pair alone is fastest with all threads on it ("wide" session). Many batches are fastest with one thread each and as
many callers as cores ("narrow" session): no thread waits for another inside of a layer, which costs most where
something else takes a core now and then. A session is a copy of the weights, so both are opened for small models only,
the second when it is first needed; a large one takes the wide session for everything. `cappy tune` measures instead of
assuming, and its answer is kept outside of the bundle, under a key of the processor, the threads, ONNX Runtime and the
model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

MODES = ("latency", "throughput", "both")
"""latency: the wide session only; throughput: the narrow one only; both: each for what it does best."""
SMALL_MODEL_BYTES = 2**29
"""Models up to this size (cappy-large's int8 has 363 MB) are held twice once there are several batches to run."""
BATCH_TOKENS = {"cpu": 512, "cuda": 16_384, "tensorrt": 16_384}
"""Default `max_batch_tokens`: on CPUs larger batches win nothing and wait longer for each other."""


@dataclass(frozen=True)
class Execution:
    """`mode` is one of MODES; `reason` says where it comes from."""

    mode: str
    max_batch_tokens: int
    reason: str


def choose_execution(
    mode: str, *, device: str, threads: int, model_bytes: int, tuned: Execution | None, max_batch_tokens: int | None
) -> Execution:
    """How to run: what was asked for, else what `cappy tune` found, else by the model's size.

    With one thread, or off the CPU, there is but one session, whatever the mode: it is called "latency".
    """
    if device != "cpu":
        tuned = None  # it was measured on the CPU
    budget = max_batch_tokens or (tuned.max_batch_tokens if tuned else BATCH_TOKENS[device])
    if device != "cpu" or threads == 1:
        return Execution("latency", budget, "one session")
    if mode != "auto":
        return Execution(mode, budget, "asked for")
    if tuned is not None:
        return Execution(tuned.mode, budget, "measured by cappy tune")
    if model_bytes <= SMALL_MODEL_BYTES:
        return Execution("both", budget, "auto: a small model is held twice")
    return Execution("latency", budget, "auto: a large model is held once")


def tuned_key(facts: Mapping[str, object]) -> str:
    """The name under which an answer is kept: a digest of all that it depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def tuned_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where answers are kept: CAPPY_CACHE, else cappy-engine in XDG_CACHE_HOME, or in .cache of HOME (for users
    without one, of the system's folder for temporary files)."""
    if environment.get("CAPPY_CACHE"):
        return Path(environment["CAPPY_CACHE"])
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]) / "cappy-engine"
    return Path(environment.get("HOME") or tempfile.gettempdir()) / ".cache" / "cappy-engine"


def read_tuned(folder: Path, key: str) -> Execution | None:
    """The answer kept under `key`, or None. A file that is no answer is ignored, and a warning says so."""
    path = folder / f"{key}.json"
    try:
        document = json.loads(path.read_bytes())
        found = Execution(str(document["mode"]), int(document["max_batch_tokens"]), str(document["reason"]))
        if found.mode not in MODES or found.max_batch_tokens < 1:
            raise ValueError(f"mode {found.mode!r}, max_batch_tokens {found.max_batch_tokens}")
    except OSError:  # it is not there, or not ours to read
        return None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        log.warning("ignoring %s, which is no answer of cappy tune (%r); run it again", path, error)
        return None
    return found


def write_tuned(folder: Path, key: str, execution: Execution, facts: Mapping[str, object]) -> Path:
    """Keep the answer under `key`, with the `facts` it was measured with, whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    descriptor, partial = tempfile.mkstemp(prefix=f".{key}-", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({**asdict(execution), "facts": dict(facts)}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
        raise
    return path
