"""JSON Lines in, JSON Lines out: the same rows in the same order, each with its score; no bad line goes unnoticed."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine import Scorer
from cappy_engine.bulk.score_file import WINDOW_PAIRS
from cappy_engine.bulk.totals import Totals
from cappy_engine.errors import InvalidLine, ScoringError
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.scored_lines import GOOD, LONG, line_of, many_lines, rows_in, score_lines, written

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


@pytest.mark.slow
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


KEPT = [
    '{"instruction": "Où\\n?", "response": "a", "note": "中文 \u2028"}',
    '{"instruction": "O\\u00f9", "response": "\\/a", "note": "\\u4e2d\\ud83d"}',
    ' {"response":"a","instruction" :\t"q", "x": {"b": 1,"a": []} } ',
    '{"instruction": "q", "response": "a", "n": [0.1000000000000000000001, 1E5, -0, 12345678901234567890123, 1e400]}',
    '{"n": 1, "instruction": "q", "response": "a", "n": 2, "x": {"response": 1, "response": 2}}',
    '{"instruction": "q", "response": "a"\r}',
]


@pytest.mark.parametrize("line", KEPT)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_row_keeps_its_own_bytes_with_the_score_before_its_last_brace(line: str, end: str, scorer: Scorer) -> None:
    output: list[bytes] = []
    score_lines(scorer, [(line + end).encode()], output.append)
    written = b"".join(output).decode()
    score = json.loads(written)["score"]
    begun, brace, rest = line.rpartition("}")
    spaces = begun[len(begun.rstrip()) :]
    assert written == f'{begun.rstrip()}, "score": {score}{spaces}{brace}\n'
    assert json.loads(written) == {**json.loads(line), "score": score}
    assert not rest.strip()


def test_a_byte_order_mark_is_not_written_into_a_line(scorer: Scorer) -> None:
    output: list[bytes] = []
    score_lines(scorer, [b"\xef\xbb\xbf" + GOOD, GOOD], output.append)
    assert [row["instruction"] for row in rows_in(output)] == ["q", "q"]


def test_a_lone_surrogate_in_another_field_survives_as_its_escape(scorer: Scorer) -> None:
    lines = [
        b'{"instruction": "q", "response": "\xc3\xa9", "note": "x\\ud800y", "\\udfff": 1}\n',
        b'{"instruction": "q", "response": "\xc3\xa9"}\n',
    ]
    output: list[bytes] = []
    score_lines(scorer, lines, output.append)
    first, second = b"".join(output).splitlines()
    assert rb"x\ud800y" in first
    assert rb"\udfff" in first
    assert json.loads(first)["response"] == "é"
    assert "é".encode() in second


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "[Infinity]"])
def test_a_value_that_is_not_json_is_a_bad_line(scorer: Scorer, value: str) -> None:
    line = f'{{"instruction": "q", "response": "a", "n": {value}}}\n'.encode()
    with pytest.raises(InvalidLine, match=rf"^line 1: not JSON \({value.strip('[]')} is not a value of JSON\)"):
        written(scorer, [line])


@pytest.mark.slow
def test_nesting_of_any_depth_is_written_back_or_refused_as_a_bad_line(scorer: Scorer) -> None:
    # Python's parser and its serialiser give up at different depths, so every depth near their limits is tried.
    lines = [
        b'{"instruction": "q", "response": "a", "x": %s}\n' % (b"[" * depth + b"]" * depth)
        for depth in range(800, 1050)
    ]
    output: list[bytes] = []
    totals = score_lines(scorer, lines, output.append, on_error="skip")
    assert len(rows_in(output)) + len(totals.skipped) == len(lines)


def test_no_lines_give_no_rows(scorer: Scorer) -> None:
    assert written(scorer, []) == ([], Totals())


# The score's field


def test_the_scores_field_has_the_name_asked_for(scorer: Scorer) -> None:
    rows, _ = written(scorer, [line_of(score="mine"), line_of(response=LONG)], score_field="cappy")
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


# Streaming and progress


def test_a_stream_that_pauses_gets_its_rows_at_once(scorer: Scorer) -> None:
    reader, writer = os.pipe()
    output: list[bytes] = []
    seen: list[int] = []

    def write() -> None:
        os.write(writer, GOOD * 3 + GOOD[:10])
        for _ in range(200):
            if output:
                break
            time.sleep(0.01)
        seen.append(len(rows_in(output)))
        os.write(writer, GOOD[10:])
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb") as lines:
        score_lines(scorer, lines, output.append)
    thread.join()
    assert (seen, len(rows_in(output))) == ([3], 4)


def test_a_window_is_written_before_the_next_one_is_read(scorer: Scorer) -> None:
    output: list[bytes] = []
    seen: list[int] = []

    def lines() -> Iterable[bytes]:
        for line in many_lines(3 * WINDOW_PAIRS):
            seen.append(len(rows_in(output)))
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
    assert [row["id"] for row in rows_in(output)] == list(range(WINDOW_PAIRS))


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
