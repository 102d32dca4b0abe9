"""Converts a model once for each state of what the conversion depends on. It needs the standard library only.

A folder of conversions is named by the model's weights. Beside each conversion stands what it was made with: the
versions of all packages of its environment, the CPU's instruction sets, which decide what a quantiser does, and a
digest of the files that it comes from. A conversion that was made otherwise, or that does not say how, is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cappy_engine.cpu.cores import cpu_flags

MARK = ".made-with.json"


def convert_once(target: Path, make: Callable[[Path], object], *, sources: Sequence[Path]) -> None:
    """Let `make` write the file or folder `target`, unless a current one is there.

    It is current if it was made with the same packages, instruction sets and `sources`. `sources` are the files with
    the code, and with all that the code reads besides the checkpoint. `make` gets another path, which becomes `target`
    when it is whole.

        >>> convert_once(model.folder / "fp32", convert, sources=[Path(__file__)])
    """
    mark, facts = target.with_name(target.name + MARK), _facts(sources)
    if target.exists() and _read(mark) == facts:
        return
    making = target.with_name(f"{target.name}-making")
    mark.unlink(missing_ok=True)  # first: what is stopped from here on is made again
    _remove(target)
    _remove(making)
    make(making)
    making.rename(target)
    mark.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _facts(sources: Sequence[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in (Path(__file__), *sources):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {
        "packages": dict(sorted((str(one.name), one.version) for one in metadata.distributions())),
        "cpu_flags": sorted(cpu_flags()),
        "sources_sha256": digest.hexdigest(),
    }


def _read(mark: Path) -> object:
    """Read what a conversion was made with; None where that cannot be read."""
    try:
        return json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
