"""Writes a request as each server wants it, and reads the scores of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cappy_bench.peers.peer import Pair

INFINITY_MODEL = "cappy"
"""The name under which infinity serves the checkpoint."""


@dataclass(frozen=True)
class Dialect:
    """How a server is asked: by a POST to `path` with a `body`, which has no line breaks.

    `scores` reads an answer: in the order of the pairs. It raises ValueError, KeyError, TypeError or IndexError if that
    is not an answer.

        >>> NATIVE.body([("Is the sky blue?", "Yes")])
        b'{"instruction": "Is the sky blue?", "candidates": ["Yes"]}'
    """

    path: str
    body: Callable[[Sequence[Pair]], bytes]
    scores: Callable[[bytes], list[float]]


def _native_body(pairs: Sequence[Pair]) -> bytes:
    return _json({"instruction": pairs[0][0], "candidates": [response for _, response in pairs]})


def _infinity_body(pairs: Sequence[Pair]) -> bytes:
    """With raw scores: infinity's default is a sigmoid of them."""
    documents = [response for _, response in pairs]
    return _json({"model": INFINITY_MODEL, "query": pairs[0][0], "documents": documents, "raw_scores": True})


def _native_scores(body: bytes) -> list[float]:
    return _in_order(json.loads(body)["results"], "score")


def _infinity_scores(body: bytes) -> list[float]:
    return _in_order(json.loads(body)["results"], "relevance_score")


NATIVE = Dialect("/v1/rank", _native_body, _native_scores)
INFINITY = Dialect("/rerank", _infinity_body, _infinity_scores)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _in_order(results: list[dict[str, Any]], name: str) -> list[float]:
    """Order the scores of ranked results by the places of their candidates. Each place must be there once."""
    found = {int(result["index"]): float(result[name]) for result in results}
    if len(found) < len(results):
        raise ValueError("a candidate was answered twice")
    return [found[place] for place in range(len(results))]
