"""A pair is two valid strings; anything else is refused with its index and a short description."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.errors import InvalidPair
from cappy_engine.pairs import check_pairs


def test_pairs_may_be_tuples_or_lists_from_any_iterable() -> None:
    expected = [("a", "b"), ("c", "d")]
    assert check_pairs(expected) == expected
    assert check_pairs([["a", "b"], ["c", "d"]]) == expected
    assert check_pairs(pair for pair in expected) == expected
    assert check_pairs([]) == []


@given(pairs=st.lists(st.tuples(st.text(), st.text())))
def test_all_valid_strings_are_taken_as_they_are(pairs: list[tuple[str, str]]) -> None:
    assert check_pairs(pairs) == pairs


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (("a",), r"expected a tuple \(instruction, response\), got tuple \('a',\)"),
        (("a", "b", "c"), r"expected a tuple"),
        ((), r"expected a tuple"),
        ("ab", r"expected a tuple \(instruction, response\), got str 'ab'"),
        (None, r"expected a tuple \(instruction, response\), got NoneType None"),
        ({"instruction": "a", "response": "b"}, r"expected a tuple .* got dict"),
        ({"a", "b"}, r"expected a tuple .* got set"),
        (("a", None), r"response must be a str, got NoneType None"),
        ((b"a", "b"), r"instruction must be a str, got bytes b'a'"),
        ((1, "b"), r"instruction must be a str, got int 1"),
        (("a", "x\ud83d"), r"response has a lone surrogate '\\ud83d' at character 1"),
        (("\udc80", "b"), r"instruction has a lone surrogate '\\udc80' at character 0"),
    ],
)
@pytest.mark.parametrize("index", [0, 3])
def test_what_is_no_pair_is_refused_with_its_index(bad: Any, problem: str, index: int) -> None:
    pairs: list[Any] = [("good", "pair")] * index + [bad, ("good", "pair")]
    with pytest.raises(InvalidPair, match=f"^pair {index}: {problem}") as caught:
        check_pairs(pairs)
    assert caught.value.index == index


def test_one_string_is_refused_as_a_list_of_pairs() -> None:
    text: Sequence[Any] = "Is the sky blue?"
    with pytest.raises(InvalidPair, match=re.escape("got one str: 'Is the sky blue?'")):
        check_pairs(text)


def test_messages_stay_short_whatever_was_passed() -> None:
    huge: list[Any] = [("a", ["x" * 1_000_000])]
    with pytest.raises(InvalidPair) as caught:
        check_pairs(huge)
    assert len(str(caught.value)) < 200
