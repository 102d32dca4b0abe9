"""Copy bundles and break the copies: the one place that writes manifests for tests. Needs the engine only."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cappy_engine.bundle import MANIFEST, MODEL_FILES, TARGETS, seal
from tests.support.places import TINY

Manifest = dict[str, Any]
Change = Callable[[Manifest], object]

SMALL_FILES = [
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
"""The tiny bundle's files but for its manifest and its models."""
MODELS = [name for files in TARGETS.values() for name in files.values() if name != MODEL_FILES["bf16"]]
"""The tiny bundle's models: it is older than bf16."""


def copy_bundle(folder: Path, *, source: Path = TINY) -> Path:
    """Copy a bundle to `folder`, where it may be broken."""
    return Path(shutil.copytree(source, folder))


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest as it stands."""
    found: Manifest = json.loads((folder / MANIFEST).read_bytes())
    return found


def write_manifest(folder: Path, document: Manifest) -> None:
    """Write a manifest with its own digest in it."""
    (folder / MANIFEST).write_text(json.dumps(seal(document)), encoding="utf-8")


def change_manifest(folder: Path, change: Change) -> None:
    """Change the manifest and seal it again, as a newer exporter or a forger would."""
    document = read_manifest(folder)
    change(document)
    write_manifest(folder, document)


def without(*keys: str) -> Change:
    """Make a change that removes the value under `keys`."""

    def change(document: Manifest) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


def with_value(value: object, *keys: str) -> Change:
    """Make a change that puts `value` under `keys`."""

    def change(document: Manifest) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def add_file(folder: Path, document: Manifest, name: str, content: bytes) -> None:
    """Write a file into the bundle, and its size and digest into `document`."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    document["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def remove_file(folder: Path, document: Manifest, name: str) -> None:
    """Remove a file from the bundle and from `document`."""
    (folder / name).unlink()
    del document["files"][name]


def keep_precisions(folder: Path, *precisions: str) -> Path:
    """Leave the CPU no other models than those of `precisions`; GPUs keep theirs."""
    document = read_manifest(folder)
    for precision in set(document["precisions"]) - set(precisions):
        remove_file(folder, document, MODEL_FILES[precision])
    document["precisions"] = list(precisions)
    write_manifest(folder, document)
    return folder


def keep_targets(folder: Path, *targets: str) -> Path:
    """Leave no other models than those for `targets`: "cpu" and the GPUs' ones that are named."""
    document = read_manifest(folder)
    for target in set(document["targets"]) - set(targets):
        for precision in document["targets"].pop(target)["precisions"]:
            remove_file(folder, document, TARGETS[target][precision])
    write_manifest(folder, document)
    return folder


def flip_byte(path: Path, at: int) -> None:
    """Change one byte of a file, whose size stays."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x01
    path.write_bytes(content)
