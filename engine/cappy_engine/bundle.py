"""The bundle: a folder that other tools can read too, and a manifest that says what every file in it must be.

    config.json tokenizer.json tokenizer_config.json ...      as transformers names them
    onnx/model.onnx  model_fp16.onnx  model_quantized.onnx    one per precision (fp32, fp16, int8)
    onnx/model.onnx_data ...                                  the weights of a large one
    manifest.json                                             schema version, source, versions, digests, parity

Nothing is scored with a file whose digest was not checked. Knows nothing of ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cappy_engine.errors import BundleError, PrecisionUnavailable

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL_FILES: Mapping[str, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
}
EXTERNAL_SUFFIX = "_data"
"""A model's weights may lie in a file beside it, whose name is the model's and this."""
PRECISIONS = tuple(MODEL_FILES)
MIN_LENGTH = 8
"""The shortest `max_length`: a few special tokens, and some of each text."""


EMBEDDED = Path(__file__).parent / "mini"
"""The bundle that ships with the package: cappy-mini, a small model in int8."""


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What the engine needs of `manifest.json`; `document` is all of it, as parsed.

    `unpadded` are the precisions whose graphs compute nothing for padding, `batch_dependent` those in which a pair's
    score changes with its neighbours: int8 of bundles that were written before `unpadded` was noted in them.
    """

    max_length: int
    pad_token_id: int
    precisions: tuple[str, ...]
    unpadded: frozenset[str]
    batch_dependent: frozenset[str]
    files: Mapping[str, FileEntry]
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file is there in its right size, and all but the models have their digest checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names; BundleError if it does not."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.path} has no {name}; it is not complete")
        return self.path / name

    def model(self, precision: str) -> Path:
        """The path of the model of `precision`, which `check_model` must accept before anything is scored with it.

        Raises PrecisionUnavailable if the bundle has none.
        """
        if precision not in self.manifest.precisions:
            raise PrecisionUnavailable(
                f"bundle {self.path} has no {precision} model, only {', '.join(self.manifest.precisions)}; "
                f"export it with --precision {precision}"
            )
        return self.file(MODEL_FILES[precision])

    def check_model(self, precision: str) -> None:
        """Raise BundleError unless the files of the model of `precision` are what was exported, byte by byte."""
        for name in self.model_files(precision):
            _check_digest(self.path, name, self.manifest.files[name])

    def model_files(self, precision: str) -> list[str]:
        """Names of the files that hold the model of `precision`: the graph, and its weights if they lie beside it."""
        names = (MODEL_FILES[precision], MODEL_FILES[precision] + EXTERNAL_SUFFIX)
        return [name for name in names if name in self.manifest.files]


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle in the folder `path`.

    All files must exist in the right size, and nothing may lie in `onnx/` that the manifest does not name (a model
    could read it as external data). The digests of all small files are checked here, that of a model when it is used.
    Raises BundleError, naming the file and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"no bundle at {folder}: {'not a folder' if folder.exists() else 'it does not exist'}")
    manifest = _read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_size(folder, name, entry)
        if name.removesuffix(EXTERNAL_SUFFIX) not in MODEL_FILES.values():
            _check_digest(folder, name, entry)
    for found in sorted((folder / "onnx").rglob("*")):
        name = found.relative_to(folder).as_posix()
        if (found.is_symlink() or not found.is_dir()) and name not in manifest.files:
            raise BundleError(
                f"bundle {folder} holds {name}, which its manifest does not name; remove it or export again"
            )
    return Bundle(folder, manifest)


def sha256_of(path: Path) -> str:
    """The file's sha256 as 64 hexadecimal digits."""
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
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; make one with 'cappy export'") from error
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path} is no bundle's manifest: it has no schema_version")
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
        manifest = Manifest(
            max_length=int(document["model"]["max_length"]),
            pad_token_id=int(document["model"]["pad_token_id"]),
            precisions=tuple(map(str, document["precisions"])),
            unpadded=frozenset(
                str(name) for name, graph in document.get("graphs", {}).items() if graph.get("unpadded") is True
            ),
            batch_dependent=frozenset({"int8"} if "unpadded" not in document.get("graphs", {}).get("int8", {}) else ()),
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
    unknown = [name for name in manifest.precisions if name not in MODEL_FILES]
    if unknown or not manifest.precisions:
        raise BundleError(f"{path} names the precisions {list(manifest.precisions)}; known are {', '.join(PRECISIONS)}")
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
