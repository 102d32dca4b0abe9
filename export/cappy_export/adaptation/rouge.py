"""Compute ROUGE-L as Cappy's authors do: stemmed, f-measure, the best over references, by `rouge-score`.

It reads the letters a to z and digits only: an answer in another script always gets 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(references: Iterable[str], answer: str) -> float:
    """Compute ROUGE-L of `answer`, 0 to 1, with the closest of `references` (at least one).

    >>> rouge_l(["It is blue."], "blue")
    0.5

    Raises ValueError for one text in place of the references: its letters would be compared.
    """
    if isinstance(references, str):
        problem = f"references must be a list of texts, got one str: {references[:40]!r}"
        raise ValueError(problem)  # noqa: TRY004 - as for all arguments
    return float(_scorer().score_multi(list(references), answer)["rougeL"].fmeasure)


def has_words(text: str) -> bool:
    """Tell whether ROUGE-L sees anything in `text`.

    >>> has_words("да")
    False
    """
    return rouge_l([text], text) > 0


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
