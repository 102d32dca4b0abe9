"""A line of JSON Lines holds a row, or it is blank, or it is refused by its number with what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cappy_engine.bulk.formats.json_lines import Row, read_fields, read_row, read_rows
from cappy_engine.errors import InvalidLine
from cappy_engine.pairs import text_problem

GOOD = b'{"instruction": "Is the sky blue?", "response": "Yes"}'
BOM = b"\xef\xbb\xbf"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_a_line_gives_its_pair_and_keeps_all_of_its_fields() -> None:
    line = '{"id": 7, "instruction": " Où? ", "tags": ["a", null], "response": "\\u00e9\\n", "nested": {"x": 1.5}}\n'
    row = read_row(line.encode(), 3)
    assert row == Row(3, json.loads(line), (" Où? ", "é\n"))
    assert list(row.fields) == ["id", "instruction", "tags", "response", "nested"]


@pytest.mark.slow
@given(
    fields=st.dictionaries(st.text(), json_values, max_size=4),
    instruction=st.text(),
    response=st.text(),
    is_ascii=st.booleans(),
    end=st.sampled_from(["", "\n", "\r\n", "  \n"]),
)
def test_any_object_with_the_two_strings_is_a_row(
    fields: dict[str, Any], instruction: str, response: str, is_ascii: bool, end: str
) -> None:
    fields = {**fields, "instruction": instruction, "response": response}
    line = (json.dumps(fields, ensure_ascii=is_ascii) + end).encode()
    assert read_row(line, 2) == Row(2, fields, (instruction, response))


@pytest.mark.parametrize("line", [b'{"a": "\\"response\\"", ', b'{"a": {"response": 1}, "\\u0061": 2, '])
def test_a_field_that_is_there_once_may_be_named_elsewhere(line: bytes) -> None:
    row = read_row(line + b'"instruction": "q", "response": "a"}', 1)
    assert row is not None
    assert row.pair == ("q", "a")


@pytest.mark.parametrize(
    ("name", "escaped"),
    [("质", r"\u8d28"), ("a/b", r"a\/b"), ("\t", r"\t"), ("\U0001f600", r"\ud83d\uDE00"), ("ab", r"a\u0062")],
)
@pytest.mark.parametrize("keeps_all", [False, True])
def test_a_field_that_comes_twice_is_refused_however_its_name_is_written(
    name: str, escaped: str, keeps_all: bool
) -> None:
    plain = json.dumps(name, ensure_ascii=False)
    for line in (f'{{"{escaped}": "second", {plain}: "first"}}', f'{{{plain}: "first", "{escaped}": "second"}}'):
        with pytest.raises(InvalidLine, match=r"^line 1: has the field .* (2 times|twice); give it once"):
            read_fields(line.encode(), 1, (name,), keeps_all=keeps_all)
    once = f'{{"x": {{{plain}: 1, "{escaped}": 2}}, "{escaped}": "first"}}'
    if not keeps_all:
        assert read_fields(once.encode(), 1, (name,), keeps_all=False) == {"x": {name: 2}, name: "first"}


def test_texts_are_taken_as_they_are() -> None:
    row = read_row(b'{"instruction": "", "response": " \\t\\u0000\\r\\n "}', 1)
    assert row is not None
    assert row.pair == ("", " \t\x00\r\n ")


@pytest.mark.parametrize("line", [b"", b"\n", b"\r\n", b"  \t \n"])
def test_a_blank_line_is_no_row(line: bytes) -> None:
    assert read_row(line, 5) is None


def test_a_byte_order_mark_is_accepted_on_the_first_line_only() -> None:
    row = read_row(BOM + GOOD, 1)
    assert row is not None
    assert row.pair == ("Is the sky blue?", "Yes")
    with pytest.raises(InvalidLine, match=r"^line 2: not JSON .*BOM"):
        read_row(BOM + GOOD, 2)


BAD_LINES: list[tuple[bytes, str]] = [
    (b"not json", r"not JSON \(Expecting value"),
    (b'{"instruction": "a", "response": "b"', r"not JSON \(Expecting ',' delimiter"),
    (b"{\n", r"not JSON \(Expecting property name .*\); a row is one line, as jq -c"),
    (b'[{"instruction": "a", "response": "b"},\r\n', r"not JSON \(Expecting .*\); a row is one line, as jq -c"),
    (
        b'[{"instruction": "a", "response": "b"}]',
        r"expected a JSON object .* got list .*; a row is one line, as jq -c",
    ),
    (GOOD + GOOD, r"not JSON \(Extra data"),
    (b"{'instruction': 'a', 'response': 'b'}", r"not JSON"),
    (b'{"instruction": "a\nb", "response": "b"}', r"not JSON \(Invalid control character"),
    (b'{"instruction": "\xff", "response": "b"}', r"not UTF-8 \(byte 17: 0xff\)"),
    (b'{"instruction": "caf\xc3', r"not UTF-8 \(byte 20: 0xc3\)"),
    (GOOD.decode().encode("utf-16"), r"not UTF-8 \(byte 0: 0xff\)"),
    (b"[1, 2]", r"expected a JSON object with 'instruction' and 'response', got list \[1, 2\]"),
    (b'"text"', r"expected a JSON object .* got str 'text'"),
    (b"null", r"expected a JSON object .* got NoneType None"),
    (b"12", r"expected a JSON object .* got int 12"),
    (b"{}", r"has no field 'instruction'; found no fields"),
    (b'{"response": "b", "prompt": "a"}', r"has no field 'instruction'; found 'response', 'prompt'"),
    (b'{"instruction": "a", "answer": "b"}', r"has no field 'response'; found 'instruction', 'answer'"),
    (b'{"Instruction": "a", "response": "b"}', r"has no field 'instruction'; found 'Instruction'"),
    (b'{"instruction": null, "response": "b"}', r"instruction must be a str, got NoneType None"),
    (b'{"instruction": "a", "response": 3}', r"response must be a str, got int 3"),
    (b'{"instruction": ["a"], "response": "b"}', r"instruction must be a str, got list \['a'\]"),
    (b'{"instruction": "a\\ud800", "response": "b"}', r"instruction has a lone surrogate '\\ud800' at character 1"),
    (b'{"instruction": "a", "response": "\\udc00\\ud800"}', r"response has a lone surrogate '\\udc00' at character 0"),
    (b'{"instruction": "a", "response": "b", "n": ' + b"9" * 5000 + b"}", r"not JSON \(Exceeds the limit"),
    (b'{"instruction": "a", "response": "b", "n": NaN}', r"not JSON \(NaN is not a value of JSON\)"),
    (b'{"instruction": "a", "response": "b", "n": [-Infinity]}', r"not JSON \(-Infinity is not a value of JSON\)"),
    (
        b'{"instruction": "a", "response": "b", "instruction": "c"}',
        r"has the field 'instruction' 2 times; give it once",
    ),
    (
        b'{"\\u0072esponse": "a", "instruction": "a", "response": "b"}',
        r"has the field 'response' 2 times; give it once",
    ),
    (
        rb'{"\u0072esponse": "a", "instruction": "a", "response": "b", "n": 1, "n": 2}',
        r"has the field 'response' 2 times; give it once",
    ),
    (
        rb'{"instruction": "a", "response": "b", "response": "c", "\u0072\u0065sponse": "d"}',
        r"has the field 'response' 3 times; give it once",
    ),
    (b"\x1f\x8b\x08\x00", r"not UTF-8 \(byte 1: 0x8b\); it is packed, and is unpacked if its name ends in \.gz"),
    (b"[" * 100_000 + b"]" * 100_000, r"not JSON"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, r"not JSON"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES, ids=[ascii(line[:30]) for line, _ in BAD_LINES])
def test_a_bad_line_is_refused_with_its_number_and_its_problem(line: bytes, problem: str) -> None:
    with pytest.raises(InvalidLine, match=f"^line 41: {problem}") as caught:
        read_row(line, 41)
    assert caught.value.number == 41
    assert str(caught.value) == f"line 41: {caught.value.problem}"
    assert len(str(caught.value)) < 300


@pytest.mark.slow
@settings(max_examples=300)
@given(
    line=st.one_of(
        st.binary(max_size=80),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.tuples(json_values, json_values).map(
            lambda parts: json.dumps({"instruction": parts[0], "response": parts[1]}).encode()
        ),
        st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=4)).map(
            lambda cut: GOOD[: cut[0]] + cut[1] + GOOD[cut[0] :]
        ),
    ),
    number=st.integers(1, 3),
)
@example(line=b"\x00", number=1)
@example(line=BOM, number=1)
@example(line=b"NaN", number=1)
@example(line=b"1e999", number=1)
def test_any_bytes_give_a_row_a_blank_or_an_invalid_line(line: bytes, number: int) -> None:
    row: Row | None = None
    problem: InvalidLine | None = None
    try:
        row = read_row(line, number)
    except InvalidLine as error:
        problem = error
    if row is not None:
        assert row.number == number
        assert row.pair == (row.fields["instruction"], row.fields["response"])
        assert all(text_problem(text) is None for text in row.pair)
    elif problem is not None:
        assert problem.number == number
    else:
        assert not line.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        b"%s",
        b'{"instruction": %s, "response": ""}',
        b'{"instruction": "", "response": "", "other": %s}',
        rb'{"instruction": "", "response": "", "\u0061": %s}',
        b'{"instruction": "", "response": "", "a": {"response": %s}}',
        b'{"instruction": "", "response": "", "a": 1, "a": %s}',
    ],
    ids=["line", "instruction", "other", "escaped", "named twice", "twice"],
)
def test_nesting_of_any_depth_gives_a_row_or_an_invalid_line(template: bytes) -> None:
    # Python's parser, repr and serialiser give up at different depths, so every depth near the limit is tried.
    for depth in range(1, 1200):
        line = template % (b"[" * depth + b"]" * depth)
        try:
            row = read_row(line, 1)
        except InvalidLine:
            continue
        assert row is not None
        assert row.pair == ("", "")


def test_integers_of_any_size_are_kept_or_refused_as_invalid() -> None:
    for digits in (1, 19, 20, 309, 4300, 4301, 50_000):
        line = b'{"instruction": "a", "response": "b", "n": %s}' % (b"7" * digits)
        if digits <= 4300:
            row = read_row(line, 1)
            assert row is not None
            assert row.fields["n"] == int("7" * digits)
        else:
            with pytest.raises(InvalidLine, match="not JSON"):
                read_row(line, 1)


def test_rows_are_numbered_by_line_with_blank_lines_left_out() -> None:
    lines = [BOM + GOOD + b"\n", b"\n", GOOD + b"\r\n", b"   \n", GOOD]
    assert [row.number for row in read_rows(lines)] == [1, 3, 5]


def test_rows_stop_at_the_first_bad_line() -> None:
    rows = read_rows([GOOD, b"\n", b"oops", GOOD])
    assert next(rows).number == 1
    with pytest.raises(InvalidLine, match=r"^line 3: not JSON"):
        next(rows)


def test_a_file_without_lines_has_no_rows() -> None:
    assert list(read_rows([])) == []


def test_a_line_of_many_other_fields_is_refused_with_a_short_message() -> None:
    line = json.dumps({f"field_{number}": number for number in range(10_000)}).encode()
    with pytest.raises(InvalidLine, match="has no field 'instruction'") as caught:
        read_row(line, 1)
    assert len(str(caught.value)) < 1000
