"""Make the arrays that a model is run with, of a batch of encoded pairs. Pure: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cappy_engine.batching import Batch, EncodedPairs, Ids


def model_inputs(encoded: EncodedPairs, batch: Batch, *, pad_token_id: int) -> dict[str, Ids]:
    """Make the arrays that a session is run with, by the names of `session.INPUTS`: each (batch, length) int64.

    >>> model_inputs(encoded, Batch(np.array([0, 1]), 16), pad_token_id=1)["input_ids"].shape
    (2, 16)
    """
    ids = pad(encoded.token_ids, batch, value=pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask(encoded.lengths, batch),
        "token_type_ids": pad(encoded.type_ids, batch, value=0),
        "position_ids": position_ids(ids, pad_token_id=pad_token_id),
    }


def full_batch(rows: int, length: int, *, pad_token_id: int) -> dict[str, Ids]:
    """Make the inputs of a batch without padding, of a token that every vocabulary has.

    >>> full_batch(2, 3, pad_token_id=1)["input_ids"].tolist()
    [[0, 0, 0], [0, 0, 0]]
    """
    ids = [np.full(length, 0 if pad_token_id else 1, dtype=np.int64)] * rows
    types = [np.zeros(length, dtype=np.int64)] * rows
    encoded = EncodedPairs(ids, types, np.full(rows, length), np.zeros(rows, dtype=np.bool_))
    return model_inputs(encoded, Batch(np.arange(rows), length), pad_token_id=pad_token_id)


def pad(sequences: Sequence[Ids], batch: Batch, *, value: int) -> Ids:
    """Pad the batch's rows of `sequences` on the right with `value`: (batch, length) int64."""
    padded = np.full((len(batch.rows), batch.length), value, dtype=np.int64)
    for place, row in enumerate(batch.rows):
        padded[place, : len(sequences[row])] = sequences[row]
    return padded


def attention_mask(lengths: Ids, batch: Batch) -> Ids:
    """Return 1 for the batch's real tokens and 0 for padding: (batch, length) int64."""
    return (np.arange(batch.length) < lengths[batch.rows][:, None]).astype(np.int64)


def position_ids(token_ids: Ids, *, pad_token_id: int) -> Ids:
    """Count the places of tokens from `pad_token_id` + 1 on, as transformers does for RoBERTa: (batch, length) int64.

    Padding has the place `pad_token_id`, and so has a text's token of that id (create_position_ids_from_input_ids).
    """
    is_text = (token_ids != pad_token_id).astype(np.int64)
    places: Ids = np.cumsum(is_text, axis=1) * is_text + pad_token_id
    return places
