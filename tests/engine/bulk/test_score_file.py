"""JSON Lines in, JSON Lines out: the same rows in the same order, each with its score; no bad line goes unnoticed."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine import Scorer
from cappy_engine.bulk.score_file import WINDOW_PAIRS, Totals, score_lines
from cappy_engine.errors import InvalidLine, ScoringError
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer

LONG = "The sky is blue, and so on. " * 200
GOOD = b'{"instruction": "q", "response": "a"}\n'


@pytest.fixture(scope="module")
def scorer(tokenizer: PairTokenizer) -> Scorer:
    return fake_scorer(tokenizer=tokenizer)


def line_of(**fields: object) -> bytes:
    return json.dumps({"instruction": "q", "response": "a", **fields}).encode() + b"\n"


def many_lines(count: int) -> list[bytes]:
    """Lines whose lengths go up and down, so that batches are out of order."""
    return [
        line_of(id=number, instruction=f"Question {number}?", response="word " * (number * 37 % 53))
        for number in range(count)
    ]


def written(scorer: Scorer, lines: Iterable[bytes], **options: Any) -> tuple[list[dict[str, Any]], Totals]:
    """The rows that `score_lines` writes, and its totals."""
    output: list[bytes] = []
    totals = score_lines(scorer, lines, output.append, **options)
    return [json.loads(line) for line in b"".join(output).splitlines()], totals


# Rows


def test_rows_of_several_windows_come_back_in_order_with_their_scores(scorer: Scorer) -> None:
    lines = many_lines(2 * WINDOW_PAIRS + 77)
    rows, totals = written(scorer, lines)
    given_rows = [json.loads(line) for line in lines]
    scored = scorer.score_pairs([(row["instruction"], row["response"]) for row in given_rows])
    assert rows == [{**row, "score": float(score)} for row, score in zip(given_rows, scored.scores, strict=True)]
    assert len(set(scored.scores.tolist())) > 200
    assert totals.pairs == len(lines)
    assert totals.tokens == scored.token_counts.sum()
    assert (totals.truncated, totals.blank_lines, totals.skipped) == (0, 0, [])


def test_rows_of_a_real_bundle_come_back_with_its_scores(bundle: Path) -> None:
    lines = many_lines(WINDOW_PAIRS + 20)
    with Scorer.open(bundle, device="cpu") as opened:
        rows, _ = written(opened, lines)
        expected = opened.score([(row["instruction"], row["response"]) for row in rows])
    assert [row["id"] for row in rows] == list(range(len(lines)))
    np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=0, atol=1e-5)


@given(
    fields=st.dictionaries(
        st.text(max_size=5).filter(lambda name: not name.startswith("score")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
            max_leaves=5,
        ),
        max_size=4,
    )
)
@settings(deadline=None, max_examples=60)
def test_other_fields_are_kept_in_their_place_and_value(scorer: Scorer, fields: dict[str, Any]) -> None:
    fields = {**fields, "instruction": "q", "response": "a"}
    rows, _ = written(scorer, [json.dumps(fields).encode()])
    assert list(rows[0].items())[:-1] == list(fields.items())
    assert list(rows[0])[-1] == "score"


def test_every_row_is_one_line_of_utf8_without_needless_escapes(scorer: Scorer) -> None:
    output: list[bytes] = []
    score_lines(scorer, [line_of(instruction="Où\n?", note="中文 \u2028")], output.append)
    (line,) = b"".join(output).decode().split("\n")[:-1]
    assert '"instruction": "Où\\n?"' in line
    assert '"note": "中文 \u2028"' in line


def test_a_lone_surrogate_in_another_field_survives_as_its_escape(scorer: Scorer) -> None:
    lines = [
        b'{"instruction": "q", "response": "\xc3\xa9", "note": "x\\ud800y", "\\udfff": 1}\n',
        b'{"instruction": "q", "response": "\xc3\xa9"}\n',
    ]
    output: list[bytes] = []
    score_lines(scorer, lines, output.append)
    first, second = output
    assert rb"x\ud800y" in first
    assert rb"\udfff" in first
    assert json.loads(first)["response"] == "é"
    assert "é".encode() in second


@pytest.mark.parametrize("number", [b"1e400", b"-1e999"])
def test_a_number_beyond_floats_is_refused_since_it_could_not_be_written_back(scorer: Scorer, number: bytes) -> None:
    output: list[bytes] = []
    line = b'{"instruction": "q", "response": "a", "n": %s}\n' % number
    with pytest.raises(InvalidLine, match=f"^line 1: not JSON .*{number.decode()} is beyond a float's range"):
        score_lines(scorer, [line], output.append)
    assert output == []


def test_nesting_of_any_depth_is_written_back_or_refused_as_a_bad_line(scorer: Scorer) -> None:
    # Python's parser and its serialiser give up at different depths, so every depth near their limits is tried.
    lines = [
        b'{"instruction": "q", "response": "a", "x": %s}\n' % (b"[" * depth + b"]" * depth)
        for depth in range(800, 1050)
    ]
    output: list[bytes] = []
    totals = score_lines(scorer, lines, output.append, on_error="skip")
    assert len(output) + len(totals.skipped) == len(lines)


def test_no_lines_give_no_rows(scorer: Scorer) -> None:
    assert written(scorer, []) == ([], Totals())


# The score's field


def test_the_scores_field_has_the_name_asked_for(scorer: Scorer) -> None:
    rows, _ = written(scorer, [line_of(score="mine"), line_of(response=LONG)], field_name="cappy")
    assert list(rows[0]) == ["instruction", "response", "score", "cappy"]
    assert rows[0]["score"] == "mine"
    assert list(rows[1]) == ["instruction", "response", "cappy", "cappy_truncated"]


def test_truncated_rows_are_marked_and_counted(scorer: Scorer) -> None:
    rows, totals = written(scorer, [GOOD, line_of(response=LONG), GOOD, line_of(instruction=LONG)])
    assert [row.get("score_truncated") for row in rows] == [None, True, None, True]
    assert totals.truncated == 2


@pytest.mark.parametrize("name", ["score", "score_truncated"])
def test_a_line_that_has_the_scores_field_already_is_bad(scorer: Scorer, name: str) -> None:
    output: list[bytes] = []
    with pytest.raises(InvalidLine, match=f"^line 2: has a field {name!r} already; .*--score-field"):
        score_lines(scorer, [GOOD, line_of(**{name: None}), GOOD], output.append)
    assert len(output) == 1


# Bad lines


@pytest.mark.parametrize("good_before", [0, 3, WINDOW_PAIRS, WINDOW_PAIRS + 5])
def test_a_bad_line_stops_after_the_rows_before_it_were_written(scorer: Scorer, good_before: int) -> None:
    lines = [*many_lines(good_before), b"oops\n", *many_lines(10)]
    output: list[bytes] = []
    with pytest.raises(InvalidLine, match=f"^line {good_before + 1}: not JSON"):
        score_lines(scorer, lines, output.append)
    assert [json.loads(line)["id"] for line in output] == list(range(good_before))


def test_bad_lines_are_skipped_listed_and_logged_where_asked_for(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [b"oops\n", GOOD, b"\n", b'{"instruction": "q"}\n', GOOD, line_of(score=1)]
    with caplog.at_level(logging.WARNING, logger="cappy_engine"):
        rows, totals = written(scorer, lines, on_error="skip")
    assert len(rows) == totals.pairs == 2
    assert [error.number for error in totals.skipped] == [1, 4, 6]
    assert totals.blank_lines == 1
    assert [record.getMessage() for record in caplog.records] == [f"skipped {error}" for error in totals.skipped]


def test_blank_lines_are_counted_and_leave_numbers_right(scorer: Scorer) -> None:
    rows, totals = written(scorer, [b"\n", GOOD, b"  \r\n", b"\n", GOOD, b"\n"])
    assert (len(rows), totals.blank_lines) == (2, 4)
    with pytest.raises(InvalidLine, match=r"^line 4:"):
        written(scorer, [b"\n", GOOD, b"\n", b"oops"])


@given(kinds=st.lists(st.sampled_from(["good", "bad", "blank"]), max_size=20))
@settings(deadline=None, max_examples=60)
def test_every_line_is_written_skipped_or_blank(scorer: Scorer, kinds: list[str]) -> None:
    of_kind = {"bad": b"{}\n", "blank": b" \n"}
    lines = [of_kind.get(kind, line_of(id=place)) for place, kind in enumerate(kinds)]
    rows, totals = written(scorer, lines, on_error="skip")
    assert [row["id"] for row in rows] == [place for place, kind in enumerate(kinds) if kind == "good"]
    assert [error.number - 1 for error in totals.skipped] == [
        place for place, kind in enumerate(kinds) if kind == "bad"
    ]
    assert totals.blank_lines == kinds.count("blank")
    assert totals.bytes_scored == sum(map(len, lines))


@pytest.mark.parametrize("on_error", ["ignore", "", "STOP"])
def test_an_unknown_way_with_bad_lines_is_a_wrong_argument(scorer: Scorer, on_error: str) -> None:
    with pytest.raises(ValueError, match=f"on_error must be 'stop' or 'skip', got {on_error!r}"):
        score_lines(scorer, [GOOD], lambda line: None, on_error=on_error)


@pytest.mark.parametrize("name", ["", "instruction", "response"])
def test_a_score_field_that_would_hide_the_pair_is_a_wrong_argument(scorer: Scorer, name: str) -> None:
    with pytest.raises(ValueError, match="field_name must be a name of its own"):
        score_lines(scorer, [GOOD], lambda line: None, field_name=name)


# Streaming and progress


def test_a_window_is_written_before_the_next_one_is_read(scorer: Scorer) -> None:
    output: list[bytes] = []
    seen: list[int] = []

    def lines() -> Iterable[bytes]:
        for line in many_lines(3 * WINDOW_PAIRS):
            seen.append(len(output))
            yield line

    score_lines(scorer, lines(), output.append)
    assert max(read - before for read, before in enumerate(seen, start=1)) == WINDOW_PAIRS


def test_what_was_scored_before_the_device_failed_is_written(tokenizer: PairTokenizer) -> None:
    counting = fake_scorer(tokenizer=tokenizer)
    lines = many_lines(2 * WINDOW_PAIRS)
    batches = 0

    def count(totals: Totals) -> None:
        nonlocal batches
        batches += totals.pairs <= WINDOW_PAIRS

    written(counting, lines, progress=count)
    failing = FakeSession(fails_at=batches + 1, error=ScoringError("the device is gone"))
    output: list[bytes] = []
    with pytest.raises(ScoringError, match="the device is gone"):
        score_lines(fake_scorer(failing, tokenizer=tokenizer), lines, output.append)
    assert [json.loads(line)["id"] for line in output] == list(range(WINDOW_PAIRS))


def test_progress_is_told_growing_totals_up_to_the_size_of_the_input(scorer: Scorer) -> None:
    lines = [*many_lines(WINDOW_PAIRS + 50), b"\n", b"oops\n", *many_lines(WINDOW_PAIRS)]
    told: list[Totals] = []
    _, totals = written(scorer, lines, on_error="skip", progress=lambda so_far: told.append(copy.copy(so_far)))
    values: list[Callable[[Totals], int]] = [
        lambda so_far: so_far.pairs,
        lambda so_far: so_far.tokens,
        lambda so_far: so_far.bytes_scored,
    ]
    for value in values:
        numbers = [value(so_far) for so_far in told]
        assert numbers == sorted(numbers)
        assert numbers[0] > 0
        assert numbers[-1] == value(totals)
    assert [so_far.pairs for so_far in told] == sorted({so_far.pairs for so_far in told})
    assert len(told) > 10
    assert totals.bytes_scored == sum(map(len, lines))
