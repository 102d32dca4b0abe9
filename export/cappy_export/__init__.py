"""Turn a checkpoint into a bundle, and prove that its scores are the checkpoint's.

    >>> from cappy_export import ExportOptions, export
    >>> export("btan2/cappy-large", "cappy-bundle", ExportOptions(precisions=("fp32", "int8")))

Needs PyTorch, transformers, optimum and onnx, which are imported when `export` or `verify` is first used.
`cappy_engine`, which runs the bundle, needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cappy_export.options import ExportOptions, VerifyOptions

if TYPE_CHECKING:
    from cappy_export.pipeline import export, verify

__all__ = ["ExportOptions", "VerifyOptions", "export", "verify"]


def __getattr__(name: str) -> Any:
    if name not in ("export", "verify"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cappy_export import pipeline

    return getattr(pipeline, name)
