"""Open a bundle: a folder that other tools can read too, with a manifest that says what every file must be.

    config.json tokenizer.json tokenizer_config.json ...      as transformers names them
    onnx/model.onnx  model_fp16.onnx  model_quantized.onnx    for CPUs, one per precision (fp32, fp16, int8)
    onnx/model.onnx_data ...                                  the weights of a large one
    cuda/model.onnx ...  tensorrt/model.onnx ...              the same for GPUs, where the export was asked for them
    manifest.json                                             schema version, source, versions, digests, parity

Nothing is scored with a file whose digest was not checked. Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cappy_engine.checks import described
from cappy_engine.errors import BundleError, PrecisionUnavailable

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL_FILES: Mapping[str, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
}
TARGETS: Mapping[str, Mapping[str, str]] = {
    "cpu": MODEL_FILES,
    "cuda": {"fp32": "cuda/model.onnx", "fp16": "cuda/model_fp16.onnx"},
    "tensorrt": {
        "fp32": "tensorrt/model.onnx",
        "fp16": "tensorrt/model_fp16.onnx",
        "int8": "tensorrt/model_int8.onnx",
    },
}
"""The model files by the device they are made for, and the precisions that it runs."""
EXTERNAL_SUFFIX = "_data"
"""A model's weights may lie in a file beside it, whose name is the model's and this."""
PRECISIONS = tuple(MODEL_FILES)
MIN_LENGTH = 8
"""The shortest `max_length`: a few special tokens, and some of each text."""

_ALL_MODELS = frozenset(name for files in TARGETS.values() for name in files.values())
_MODEL_FOLDERS = sorted({name.partition("/")[0] for name in _ALL_MODELS})

EMBEDDED = Path(__file__).parent / "mini"
"""The bundle that ships with the package: cappy-mini, a small model in int8."""


@dataclass(frozen=True)
class FileEntry:
    """The digest and the size that the manifest gives for one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The parts of `manifest.json` that the engine needs; `document` is all of it, as parsed.

    `precisions` are those of the models for CPUs, `targets` has them for GPUs. `unpadded` are the models (target and
    precision) whose graphs compute nothing for padding. `buckets` are the lengths of TensorRT's engines.
    """

    max_length: int
    pad_token_id: int
    precisions: tuple[str, ...]
    targets: Mapping[str, tuple[str, ...]]
    unpadded: frozenset[tuple[str, str]]
    buckets: tuple[int, ...]
    files: Mapping[str, FileEntry]
    document: Mapping[str, Any]

    def precisions_for(self, target: str) -> tuple[str, ...]:
        """List the precisions of the models that were made for `target`."""
        return self.precisions if target == "cpu" else self.targets.get(target, ())


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file is there in its right size, and all but the models have their digest checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Give the path of a file. Raises BundleError if the manifest does not name it."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.path} has no {name}; it is not complete")
        return self.path / name

    def model(self, precision: str, target: str = "cpu") -> Path:
        """Give the path of a model; `check_model` must accept it before it scores anything.

        Raises PrecisionUnavailable if the bundle has none.
        """
        there = self.manifest.precisions_for(target)
        if precision not in there:
            raise PrecisionUnavailable(
                f"bundle {self.path} has no {precision} model for {target}, only {', '.join(there) or 'none'}; "
                f"export it with --precision {precision}{'' if target == 'cpu' else f' --target {target}'}"
            )
        return self.file(TARGETS[target][precision])

    def check_model(self, precision: str, target: str = "cpu") -> None:
        """Raise BundleError unless the model's files are what was exported, byte by byte."""
        for name in self.model_files(precision, target):
            _check_digest(self.path, name, self.manifest.files[name])

    def largest_error(self, precision: str, target: str = "cpu") -> float:
        """Tell how far this model's scores may be from PyTorch's, by the bundle's own proof.

        For the CPU, the largest error over the parity pairs; for GPUs, what the canary tolerates. Raises BundleError if
        the manifest does not say.
        """
        document = self.manifest.document
        try:
            if target == "cpu":
                return float(document["parity"]["precisions"][precision]["max_error"])
            return float(document["canary"]["tolerance"][target][precision])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"bundle {self.path} says nothing of {precision}'s errors on {target}; export it again"
            ) from error

    def model_files(self, precision: str, target: str = "cpu") -> list[str]:
        """Name the files that hold the model: the graph, and its weights if they lie beside it."""
        name = TARGETS[target][precision]
        return [found for found in (name, name + EXTERNAL_SUFFIX) if found in self.manifest.files]


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in the folder `path`.

        >>> open_bundle("cappy-bundle").manifest.precisions
        ('fp32', 'int8')

    All files must exist in the right size, and nothing may lie beside a model that the manifest does not name (it could
    be read as external data). The digests of all small files are checked here, that of a model when it is used.
    Raises BundleError, naming the file and what to do; also for None and "", which name no folder.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise BundleError(
            f"a bundle's folder is needed, got {described(path)}; is a variable not set? Scorer.open() without any "
            "opens cappy-mini"
        )
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"no bundle at {folder}: {'not a folder' if folder.exists() else 'it does not exist'}")
    manifest = _read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_size(folder, name, entry)
        if name.removesuffix(EXTERNAL_SUFFIX) not in _ALL_MODELS:
            _check_digest(folder, name, entry)
    for found in sorted(path for parent in _MODEL_FOLDERS for path in (folder / parent).rglob("*")):
        name = found.relative_to(folder).as_posix()
        if (found.is_symlink() or not found.is_dir()) and name not in manifest.files:
            raise BundleError(
                f"bundle {folder} holds {name}, which its manifest does not name; remove it or export again"
            )
    return Bundle(folder, manifest)


def sha256_of(path: Path) -> str:
    """Compute the file's sha256, as 64 hexadecimal digits.

    >>> sha256_of(Path("cappy-bundle/config.json"))[:4]
    '9f2c'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest `document` with the digest of its own content in `manifest_sha256`."""
    content = {key: value for key, value in document.items() if key != "manifest_sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with 'cappy export'") from error
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path} is not a bundle's manifest: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}; this cappy-engine reads up to {SCHEMA_VERSION}: upgrade it"
        )
    try:
        is_sealed = seal(document) == document
    except ValueError:  # NaN or infinity, which `seal` never lets in
        is_sealed = False
    if not is_sealed:
        raise BundleError(
            f"{path} was changed after the export (its own digest does not match); export the bundle again"
        )
    return _parse(document, path)


def _parse(document: Mapping[str, Any], path: Path) -> Manifest:
    try:
        files = {
            name: FileEntry(str(entry["sha256"]), int(entry["bytes"])) for name, entry in document["files"].items()
        }
        targets = {"cpu": document, **document.get("targets", {})}
        precisions = {target: tuple(map(str, part["precisions"])) for target, part in targets.items()}
        manifest = Manifest(
            max_length=int(document["model"]["max_length"]),
            pad_token_id=int(document["model"]["pad_token_id"]),
            precisions=precisions["cpu"],
            targets={target: found for target, found in precisions.items() if target != "cpu"},
            unpadded=frozenset(
                (target, str(name))
                for target, part in targets.items()
                for name, graph in part.get("graphs", {}).items()
                if graph.get("unpadded") is True
            ),
            buckets=tuple(map(int, targets.get("tensorrt", {}).get("buckets", ()))),
            files=files,
            document=document,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} lacks what a manifest needs ({error!r}); export the bundle again") from error
    for name in files:
        is_outside = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        if is_outside or "\\" in name or "\0" in name:
            raise BundleError(f"{path} names a file outside of the bundle: {name!r}")
    if manifest.max_length < MIN_LENGTH or manifest.pad_token_id < 0:
        raise BundleError(
            f"{path} has max_length {manifest.max_length} (at least {MIN_LENGTH} is needed) and pad_token_id "
            f"{manifest.pad_token_id} (at least 0); export the bundle again"
        )
    for target, precisions_there in precisions.items():
        known = TARGETS.get(target, {})
        if not known or not set(precisions_there) <= set(known):
            raise BundleError(
                f"{path} names the precisions {list(precisions_there)} for {target}; known are "
                f"{', '.join(known) or 'none: a newer cappy-engine may know them'}"
            )
    if not any(precisions.values()):
        raise BundleError(f"{path} names no precisions at all; known are {', '.join(PRECISIONS)}")
    return manifest


def _check_size(folder: Path, name: str, entry: FileEntry) -> None:
    try:
        status = (folder / name).stat()
    except OSError as error:
        raise BundleError(f"bundle {folder} lacks {name} ({error.strerror}); export it again") from error
    except UnicodeEncodeError as error:
        raise BundleError(f"the manifest of bundle {folder} names a file outside of the bundle: {name!r}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{name} in bundle {folder} is not a regular file; export it again")
    size = status.st_size
    if size != entry.size_bytes:
        raise BundleError(f"{name} in bundle {folder} has {size} bytes instead of {entry.size_bytes}; export it again")


def _check_digest(folder: Path, name: str, entry: FileEntry) -> None:
    try:
        found = sha256_of(folder / name)
    except OSError as error:
        raise BundleError(f"{name} in bundle {folder} cannot be read ({error})") from error
    if found != entry.sha256:
        raise BundleError(
            f"{name} in bundle {folder} is not the file that was exported "
            f"(sha256 {found[:12]}..., expected {entry.sha256[:12]}...); export it again"
        )
