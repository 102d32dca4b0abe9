"""Plan what is opened on GPUs: the model, the GPUs, the batches, and the batches that prove it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cappy_engine.batching import Batch, Grouping, Ids, plan_batches
from cappy_engine.buckets import default_buckets
from cappy_engine.bundle import Bundle
from cappy_engine.errors import BundleError, DeviceUnavailable
from cappy_engine.gpu.installation import Gpu

BATCH_TOKENS = 16_384
"""Default `max_batch_tokens` on a GPU."""


@dataclass(frozen=True)
class GpuModel:
    """Says which GPUs run a bundle's model, and how pairs are grouped for it."""

    bundle: Bundle
    device: str
    precision: str
    gpus: tuple[int, ...]
    grouping: Grouping

    @property
    def pad_token_id(self) -> int:
        """Name the token that fills rows up."""
        return self.bundle.manifest.pad_token_id

    def max_rows(self, length: int) -> int:
        """Count the rows of a full batch of that length, as the planner cuts it."""
        return max(1, self.grouping.max_batch_tokens // length)


def plan_gpu(
    bundle: Bundle, device: str, precision: str, *, gpus: Sequence[int], max_batch_tokens: int, there: Sequence[Gpu]
) -> GpuModel:
    """Plan what to open on the GPUs of these numbers; `there` are the GPUs of this machine.

    Raises DeviceUnavailable for a GPU that is not there, PrecisionUnavailable if the bundle has no such model, and
    BundleError if its buckets are damaged.
    """
    bundle.model(precision, device)
    missing = [gpu for gpu in gpus if not 0 <= gpu < len(there)]
    if missing or len(set(gpus)) < len(gpus):
        raise DeviceUnavailable(
            f"GPUs {list(gpus)} were asked for; there are {len(there)}, numbered from 0, and each is named once"
        )
    # The graph for CUDA removes padding, but looks up embeddings before, and reserves memory for padded attention: a
    # budget of real tokens alone would not bound either.
    if device != "tensorrt":
        return GpuModel(bundle, device, precision, tuple(gpus), Grouping(max_batch_tokens, "allowed"))
    max_length = bundle.manifest.max_length
    buckets = bundle.manifest.buckets or default_buckets(max_length)
    if list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != max_length:
        raise BundleError(
            f"the buckets {list(buckets)} of bundle {bundle.path} do not ascend to its {max_length} tokens; "
            "export it again"
        )
    return GpuModel(bundle, device, precision, tuple(gpus), Grouping(max_batch_tokens, "avoided", buckets))


def canary_batches(lengths: Ids, model: GpuModel) -> list[Batch]:
    """Plan the canary's batches as the scorer would: `lengths` is (n,) int64.

    With buckets, every pair is in a batch of each bucket that it fits into, since each has an engine of its own.
    """
    grouping = model.grouping
    if not grouping.buckets:
        return plan_batches(lengths, max_batch_tokens=grouping.max_batch_tokens, padding=grouping.padding)
    batches = []
    for bucket in grouping.buckets:
        rows, most = np.flatnonzero(lengths <= bucket), model.max_rows(bucket)
        batches += [Batch(rows[start : start + most], bucket) for start in range(0, len(rows), most)]
    return batches


def batch_flops(model: Mapping[str, Any], rows: int, length: int) -> float:
    """Estimate the operations of a batch by its matrix products; the feed-forward is taken as 4 times as wide."""
    return 24.0 * int(model["layers"]) * int(model["hidden_size"]) ** 2 * rows * length
