"""The decodings are the paper's, and seeds are the same everywhere."""

from __future__ import annotations

import pytest

from cappy_bench.candidates.decodings import PAPER, Decoding, choose_decodings, derive_seed
from cappy_engine.errors import SampleError


def test_the_papers_decodings_give_17_candidates() -> None:
    assert sum(decoding.count for decoding in PAPER) == 17
    assert choose_decodings([decoding.name for decoding in PAPER]) == PAPER


def test_the_count_is_for_decodings_that_sample() -> None:
    assert choose_decodings(["top-k", "beam", "greedy"], count=2) == (
        Decoding(name="top-k", count=2, top_k=40),
        Decoding(name="beam", count=1, num_beams=4, is_sampled=False),
        Decoding(name="greedy", count=1, is_sampled=False),
    )


@pytest.mark.parametrize(
    ("names", "count", "problem"),
    [
        (["beam", "nucleus"], 4, "unknown decoding 'nucleus'; choose from beam, sampling, .*greedy"),
        ([], 4, "at least one decoding, and each only once; got none"),
        (["beam", "beam"], 4, "each only once; got beam, beam"),
        (["sampling"], 0, "must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(names: list[str], count: int, problem: str) -> None:
    with pytest.raises(SampleError, match=problem):
        choose_decodings(names, count=count)


def test_seeds_are_stable_and_tell_their_parts_apart() -> None:
    assert derive_seed(0, 8, "top-p") == 1414666695  # of every version: a file that was begun must go on
    found = {derive_seed(*parts) for parts in ((0,), (1,), (0, 1), (1, 0), ("01",), (0, "a"), (0, "a", 1))}
    assert len(found) == 7
    assert all(0 <= seed < 2**31 for seed in found)
