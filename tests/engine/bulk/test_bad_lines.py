"""A bad line stops the scoring or is left out, always by its number; the rows before it are written."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine import Scored, Scorer
from cappy_engine.batching import EncodedPairs
from cappy_engine.bulk import windows
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.score_file import WINDOW_PAIRS, process_lines
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.errors import InvalidLine, ScoringError
from cappy_engine.testing import FakeSession, fake_scorer, score_of
from cappy_engine.tokenizer import PairTokenizer
from tests.support.scored_lines import GOOD, LONG, line_of, many_lines, rows_in, score_lines, written


@pytest.mark.parametrize("good_before", [0, 3, WINDOW_PAIRS, WINDOW_PAIRS + 5])
def test_a_bad_line_stops_after_the_rows_before_it_were_written(scorer: Scorer, good_before: int) -> None:
    lines = [*many_lines(good_before), b"oops\n", *many_lines(10)]
    output: list[bytes] = []
    with pytest.raises(InvalidLine, match=f"^line {good_before + 1}: not JSON"):
        score_lines(scorer, lines, output.append)
    assert [row["id"] for row in rows_in(output)] == list(range(good_before))


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
    with pytest.raises(ValueError, match=f"unknown on_error {on_error!r}; choose from stop, skip"):
        score_lines(scorer, [GOOD], lambda line: None, on_error=on_error)


@pytest.mark.parametrize("name", ["", "instruction", "response"])
def test_a_score_field_that_would_hide_the_pair_is_a_wrong_argument(name: str) -> None:
    with pytest.raises(ValueError, match="--score-field, in Python score_field"):
        ScoreTask(score_field=name)


@pytest.mark.parametrize("bad", [[0], [1, 2], [3, WINDOW_PAIRS - 1], [5, WINDOW_PAIRS + 5]])
def test_a_pair_that_fails_in_the_model_is_its_lines_error(bad: list[int], scorer: Scorer) -> None:
    lines = many_lines(WINDOW_PAIRS + 10)
    expected, _ = written(scorer, lines)
    failing = _Failing(scorer, {f"Question {number}?" for number in bad})
    rows, totals = written(failing, lines, on_error="skip")
    assert rows == [row for row in expected if row["id"] not in bad]
    assert [error.number - 1 for error in totals.skipped] == bad
    assert totals.pairs == len(rows)
    assert "the model gave nan" in str(totals.skipped[0])
    output: list[bytes] = []
    with pytest.raises(InvalidLine, match=f"^line {bad[0] + 1}: the model gave nan"):
        score_lines(failing, lines, output.append)
    assert [row["id"] for row in rows_in(output)] == list(range(bad[0]))


@pytest.mark.parametrize("on_error", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_any_number_of_pairs_of_a_window_may_fail_in_the_model(on_error: str, tokenizer: PairTokenizer) -> None:
    """The longest pairs are scored first, and they are the first lines here: each line is found by itself."""
    failing = FakeSession(lambda ids: float("nan") if len(set(ids)) > 1 else score_of(ids))  # all but a made-up pair
    lines = [line_of(instruction=str(number), response="a " * (40 - number // 40)) for number in range(1200)]
    output: list[bytes] = []
    options = RowOptions(on_error, window=len(lines))
    work = partial(process_lines, fake_scorer(failing, tokenizer=tokenizer), lines, output.append, ScoreTask(), options)
    if on_error == "skip":
        assert work().refused == len(lines)
    else:
        with pytest.raises(InvalidLine, match=r"^line 1: the model gave nan"):
            work()
    assert output == []


def test_a_candidate_that_fails_in_the_model_leaves_the_other_rows_their_own_scores(tokenizer: PairTokenizer) -> None:
    """Rows have several pairs here, some of them cut, so that rows and pairs have other places."""
    rows = [
        {
            "instruction": f"Question {number}?",
            "candidates": [LONG] * (number % 3) + [f"{number}.{place}" for place in "abc"],
        }
        for number in range(12)
    ]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    bad = tokenizer.encode([("Question 5?", "5.b")]).token_ids[0].tolist()
    failing = fake_scorer(FakeSession(lambda ids: float("nan") if ids == bad else score_of(ids)), tokenizer=tokenizer)
    output: list[bytes] = []
    totals = process_lines(failing, lines, output.append, RankTask(), RowOptions("skip"))
    scorer, alone = fake_scorer(tokenizer=tokenizer), list[bytes]()
    for line in (*lines[:5], *lines[6:]):
        process_lines(scorer, [line], alone.append, RankTask(), RowOptions())
    assert b"".join(output) == b"".join(alone)
    assert [error.number for error in totals.skipped] == [6]
    assert totals.truncated == sum(len(row.get("truncated", [])) for row in rows_in(output)) > 8


class _Failing(Scorer):
    """A scorer that fails for some instructions, at any of them, as a model that gives no number for some pairs."""

    def __init__(self, scorer: Scorer, bad: Collection[str]) -> None:
        super().__init__(scorer.tokenizer, scorer.dispatcher)
        self._bad = [scorer.encode([(text, "")]).token_ids[0].tolist()[:-1] for text in bad]  # all but the last token

    def score_encoded(self, encoded: EncodedPairs, **options: Any) -> Scored:
        scored = super().score_encoded(encoded, **options)
        places = [place for place, ids in enumerate(encoded.token_ids) if self._is_bad(ids.tolist())]
        if places:
            raise ScoringError("the model gave nan", places[-1])
        return scored

    def _is_bad(self, ids: list[int]) -> bool:
        return any(ids[: len(begin)] == begin for begin in self._bad)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_line_that_is_too_long_is_a_bad_one(on_error: str, scorer: Scorer) -> None:
    lines = io.BytesIO(GOOD + line_of(note="x" * 5000) + GOOD)
    output: list[bytes] = []
    if on_error == "stop":
        with pytest.raises(InvalidLine, match=r"^line 2: is longer than 1000 bytes"):
            score_lines(scorer, lines, output.append, max_line_bytes=1000)
    else:
        totals = score_lines(scorer, lines, output.append, max_line_bytes=1000, on_error="skip")
        assert totals.bytes_scored == len(lines.getvalue())
        assert [error.number for error in totals.skipped] == [2]
    assert len(rows_in(output)) == (1 if on_error == "stop" else 2)


def test_rows_that_are_large_together_are_scored_at_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW_BYTES", 2000)
    output: list[bytes] = []
    score_lines(scorer, [line_of(note="x" * 1000)] * 5, output.append)
    assert [len(rows_in([part])) for part in output] == [2, 2, 1]


def test_rows_before_an_input_that_cannot_be_read_are_written(scorer: Scorer) -> None:
    def lines() -> Iterable[bytes]:
        yield from [GOOD, GOOD]
        raise EOFError("the input broke off")

    output: list[bytes] = []
    with pytest.raises(EOFError, match="broke off"):
        score_lines(scorer, lines(), output.append)
    assert len(rows_in(output)) == 2
