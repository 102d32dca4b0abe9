"""Tells what a GPU check is of: the packages' versions, and the bundle with its models."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata
from typing import Any

from cappy_engine.buckets import default_buckets
from cappy_engine.bundle import MANIFEST, Bundle
from cappy_engine.storage import sha256_of

DEVICES = ("cuda", "tensorrt")
PACKAGES = (
    *("cappy-engine", "onnxruntime-gpu", "onnxruntime", "tensorrt-cu13", "tensorrt-cu12", "torch", "transformers"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas", "nvidia-cublas-cu12", "onnx", "numpy"),
)


def installed_versions() -> dict[str, str | None]:
    """Look up the versions of PACKAGES; None for what is not installed.

    >>> installed_versions()["onnxruntime-gpu"]
    '1.31.1'
    """
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Describe the bundle's source and its models.

    >>> describe_bundle(open_bundle(EMBEDDED))["name"]
    'cappy-mini'
    """
    document = bundle.manifest.document
    source, model = document.get("source", {}), document["model"]
    return {
        "name": source.get("name"),
        "weights_sha256": source.get("sha256"),
        "manifest_sha256": sha256_of(bundle.path / MANIFEST),
        "precisions": {target: list(bundle.manifest.precisions_for(target)) for target in ("cpu", *DEVICES)},
        **{name: model.get(name) for name in ("layers", "heads", "hidden_size", "parameters", "max_length")},
    }


def lengths_of(bundle: Bundle) -> tuple[int, ...]:
    """List the lengths that TensorRT has an engine for.

    >>> lengths_of(open_bundle(EMBEDDED))
    (64, 128, 256, 512)
    """
    return bundle.manifest.buckets or default_buckets(bundle.manifest.max_length)


def not_exported(bundle: Bundle) -> list[str]:
    """List the devices that were left out of a bundle for GPUs; none for a bundle without models for GPUs.

    >>> not_exported(open_bundle(Path("bundle-for-cuda")))
    ['tensorrt']
    """
    there = [device for device in DEVICES if bundle.manifest.precisions_for(device)]
    return [device for device in DEVICES if there and device not in there]
