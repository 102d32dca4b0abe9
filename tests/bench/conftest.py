"""Give the benchmarks' tests a checkpoint and its bundle, and tools with known times and scores."""

from __future__ import annotations

from tests.support.exported import bundle, checkpoint, gpu_bundle
from tests.support.fake_tools import measure, tokenizer, workloads
from tests.support.gpu_checks import gpu_check, gpu_reference
from tests.support.preloaded import preloaded

__all__ = [
    "bundle",
    "checkpoint",
    "gpu_bundle",
    "gpu_check",
    "gpu_reference",
    "measure",
    "preloaded",
    "tokenizer",
    "workloads",
]
