"""A pair is two valid strings; anything else is refused with its index and a short description."""

from __future__ import annotations

import collections
import contextlib
import re
import sqlite3
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.errors import InvalidPair
from cappy_engine.pairs import candidate_pairs, check_pairs
from tests.support.columns import ArrowScalar, Frame, Once, Series

PAIRS = [("a", "b"), ("c", "d")]


class Named(NamedTuple):
    instruction: str
    response: str


class Turned(NamedTuple):
    response: str
    instruction: str


class Answered(NamedTuple):
    number: int
    response: str
    instruction: str


class Half(NamedTuple):
    response: str
    text: str


class Label(str, Enum):  # noqa: UP042 - str() of it is "Label.YES"
    YES = "yes"


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        Once,
        Series,
        collections.deque,
        lambda pairs: (pair for pair in pairs),
        lambda pairs: dict(pairs).items(),
        lambda pairs: dict(enumerate(pairs)).values(),
        lambda pairs: dict.fromkeys(pairs).keys(),
        lambda pairs: [list(pair) for pair in pairs],
        lambda pairs: [Named(*pair) for pair in pairs],
        lambda pairs: [{"id": 7, "response": second, "instruction": first} for first, second in pairs],
        lambda pairs: [ArrowScalar(dict(zip(("instruction", "response"), pair, strict=True))) for pair in pairs],
        lambda pairs: [Series(pair) for pair in pairs],
        lambda pairs: [ArrowScalar(list(pair)) for pair in pairs],
        lambda pairs: [tuple(map(ArrowScalar, pair)) for pair in pairs],
        lambda pairs: [np.array(pair) for pair in pairs],
        lambda pairs: np.array(pairs),
        lambda pairs: np.array(pairs, dtype=object),
        lambda pairs: np.array(pairs, dtype=[("instruction", "U1"), ("response", object)]),
        lambda pairs: zip(*(np.array(column) for column in zip(*pairs, strict=True)), strict=True),
    ],
)
def test_pairs_may_be_rows_of_two_from_any_iterable(make: Callable[[Any], Any]) -> None:
    checked = check_pairs(make(PAIRS))
    assert checked == PAIRS
    assert {type(text) for pair in checked for text in pair} == {str}
    assert check_pairs([]) == []


def test_a_set_of_pairs_is_taken_in_its_own_order() -> None:
    pairs = {(letter, "b") for letter in "acdefg"}
    assert check_pairs(pairs) == list(pairs)


def test_an_iterable_is_gone_through_once() -> None:
    pairs, candidates = Once(PAIRS), Once(["b", "d"])
    check_pairs(pairs)
    candidate_pairs("a", candidates)
    assert pairs.count == candidates.count == 1


def test_an_error_of_the_users_own_generator_is_passed_on() -> None:
    def pairs() -> Any:
        yield ("a", "b")
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        check_pairs(pairs())


def test_strings_of_other_types_become_plain_ones() -> None:
    (checked,) = check_pairs([(np.str_("Où?"), Label.YES)])
    assert checked == ("Où?", "yes")
    assert [type(text) for text in checked] == [str, str]


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (b"ab", "got bytes b'ab'"),
        (bytearray(b"ab"), "got bytearray"),
        (None, "got NoneType None"),
        (3, "got int 3"),
        (np.array("ab"), "got ndarray array('ab', dtype='<U2')"),
    ],
)  # fmt: skip
def test_what_holds_no_rows_is_refused_with_what_it_is(pairs: Any, problem: str) -> None:
    with pytest.raises(InvalidPair, match=re.escape(f"expected (instruction, response) pairs, {problem}")):
        check_pairs(pairs)


@pytest.mark.parametrize(
    ("candidates", "problem"),
    [
        (Frame(["answer"]), "got Frame with the columns ['answer']; pass one of its columns, as in table['answer']"),
        ({"a": "Yes", "b": "No"}, "got dict with the columns ['a', 'b']; pass one of its columns"),
        (b"Yes", "got bytes b'Yes'"),
        (None, "got NoneType None"),
    ],
)
def test_what_holds_no_candidates_is_refused_with_what_it_is(candidates: Any, problem: str) -> None:
    with pytest.raises(InvalidPair, match=re.escape(f"candidates must be a list of strings, {problem}")):
        candidate_pairs("a", candidates)


@pytest.mark.parametrize("candidates", [[], ["b"]])
def test_an_instruction_is_a_text_also_without_candidates(candidates: list[str]) -> None:
    instruction: Any = None
    with pytest.raises(InvalidPair, match="instruction must be a str, got NoneType None"):
        candidate_pairs(instruction, candidates)


@pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow", "datasets"])
def test_columns_of_other_packages_are_candidates_and_their_rows_are_pairs(package: str) -> None:
    library = pytest.importorskip(package)
    columns = {"instruction": ["a", "b", "c"], "response": ["f", "e", "d"]}
    table = {
        "pandas": lambda: library.DataFrame(columns),
        "polars": lambda: library.DataFrame(columns),
        "pyarrow": lambda: library.table(columns),
        "datasets": lambda: library.Dataset.from_dict(columns),
    }[package]()
    instructions, responses = table["instruction"], table["response"]
    assert check_pairs(zip(instructions, responses, strict=True)) == list(zip(*columns.values(), strict=True))
    assert candidate_pairs("q", responses) == [("q", response) for response in columns["response"]]


def test_a_text_may_have_as_many_characters_as_asked_for() -> None:
    assert check_pairs([("Où?", "yes")], max_text_chars=3) == [("Où?", "yes")]
    with pytest.raises(InvalidPair, match="pair 1: response has 4 characters, and max_text_chars is 3") as caught:
        check_pairs([("a", "b"), ("Où?", "yes\ud800")], max_text_chars=3)  # the length is looked at first
    assert caught.value.index == 1


def test_a_million_characters_are_a_text_and_one_more_is_not() -> None:
    assert check_pairs([("a", "b" * 1_000_000)])
    with pytest.raises(InvalidPair, match="instruction has 1000001 characters, and max_text_chars is 1000000"):
        check_pairs([("a" * 1_000_001, "b")])


@given(pairs=st.lists(st.tuples(st.text(), st.text())))
def test_all_valid_strings_are_taken_as_they_are(pairs: list[tuple[str, str]]) -> None:
    assert check_pairs(pairs) == pairs


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (("a",), r"expected a tuple \(instruction, response\), got tuple \('a',\) of length 1"),
        (("a", "b", "c"), r"expected a tuple .* got tuple \('a', 'b', 'c'\) of length 3"),
        (np.array(["a", "b", "c"]), r"expected a tuple .* got ndarray array.* of length 3"),
        ((), r"expected a tuple .* got tuple \(\) of length 0"),
        ("ab", r"expected a tuple \(instruction, response\), got str 'ab'; one pair alone is \[\(instruction, resp"),
        (np.str_("ab"), r"expected a tuple \(instruction, response\), got str 'ab'"),
        (b"ab", r"expected a tuple \(instruction, response\), got bytes b'ab'$"),
        (Frame(["a", "b"]), r"expected a tuple \(instruction, response\), got Frame a table of several lines"),
        (ArrowScalar({"question": "a", "answer": "b"}), r"expected a tuple .* got dict with the fields .*; name two"),
        (("a", ArrowScalar(None)), r"response must be a str, got NoneType None"),
        (("a", float("nan")), r"response must be a str, got float nan"),
        (("a", np.bytes_(b"b")), r"response must be a str, got bytes_ "),
        (None, r"expected a tuple \(instruction, response\), got NoneType None"),
        ({"instruction": "a"}, r"expected a tuple .* got dict with the fields \['instruction'\]; name two of them"),
        ({}, r"expected a tuple .* got dict with the fields \[\]; name two of them 'instruction' and 'response'"),
        ({"instruction": "a", "response": None}, r"response must be a str, got NoneType None"),
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


@pytest.mark.parametrize(
    "make",
    [
        lambda pairs: [Turned(*pair) for pair in pairs],
        lambda pairs: np.array(pairs, dtype=[("response", "U1"), ("instruction", object)]),
        lambda pairs: sqlite_rows("values " + ", ".join(map(str, pairs)), "response", "instruction"),
        lambda pairs: turned_frame(pairs).itertuples(index=False),
        lambda pairs: [row for _, row in turned_frame(pairs).iterrows()],
    ],
)
def test_rows_with_names_are_read_by_them(make: Callable[[Any], Any]) -> None:
    assert check_pairs(make([("b", "a"), ("d", "c")])) == PAIRS


@pytest.mark.parametrize(
    "make",
    [
        lambda pairs: [Answered(7, *pair) for pair in pairs],
        lambda pairs: np.array([(7, *pair) for pair in pairs], dtype=[(name, object) for name in Answered._fields]),
        lambda pairs: sqlite_rows("values " + ", ".join(str((7, *pair)) for pair in pairs), *Answered._fields),
        lambda pairs: turned_frame(pairs).itertuples(),
        lambda pairs: [row for _, row in turned_frame(pairs).assign(label=1).iterrows()],
    ],
)
def test_rows_with_names_may_hold_more_than_a_pair(make: Callable[[Any], Any]) -> None:
    assert check_pairs(make([("b", "a"), ("d", "c")])) == PAIRS


@pytest.mark.parametrize("names", [("id", "question", "answer"), ("id", "instruction", "answer")])
def test_rows_with_more_names_need_those_of_a_pair(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidPair, match=r"pair 0: .*, got Row with the names \[.*\]; name two of them 'instruction'"):
        check_pairs(sqlite_rows("values ('a', 'b', 'c')", *names))
    with pytest.raises(InvalidPair, match=r"got Row .* of length 1"):
        check_pairs(sqlite_rows("values ('a')", "instruction"))


def test_other_names_of_a_row_say_nothing_unless_they_are_the_other_way_round() -> None:
    assert check_pairs(sqlite_rows("values ('a', 'b'), ('c', 'd')", "question", "answer")) == PAIRS
    for rows in ([Half("a", "b")], sqlite_rows("values ('a', 'b')", "answer", "instruction")):
        with pytest.raises(InvalidPair, match=r"pair 0: .*, got (Half|Row) with the names \[.*\]; name its parts"):
            check_pairs(rows)


def turned_frame(pairs: Any) -> Any:
    return pytest.importorskip("pandas").DataFrame(pairs, columns=Turned._fields)


def sqlite_rows(query: str, *names: str) -> list[sqlite3.Row]:
    database = sqlite3.connect(":memory:")
    database.row_factory = sqlite3.Row
    with contextlib.closing(database):
        return database.execute(f"with t({', '.join(names)}) as ({query}) select * from t").fetchall()
