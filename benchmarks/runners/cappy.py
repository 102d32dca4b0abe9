"""Ours: `Scorer` on a bundle, put together as `Scorer.open` does, with its default settings.

`computed_tokens` are counted at the session, the seam below the scorer. Padding to one length is something that the
engine has no option for; it is done here by hand, to compare the model's own speed at equal shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.runner import Model, Pair, Scores
from benchmarks.runners.batches import Batched
from cappy_engine.bundle import open_bundle
from cappy_engine.scorer import BATCH_TOKENS, Scorer
from cappy_engine.session import INPUTS, OrtSession, open_session
from cappy_engine.tokenizer import PairTokenizer


class CountingSession:
    """A session that counts the tokens that it computes."""

    def __init__(self, session: OrtSession) -> None:
        self.device = session.device
        self.computed_tokens = 0
        self._session = session

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> Scores:
        """Score one batch, as `Session.run` does."""
        self.computed_tokens += inputs["input_ids"].size
        return self._session.run(inputs)


class CappyRunner:
    """The engine's own scorer."""

    def __init__(self, model: Model, precision: str) -> None:
        bundle = open_bundle(model.bundle)
        self._session = CountingSession(open_session(bundle.model(precision), threads=model.threads))
        self._scorer = Scorer(
            tokenizer=PairTokenizer.from_file(model.bundle / "tokenizer.json", max_length=bundle.manifest.max_length),
            session=self._session,
            pad_token_id=bundle.manifest.pad_token_id,
            max_batch_tokens=BATCH_TOKENS["cpu"],
        )
        self._padded = Batched(model, self._run, pad_token_id=bundle.manifest.pad_token_id)

    @property
    def computed_tokens(self) -> int | None:
        """Tokens computed so far, padding included."""
        return self._session.computed_tokens

    def score(self, pairs: Sequence[Pair], *, pad_to: int | None = None) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        return self._scorer.score(pairs) if pad_to is None else self._padded.score(pairs, pad_to=pad_to)

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return self._padded.token_ids(pairs)

    def _run(self, *arrays: npt.NDArray[np.int64]) -> Scores:
        return self._session.run(dict(zip(INPUTS, arrays, strict=True)))


def open_runner(model: Model, precision: str) -> CappyRunner:
    """Open the bundle's model of `precision`."""
    return CappyRunner(model, precision)
