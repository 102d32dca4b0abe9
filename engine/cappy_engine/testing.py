"""Test code that scores pairs, without a model: make a scorer whose scores are made up, but always the same.

    >>> from cappy_engine.testing import fake_scorer
    >>> scorer = fake_scorer()
    >>> scorer.score([("Is the sky blue?", "Yes")]) == scorer.score([("Is the sky blue?", "Yes")])
    array([ True])

All but the model is real: tokens, batches, order, truncation and errors are those of a scorer from `Scorer.open`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from cappy_engine.batching import Grouping, Scores
from cappy_engine.bundle import EMBEDDED
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import ScoringError
from cappy_engine.scorer import Scorer
from cappy_engine.session import Inputs, Session
from cappy_engine.tokenizer import PairTokenizer

PAD_TOKEN_ID = 1
"""RoBERTa's, and so cappy-mini's."""


def score_of(token_ids: Sequence[int]) -> float:
    """Make up a score from 0 to 1. It depends on every token and its place.

    >>> score_of([0, 7, 9, 2]) == score_of([0, 9, 7, 2])
    False
    """
    return sum(place * token for place, token in enumerate(token_ids, start=1)) % 1009 / 1009


class FakeSession:
    """A session without a model: a row's score follows from its tokens, whatever it is padded with.

    `score` takes a row's token ids, without padding. `batches` records what was run. From the batch `fails_at` on
    (0 is the first), `run` raises `error`.

        >>> session = FakeSession(lambda ids: float(len(ids)), fails_at=3)
    """

    def __init__(
        self,
        score: Callable[[Sequence[int]], float] = score_of,
        *,
        device: str = "cpu",
        fails_at: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self.device = device
        self.batches: list[Inputs] = []
        self._score = score
        self._fails_at = fails_at
        self._error = error or ScoringError("this session was told to fail")
        self._lock = threading.Lock()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """List (rows, tokens) of every batch, padding included."""
        return [batch["input_ids"].shape for batch in self.batches]

    def run(self, inputs: Inputs) -> Scores:
        """Score one batch: (batch,) float32. Raises `error` where it was asked to."""
        with self._lock:
            if self._fails_at is not None and len(self.batches) >= self._fails_at:
                raise self._error
            self.batches.append(inputs)
        return np.array([self._score(row) for row in real_tokens(inputs)], dtype=np.float32)


def real_tokens(inputs: Inputs) -> list[list[int]]:
    """List the token ids of a batch's rows, without padding."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in rows]


def fake_scorer(
    session: Session | None = None, *, tokenizer: PairTokenizer | None = None, max_batch_tokens: int = 512
) -> Scorer:
    """Make a scorer of a fake session.

    Without a `tokenizer` it has cappy-mini's, which cuts pairs at 512 tokens. It has no fp32 model for `exact_winner`.

        >>> session = FakeSession()
        >>> fake_scorer(session).rank("Is the sky blue?", ["Yes", "No"])[0].response
        'Yes'
        >>> session.shapes
        [(2, 10)]
    """
    found = tokenizer or PairTokenizer.from_file(EMBEDDED / "tokenizer.json", max_length=512)
    return Scorer(found, Dispatcher(session or FakeSession(), Grouping(max_batch_tokens), pad_token_id=PAD_TOKEN_ID))
