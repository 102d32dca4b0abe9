"""The graphs for GPUs of small models, opened on the CPU with stand-ins."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from transformers import PreTrainedModel

from cappy_engine.batching import position_ids
from cappy_export.graphs.cuda import packed_model, with_packed_attention
from cappy_export.graphs.stand_ins import emulated
from cappy_export.graphs.tensorrt import plain_model
from cappy_export.proof.limits import LIMITS
from tests.support.small_models import WORDS

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Inputs = dict[str, Ids]


def joined_model(config: Any, weights: Any) -> onnx.ModelProto:
    """The graph for CUDA with the attention that has the projections in it."""
    return with_packed_attention(packed_model(config, weights))


WRITERS = {"packed": packed_model, "joined": joined_model, "plain": plain_model}
ATOL = LIMITS["fp32"].max_error or 0.0
"""What an export allows; these scores vary by a thousand times that."""


def written(writer: str, model: PreTrainedModel) -> onnx.ModelProto:
    return WRITERS[writer](model.config, {name: value.numpy() for name, value in model.state_dict().items()})


def opened(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session on the CPU, with stand-ins for what the CPU lacks."""
    return onnxruntime.InferenceSession(
        emulated(copy.deepcopy(graph)).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def random_inputs(model: PreTrainedModel, lengths: Sequence[int], *, columns: int | None = None) -> Inputs:
    """Pairs of these lengths, padded on the right to `columns` (None: the longest's)."""
    random = np.random.default_rng(0)
    mask = (np.arange(columns or max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    inputs = {
        "input_ids": np.where(mask == 1, random.integers(8, WORDS, mask.shape), model.config.pad_token_id),
        "attention_mask": mask,
    }
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = random.integers(0, 2, mask.shape) * mask
    return inputs


def logits_of(session: onnxruntime.InferenceSession, model: PreTrainedModel, inputs: Inputs) -> Floats:
    """The graph's logits (batch, 1), with the position ids that the engine makes."""
    feeds = dict(inputs)
    if model.config.model_type == "roberta":
        feeds["position_ids"] = position_ids(inputs["input_ids"], pad_token_id=model.config.pad_token_id)
    logits: Floats = session.run(["logits"], feeds)[0]
    return logits
