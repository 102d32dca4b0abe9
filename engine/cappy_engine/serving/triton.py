"""Write a model repository for NVIDIA's Triton: a model that scores texts, and the ONNX file as a second one.

    REPO/NAME/config.pbtxt           Python backend, dynamic batching; texts in, scores out
    REPO/NAME/1/model.py             imports our class: cappy-engine is installed where Triton runs
    REPO/NAME/1/bundle/              what it opens: the bundle with one model
    REPO/NAME-onnx/config.pbtxt      ONNX Runtime backend; token ids in, logits out
    REPO/NAME-onnx/1/model.onnx

Knows the format of Triton's config.pbtxt (model_config.proto), and nothing of Triton's code.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

from cappy_engine.bundle import Bundle, open_bundle
from cappy_engine.errors import OutputError
from cappy_engine.options import Asked, Precision, ScorerOptions, check_asked, choose_precision
from cappy_engine.pairs import TOO_LONG, TooLong
from cappy_engine.publish import Kind, publish, staging_folder
from cappy_engine.serving.triton_model import BUNDLE_FOLDER
from cappy_engine.session import open_session
from cappy_engine.slim import slim

CONFIG = "config.pbtxt"
MODEL = Kind("a model of Triton", CONFIG)
MODEL_PY = '''"""Score pairs of texts. Written by `cappy triton`; cappy-engine must be installed for Triton's Python."""

from cappy_engine.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
ONNX_PAIRS = 64
"""Pairs that the ONNX model gets at once: they are padded to one length, and all in memory."""
INT32, UINT32 = 2**31 - 1, 2**32 - 1
"""The largest numbers of config.pbtxt, by their types in model_config.proto."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class TritonOptions:
    """How Triton serves a bundle.

    >>> TritonOptions(name="cappy-large", max_queue=1000)

    Raises ValueError.
    """

    name: Annotated[str, Asked("the model's name; the ONNX model is NAME-onnx")] = "cappy"
    max_pairs: Annotated[int, Asked("pairs that are scored together, and of a request", least=1, most=INT32)] = 1024
    max_queue: Annotated[int, Asked("requests that may wait; more are refused", least=1, most=UINT32)] = 8192
    delay_microseconds: Annotated[
        int, Asked("how long a request waits for others; 0: until the model is free", least=0, most=2**62)
    ] = 0
    request_seconds: Annotated[
        int, Asked("seconds that a request may wait, else it is refused", least=1, most=10**9)
    ] = 60
    too_long: Annotated[
        TooLong, Asked("what to do with a pair of more tokens than the model takes", choices=TOO_LONG)
    ] = "truncate"

    def __post_init__(self) -> None:
        check_asked(self)
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {self.name[:100]!r}")


def write_repository(
    bundle: str | Path,
    repository: str | Path,
    options: ScorerOptions,
    triton: TritonOptions,
    *,
    say: Callable[[str], object] = lambda text: None,
) -> list[Path]:
    """Write both models into a repository, each whole or not at all; returns their folders.

        >>> write_repository("cappy-bundle", "models", ScorerOptions(precision="int8"), TritonOptions())
        [PosixPath('models/cappy'), PosixPath('models/cappy-onnx')]

    Other models of the repository are not touched. Device "auto" is the CPU. Raises OutputError for a model that is
    there already, and what opening the bundle raises.
    """
    opened, root = open_bundle(bundle), Path(repository)
    device = "cpu" if options.device == "auto" else options.device
    precision, _ = choose_precision(options.precision, device, opened.manifest.precisions_for(device))
    # Triton says which GPU an instance has.
    chosen = replace(options, device=device, precision=cast(Precision, precision), gpus=None)
    targets = [root / triton.name, root / f"{triton.name}-onnx"]
    for target in targets:
        if target.exists():
            raise OutputError(f"{target} exists; choose another --name, or remove it")
    gpus = options.gpus or ((0,) if device != "cpu" else ())
    writers = (_write_text_model, _write_onnx_model)
    for target, write in zip(targets, writers, strict=True):
        with staging_folder(target, say) as staging:
            write(staging, opened, chosen, triton, gpus)
            publish(staging, target, MODEL, force=False)
    return targets


def _write_text_model(
    folder: Path, bundle: Bundle, options: ScorerOptions, triton: TritonOptions, gpus: Sequence[int]
) -> None:
    version = folder / "1"
    version.mkdir()
    (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
    slim(bundle.path, precisions=[options.precision], targets=[options.device], out=version / BUNDLE_FOLDER)
    config = {
        **_served(triton.name, "python", triton, gpus),
        "input": [_tensor("instruction", "TYPE_STRING", [1]), _tensor("response", "TYPE_STRING", [1])],
        "output": [
            _tensor("score", "TYPE_FP32", [1]),
            _tensor("truncated", "TYPE_BOOL", [1]),
            _tensor("tokens", "TYPE_INT32", [1]),
        ],
        "parameters": _parameters({"options": options.to_json(), "too_long": triton.too_long}, bundle),
    }
    (folder / CONFIG).write_text(pbtxt(config), encoding="utf-8")


def _write_onnx_model(
    folder: Path, bundle: Bundle, options: ScorerOptions, triton: TritonOptions, gpus: Sequence[int]
) -> None:
    version = folder / "1"
    version.mkdir()
    model = bundle.model(options.precision, options.device)
    for name in bundle.model_files(options.precision, options.device):
        shutil.copy(bundle.file(name), version / Path(name).name)  # external weights are found by their own name
    config = {
        **_served(f"{triton.name}-onnx", "onnxruntime", triton, gpus),
        "max_batch_size": min(triton.max_pairs, ONNX_PAIRS),
        "default_model_filename": model.name,
        "input": [_tensor(name, "TYPE_INT64", [-1]) for name in _inputs(bundle, options, model)],
        "output": [_tensor("logits", "TYPE_FP32", [1])],
        "parameters": _parameters({}, bundle),
    }
    if options.device == "tensorrt":
        # No engine cache: Triton's is named by the graph, so new weights would get the old engine, and wrong scores.
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [{"name": "tensorrt"}]}}
    (folder / CONFIG).write_text(pbtxt(config), encoding="utf-8")


def _inputs(bundle: Bundle, options: ScorerOptions, model: Path) -> Sequence[str]:
    """Name the model's inputs: as the export noted them, or as ONNX Runtime finds them."""
    part = bundle.manifest.document if options.device == "cpu" else bundle.manifest.document["targets"][options.device]
    noted = part["graphs"].get(options.precision, {}).get("inputs")
    if noted:
        return [str(name) for name in noted]
    return open_session(model, threads=1).inputs if options.device == "cpu" else ("input_ids", "attention_mask")


def _served(name: str, backend: str, triton: TritonOptions, gpus: Sequence[int]) -> dict[str, Any]:
    """Say what both models have in common: batching, queue and instances."""
    group: dict[str, Any] = {"count": 1, "kind": Word("KIND_GPU" if gpus else "KIND_CPU")}
    if gpus:
        group["gpus"] = list(gpus)
    return {
        "name": name,
        "backend": backend,
        "max_batch_size": triton.max_pairs,
        "instance_group": [group],
        "dynamic_batching": {
            "max_queue_delay_microseconds": triton.delay_microseconds,
            "default_queue_policy": {
                "timeout_action": Word("REJECT"),
                "default_timeout_microseconds": triton.request_seconds * 1_000_000,
                "allow_timeout_override": True,
                "max_queue_size": triton.max_queue,
            },
        },
    }


def _tensor(name: str, kind: str, dims: list[int]) -> dict[str, Any]:
    return {"name": name, "data_type": Word(kind), "dims": dims}


def _parameters(texts: Mapping[str, str], bundle: Bundle) -> list[dict[str, Any]]:
    found = {**texts, "bundle_sha256": str(bundle.manifest.document["manifest_sha256"])}
    return [{"key": name, "value": {"string_value": text}} for name, text in found.items()]


class Word(str):
    """A word of an enumeration, which has no quotes in protobuf's text format."""


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Write a message in protobuf's text format.

    >>> print(pbtxt({"name": "cappy", "dims": [1]}), end="")
    name: "cappy"
    dims: 1
    """
    lines = []
    for name, value in message.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                lines.append(f"{indent}{name} {{\n{pbtxt(each, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(each)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (Word, int)) else json.dumps(value)
