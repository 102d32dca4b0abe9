"""Pads every pair to the model's maximum, as Cappy's own scripts do (`padding="max_length"`)."""

from __future__ import annotations

from collections.abc import Sequence

from cappy_bench.peers.batches import Batched
from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.torch_model import load_torch, pad_token_id, runs
from cappy_bench.peers.worker import serve

BATCH = 16


class PaddedRunner:
    """PyTorch, with every pair padded to `max_length`, asked or not."""

    def __init__(self, model: Model) -> None:
        module = load_torch(model)
        self._max_length = model.max_length
        self._batched = Batched(
            model, runs(module), pad_token_id=pad_token_id(module), batch_tokens=BATCH * model.max_length
        )

    @property
    def computed_tokens(self) -> int | None:
        """Tokens computed so far, padding included."""
        return self._batched.computed_tokens

    def score(self, pairs: Sequence[Pair], *, pad_to: int | None = None) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        return self._batched.score(pairs, pad_to=pad_to or self._max_length)

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return self._batched.token_ids(pairs)


def open_runner(model: Model, precision: str) -> PaddedRunner:
    """Load the checkpoint in float32."""
    return PaddedRunner(model)


if __name__ == "__main__":
    serve(open_runner)
