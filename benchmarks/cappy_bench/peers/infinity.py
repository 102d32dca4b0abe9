"""Scores with infinity-emb's asynchronous engine, in this process, on PyTorch in float32.

`rerank` takes one query with its documents, so consecutive pairs of one instruction are one call, and all calls of a
request wait together: infinity's queue mixes them, sorts up to eight batches by characters, and cuts batches of a fixed
number of pairs. 8 was faster on a CPU than its default of 32, which pads more. Its warm-up (64 pairs of 512 tokens) is
left out: the suite warms up every runner alike. BetterTransformer is off: optimum 2 has none, and SDPA took its place.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from infinity_emb import AsyncEmbeddingEngine, EngineArgs

from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.worker import serve

BATCH = 8


class InfinityRunner:
    """An engine, and the event loop that it runs in."""

    def __init__(self, engine: AsyncEmbeddingEngine) -> None:
        self.computed_tokens = 0
        self._engine = engine
        self._encoder: Any = engine._model_replicas[0]  # the public face shows neither its tokens nor its batches
        self._counter = _TokenCounter(self._encoder.model)
        self._loop = asyncio.Runner()
        self._loop.run(engine.astart())
        weakref.finalize(self, _stop, self._loop, engine)

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        scores = self._loop.run(self._score(pairs))
        self.computed_tokens = self._counter.tokens
        return scores

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return [[int(token) for token in self._encoder.encode_pre([pair])["input_ids"][0]] for pair in pairs]

    async def _score(self, pairs: Sequence[Pair]) -> Scores:
        groups = groupby(pairs, key=lambda pair: pair[0])
        calls = [self._rerank(query, [response for _, response in group]) for query, group in groups]
        return np.concatenate(await asyncio.gather(*calls))

    async def _rerank(self, query: str, documents: list[str]) -> Scores:
        ranked, _ = await self._engine.rerank(query=query, docs=documents, raw_scores=True)
        scores = np.empty(len(documents), dtype=np.float32)
        for found in ranked:
            scores[found.index] = found.relevance_score
        return scores


class _TokenCounter:
    """Counts the tokens of every forward pass of `model`.

    It is apart from the runner: a hook that holds the runner would keep its threads alive at the end.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.tokens += named["input_ids"].numel()


def open_runner(model: Model, precision: str) -> InfinityRunner:
    """Load the checkpoint in float32."""
    torch.set_num_threads(model.threads)
    arguments = EngineArgs(
        model_name_or_path=str(model.require_checkpoint()),
        engine="torch",
        device="cpu",
        dtype="float32",
        batch_size=BATCH,
        model_warmup=False,
        bettertransformer=False,
        compile=False,
        trust_remote_code=False,
    )
    return InfinityRunner(AsyncEmbeddingEngine.from_args(arguments))


def _stop(loop: asyncio.Runner, engine: AsyncEmbeddingEngine) -> None:
    """End the engine's threads once its runner is gone, so that the process can end."""
    loop.run(engine.astop())
    loop.close()


if __name__ == "__main__":
    serve(open_runner)
