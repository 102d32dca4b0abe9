"""Give the benchmarks' tests a checkpoint and its bundle, small LLMs, and tools with known times and scores."""

from __future__ import annotations

from tests.support.cores import one_core
from tests.support.exported import bundle, checkpoint, gpu_bundle
from tests.support.fake_tools import measure, tokenizer, workloads
from tests.support.gpu_checks import gpu_check, gpu_reference
from tests.support.preloaded import preloaded
from tests.support.small_llms import folders, llms

__all__ = [
    "bundle",
    "checkpoint",
    "folders",
    "gpu_bundle",
    "gpu_check",
    "gpu_reference",
    "llms",
    "measure",
    "one_core",
    "preloaded",
    "tokenizer",
    "workloads",
]
