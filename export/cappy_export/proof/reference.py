"""Score with the reference: PyTorch, float32, eager, one pair at a time, with transformers' own tokenizer.

One pair at a time, so that neither padding nor batching, which the engine must get right, is part of the reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cappy_engine.errors import CheckpointError
from cappy_engine.pairs import Pair, check_pairs
from cappy_export.checkpoints.checkpoint import Checkpoint, load_model, open_checkpoint
from cappy_export.checkpoints.fast_tokenizer import load_tokenizer
from cappy_export.checkpoints.naming import shown
from cappy_export.checkpoints.refusals import refusing


@dataclass(frozen=True)
class Reference:
    """Hold PyTorch's `scores` (n,) float32, `token_counts` (n,) int64, and `truncated` (n,) bool."""

    scores: npt.NDArray[np.float32]
    token_counts: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]

    @property
    def spread(self) -> float:
        """Give the standard deviation of the scores, by which errors are judged."""
        return float(self.scores.std(dtype=np.float64))  # float32 overflows at squares of 1e20

    @property
    def description(self) -> str:
        """Say what computed the scores."""
        return f"PyTorch {torch.__version__} (float32, eager, one pair at a time)"


def score_checkpoint(
    source: str | Path, pairs: Iterable[Sequence[str]], *, revision: str | None = None, max_length: int = 512
) -> npt.NDArray[np.float32]:
    """Score `pairs` with PyTorch, (n,) float32: by the checkpoint in a folder, or of a hub id at `revision`.

    >>> score_checkpoint("export/cappy_mini/checkpoint", [("Is the sky blue?", "Yes")])

    A pair that comes twice is scored once. Raises InvalidPair.
    """
    checked = check_pairs(pairs)
    rows = {pair: row for row, pair in enumerate(dict.fromkeys(checked))}
    found = score_with_torch(open_checkpoint(source, revision=revision), list(rows), max_length=max_length)
    return found.scores[[rows[pair] for pair in checked]]


def score_with_torch(checkpoint: Checkpoint, pairs: Iterable[Sequence[str]], *, max_length: int) -> Reference:
    """Score `pairs` with the checkpoint's model: `logits[:, 0]`, no activation.

    >>> score_with_torch(open_checkpoint("export/cappy_mini/checkpoint"), default_pairs(), max_length=512).scores

    Raises CheckpointError if PyTorch itself gives NaN or infinity for a pair, and InvalidPair.
    """
    checked = check_pairs(pairs)
    found = list(each_score(checkpoint, checked, max_length=max_length))
    scores = np.array([each.score for each in found], dtype=np.float32)
    broken = np.flatnonzero(~np.isfinite(scores))
    if broken.size:
        raise CheckpointError(
            f"PyTorch itself gives {scores[broken[0]]} for {broken.size} pairs, first {checked[broken[0]]}"
        )
    return Reference(
        scores, np.array([each.token_count for each in found]), np.array([each.is_truncated for each in found])
    )


@dataclass(frozen=True)
class TorchScore:
    """Hold PyTorch's score of one pair, finite or not.

    `token_count` and `is_truncated` come from its tokenizer.
    """

    score: float
    token_count: int
    is_truncated: bool


def each_score(
    checkpoint: Checkpoint, pairs: Iterable[Pair], *, max_length: int, attention: str = "eager"
) -> Iterator[TorchScore]:
    """Score pair by pair: the model is loaded once, and each score is there before the next pair is taken.

    >>> next(each_score(open_checkpoint("export/cappy_mini/checkpoint"), default_pairs(), max_length=512)).token_count

    `attention` is transformers' `attn_implementation`. "sdpa", its default where a model has it, takes a third of
    "eager"'s time at 4,096 tokens. Raises CheckpointError if the model does not know it.
    """
    model, tokenizer = load_model(checkpoint, attention=attention), load_tokenizer(checkpoint, max_length=max_length)
    taken = set(tokenizer.model_input_names) & set(inspect.signature(model.forward).parameters)
    for instruction, response in pairs:
        pair = shown(repr((instruction[:200], response[:200])))
        with refusing(f"the tokenizer of {checkpoint.name} fails on the pair {pair}"):
            inputs = tokenizer(
                [(instruction, response)],
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            )
        with refusing(f"PyTorch cannot score with {checkpoint.name}"), torch.inference_mode():
            score = model(**{name: inputs[name] for name in taken}).logits[0, 0].item()
        yield TorchScore(score, inputs["input_ids"].shape[1], _is_truncated(inputs.encodings[0]))


def _is_truncated(encoding: object) -> bool:
    return bool(encoding.overflowing)  # type: ignore[attr-defined]
