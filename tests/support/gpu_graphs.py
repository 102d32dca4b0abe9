"""The graphs for GPUs of small models, opened on the CPU with stand-ins."""

from __future__ import annotations

import copy
from typing import Any

import onnx
import onnxruntime
from transformers import PreTrainedModel

from cappy_bench.gpu.packed_attention import with_packed_attention
from cappy_engine.inputs import position_ids
from cappy_export.graphs.cuda import packed_model
from cappy_export.graphs.stand_ins import emulated
from cappy_export.graphs.tensorrt import plain_model
from cappy_export.proof.limits import LIMITS
from tests.support import direct_graphs
from tests.support.small_models import Floats, Inputs, weights_of


def joined_model(config: Any, weights: Any) -> onnx.ModelProto:
    """The graph for CUDA with the attention that has the projections in it."""
    return with_packed_attention(packed_model(config, weights))


WRITERS = {"packed": packed_model, "joined": joined_model, "plain": plain_model}
ATOL = LIMITS["fp32"].max_error or 0.0
"""What an export allows; these scores vary by a thousand times that."""


def written(writer: str, model: PreTrainedModel) -> onnx.ModelProto:
    return WRITERS[writer](model.config, weights_of(model))


def opened(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session on the CPU, with stand-ins for what the CPU lacks."""
    return direct_graphs.opened(emulated(copy.deepcopy(graph)))


def logits_of(session: onnxruntime.InferenceSession, model: PreTrainedModel, inputs: Inputs) -> Floats:
    """The graph's logits (batch, 1), with the position ids that the engine makes."""
    feeds = dict(inputs)
    if model.config.model_type == "roberta":
        feeds["position_ids"] = position_ids(inputs["input_ids"], pad_token_id=model.config.pad_token_id)
    return direct_graphs.logits_of(session, feeds)
