"""ROUGE-L as Cappy's authors use it: stemmed, f-measure, the best over references, by the `rouge-score` package.

It reads the letters a to z and digits only: an answer in another script always gets 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(references: Sequence[str], answer: str) -> float:
    """ROUGE-L of `answer`, 0 to 1, with the closest of `references` (at least one)."""
    return float(_scorer().score_multi(list(references), answer)["rougeL"].fmeasure)


def has_words(text: str) -> bool:
    """Whether ROUGE-L sees anything in `text`."""
    return rouge_l([text], text) > 0


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
