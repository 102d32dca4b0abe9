"""Open a bundle: a folder that other tools can read too, with a manifest that says what every file must be.

    config.json tokenizer.json tokenizer_config.json ...      as transformers names them
    onnx/model.onnx  model_fp16.onnx  model_bf16.onnx  model_quantized.onnx    for CPUs (fp32, fp16, bf16, int8)
    onnx/model.onnx_data ...                                  the weights of a large one
    cuda/model.onnx ...  tensorrt/model.onnx ...              the same for GPUs, where the export was asked for them
    manifest.json                                             schema version, source, versions, digests, parity

Nothing is scored with a file whose digest was not checked. Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cappy_engine.bundle_files import (
    EXTERNAL_SUFFIX,
    FileEntry,
    ModelFiles,
    check_is_folder,
    check_nothing_else,
    check_size,
    read_checked,
)
from cappy_engine.checks import described
from cappy_engine.errors import BundleError, CappyError, PrecisionUnavailable, is_shortage, reason_of
from cappy_engine.json_values import size, text, whole
from cappy_engine.overlap import beside
from cappy_engine.publish import Kind
from cappy_engine.storage import read_regular

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BUNDLE = Kind("a bundle", MANIFEST)
MODEL_FILES: Mapping[str, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "bf16": "onnx/model_bf16.onnx",
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
PRECISIONS = tuple(MODEL_FILES)
MIN_LENGTH = 8
"""The shortest `max_length`: a few special tokens, and some of each text."""
MAX_LENGTH = 2**20
"""The longest `max_length`, far above what any text encoder takes."""
MAX_TOKEN_ID = 2**31 - 1
MAX_MANIFEST_BYTES = 16 * 2**20

_ALL_MODELS = frozenset(name for files in TARGETS.values() for name in files.values())
_MODEL_FOLDERS = sorted({name.partition("/")[0] for name in _ALL_MODELS})

EMBEDDED = Path(__file__).parent / "mini"
"""The bundle that ships with the package: cappy-mini, a small model in int8."""


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
    """An opened bundle: every file but the models is there, with its digest checked.

    `path` is absolute, without links. `missing` says of model files that are not there, or not in their size, what is
    wrong: an error only where they are used.
    """

    path: Path
    manifest: Manifest
    missing: Mapping[str, str] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Give the path of a file. Raises BundleError if the manifest does not name it."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.path} has no {name}; it is not complete")
        return self.path / name

    def read(self, name: str) -> bytes:
        """Read a file that is not a model. Raises BundleError unless these bytes are what was exported."""
        self.file(name)
        return read_checked(self.path, name, self.manifest.files[name])

    def model(self, precision: str, target: str = "cpu") -> Path:
        """Give the path of a model; `check_model` must accept it before it scores anything.

        Raises PrecisionUnavailable if the bundle has none, and BundleError if its files were left out.
        """
        there = self.manifest.precisions_for(target)
        if precision not in there:
            raise PrecisionUnavailable(
                f"bundle {self.path} has no {precision} model for {target}, only {', '.join(there) or 'none'}; "
                f"export it with --precision {precision}{'' if target == 'cpu' else f' --target {target}'}"
            )
        for name in self.model_files(precision, target):
            if name in self.missing:
                raise BundleError(self.missing[name])
        return self.file(TARGETS[target][precision])

    def open_model(self, precision: str, target: str = "cpu") -> ModelFiles:
        """Open a model's files, whose `check` must accept them. Raises what `model` raises."""
        self.model(precision, target)
        return ModelFiles(self.path, {name: self.manifest.files[name] for name in self.model_files(precision, target)})

    def check_model(self, precision: str, target: str = "cpu") -> None:
        """Raise BundleError unless the model's files are what was exported, byte by byte."""
        self.open_model(precision, target).check()

    @contextlib.contextmanager
    def checked(self, precision: str, target: str = "cpu") -> Iterator[ModelFiles]:
        """Yield a model's files for loading; their digests are computed meanwhile, which halves the time.

        >>> with bundle.checked("int8") as files:
        ...     session = open_session(files.path)

        Raises BundleError after the block unless what was loaded is what was exported.
        """
        files = self.open_model(precision, target)
        with beside(files.check) as checked:
            try:
                yield files
            except CappyError:
                checked()  # that the file was changed explains more than that it cannot be loaded
                raise
            checked()
        files.check_loaded()

    @contextlib.contextmanager
    def used_again(self) -> Iterator[None]:
        """Add to a BundleError in the block that the bundle changed since it was opened."""
        try:
            yield
        except BundleError as error:
            if is_shortage(error.__cause__):
                raise
            raise BundleError(f"bundle {self.path} changed since it was opened ({error}); open it again") from error

    def largest_error(self, precision: str, target: str = "cpu") -> float:
        """Tell how far this model's scores may be from PyTorch's, by the bundle's own proof.

        For the CPU, the largest error over the parity pairs, with kernels or without; for GPUs, what the canary
        tolerates. Raises BundleError if the manifest does not say, or says what cannot be.
        """
        document = self.manifest.document
        try:
            if target == "cpu":
                row = document["parity"]["precisions"][precision]
                return max(size(each["max_error"]) for each in (row, row.get("without_kernels", row)))
            return size(document["canary"]["tolerance"][target][precision])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"bundle {self.path} says nothing of {precision}'s errors on {target} ({error!r}); export it again"
            ) from error

    def model_files(self, precision: str, target: str = "cpu") -> list[str]:
        """Name the files that hold the model: the graph, and its weights if they lie beside it."""
        name = TARGETS[target][precision]
        return [found for found in (name, name + EXTERNAL_SUFFIX) if found in self.manifest.files]


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in the folder `path`.

        >>> open_bundle("cappy-bundle").manifest.precisions
        ('fp32', 'int8')

    All files but the models must be there, in their size and with their digest. A model is checked when it is used, and
    may be left out if it never is. Nothing may lie beside a model that the manifest does not name (it could be read as
    external data). Only regular files are opened. Raises BundleError, which names the file; also for None and "".
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise BundleError(
            f"a bundle's folder is needed, got {described(path)}; is a variable not set? Scorer.open() without any "
            "opens cappy-mini"
        )
    folder = Path(path)
    check_is_folder(folder)
    manifest = _read_manifest(folder)
    missing = {}
    for name, entry in manifest.files.items():
        if name.removesuffix(EXTERNAL_SUFFIX) not in _ALL_MODELS:
            read_checked(folder, name, entry)
            continue
        try:
            check_size(folder, name, entry)
        except BundleError as error:
            missing[name] = str(error)
    check_nothing_else(folder, _MODEL_FOLDERS, manifest.files)
    return Bundle(folder.resolve(), manifest, missing)


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest `document` with the digest of its own content in `manifest_sha256`."""
    content = {key: value for key, value in document.items() if key != "manifest_sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        document = json.loads(read_regular(path, limit=MAX_MANIFEST_BYTES))
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with 'cappy export'") from error
    except (ValueError, RecursionError, OSError) as error:
        advice = "this process needs more" if is_shortage(error) else "export the bundle again"
        raise BundleError(f"{path} cannot be read ({reason_of(error)}); {advice}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int:
        raise BundleError(f"{path} is not a bundle's manifest: it has no schema_version")
    if version > SCHEMA_VERSION:
        known = f"this cappy-engine reads up to {SCHEMA_VERSION}"
        raise BundleError(f"{path} has schema version {version}; {known}: upgrade it")
    try:
        is_sealed = seal(document) == document
    except (ValueError, RecursionError):  # NaN or infinity, which `seal` never lets in; too many lists in lists
        is_sealed = False
    if not is_sealed:
        problem = "was changed after the export (its own digest does not match)"
        raise BundleError(f"{path} {problem}; export the bundle again")
    return _parse(document, path)


def _parse(document: Mapping[str, Any], path: Path) -> Manifest:
    try:
        files = {
            name: FileEntry(text(entry["sha256"]), whole(entry["bytes"])) for name, entry in document["files"].items()
        }
        targets = {"cpu": document, **document.get("targets", {})}
        precisions = {target: tuple(map(text, part["precisions"])) for target, part in targets.items()}
        manifest = Manifest(
            max_length=whole(document["model"]["max_length"]),
            pad_token_id=whole(document["model"]["pad_token_id"]),
            precisions=precisions["cpu"],
            targets={target: found for target, found in precisions.items() if target != "cpu"},
            unpadded=frozenset(
                (target, str(name))
                for target, part in targets.items()
                for name, graph in part.get("graphs", {}).items()
                if graph.get("unpadded") is True
            ),
            buckets=tuple(map(whole, targets.get("tensorrt", {}).get("buckets", ()))),
            files=files,
            document=document,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} lacks what a manifest needs ({error!r}); export the bundle again") from error
    for name in files:
        is_outside = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        if is_outside or "\\" in name or not name.isprintable():
            raise BundleError(f"{path} names a file outside of the bundle: {name!r}")
    if not MIN_LENGTH <= manifest.max_length <= MAX_LENGTH or not 0 <= manifest.pad_token_id <= MAX_TOKEN_ID:
        raise BundleError(
            f"{path} has max_length {manifest.max_length} ({MIN_LENGTH} to {MAX_LENGTH}) and pad_token_id "
            f"{manifest.pad_token_id} (0 to {MAX_TOKEN_ID}); export the bundle again"
        )
    for target, precisions_there in precisions.items():
        known = TARGETS.get(target, {})
        if not known or not set(precisions_there) <= set(known):
            raise BundleError(
                f"{path} names the precisions {list(precisions_there)} for {target!r}; known are "
                f"{', '.join(known) or 'none: a newer cappy-engine may know them'}"
            )
    if not any(precisions.values()):
        raise BundleError(f"{path} names no precisions at all; known are {', '.join(PRECISIONS)}")
    return manifest
