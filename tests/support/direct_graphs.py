"""Graphs that are written directly, of small models, in sessions on the CPU; and inputs for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
from transformers import PreTrainedModel

from cappy_export.graphs.families import FAMILIES
from tests.support.operators import kernel_options
from tests.support.small_models import Floats, Inputs, weights_of


def written(model: PreTrainedModel) -> onnx.ModelProto:
    """The graph of the model for CPUs."""
    return FAMILIES[model.config.model_type].write(model.config, weights_of(model))


def opened(graph: onnx.ModelProto, *, has_kernels: bool = False) -> onnxruntime.InferenceSession:
    """A session of the graph on the CPU; the test is skipped where it has kernels and there are none."""
    options = kernel_options() if has_kernels else onnxruntime.SessionOptions()
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def logits_of(session: onnxruntime.InferenceSession, inputs: Inputs) -> Floats:
    """The graph's logits (batch, 1)."""
    logits: Floats = session.run(["logits"], inputs)[0]
    return logits


def random_inputs(
    model: PreTrainedModel, lengths: Sequence[int], *, columns: int | None = None, seed: int = 0
) -> Inputs:
    """Pairs of these lengths, padded on the right to `columns` (None: the longest's), with types if there are any."""
    random = np.random.default_rng(seed)
    mask = (np.arange(columns or max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, random.integers(5, model.config.vocab_size, mask.shape), model.config.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = random.integers(0, 2, mask.shape) * mask
    return inputs
