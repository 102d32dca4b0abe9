"""Turn a checkpoint into a bundle, and prove that its scores are the checkpoint's.

    >>> from cappy_export import export
    >>> export("btan2/cappy-large", "cappy-bundle", precisions=["fp32", "int8"])

Needs PyTorch, transformers, optimum and onnx; `cappy_engine`, which runs the bundle, needs none of them.
"""

from cappy_export.pipeline import export, verify

__all__ = ["export", "verify"]
