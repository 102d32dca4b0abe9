"""Set up a checkpoint's model and tokenizer for training. `run.py` has the loss and the steps."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from cappy_engine.errors import AdaptError
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoints.checkpoint import Checkpoint
from cappy_export.checkpoints.fast_tokenizer import load_tokenizer
from cappy_export.checkpoints.refusals import refusing


def pair_tokenizer(checkpoint: Checkpoint, max_length: int) -> tuple[PairTokenizer, int]:
    """Make the engine's tokenizer, and return it with its padding id.

    >>> encoder, pad_token_id = pair_tokenizer(checkpoint, 512)

    With it, training sees exactly the tokens that will be served.
    """
    fast = load_tokenizer(checkpoint, max_length=max_length)
    backend = fast.backend_tokenizer
    with refusing(f"the tokenizer of {checkpoint.name} cannot be used"):
        backend.no_truncation()
        backend.no_padding()
        return PairTokenizer(backend, max_length=fast.model_max_length), int(fast.pad_token_id)


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: neither biases nor normalisation.

    >>> torch.optim.AdamW(parameter_groups(model, 0.01), lr=2e-5)
    """
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def save_memory(model: PreTrainedModel) -> None:
    """Let the model keep only the inputs of its layers.

    >>> save_memory(model)

    It computes the rest again for the gradients, which stay the same. Raises AdaptError for a model that cannot do so.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise AdaptError(f"gradient checkpointing is not possible: {error}") from error
