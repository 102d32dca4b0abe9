"""Limits of parity, as texts."""

from __future__ import annotations

import re

import pytest

from cappy_engine.errors import ExportError
from cappy_export.proof.limits import LIMITS, Limits, default_limits, parse_limits
from tests.support.places import ROOT


def test_the_default_limits_are_those_that_the_page_names() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    names = {"max error": "max_error", "relative error": "max_relative_error", "Spearman": "min_spearman"}
    rows = re.findall(rf"^\| (\w+) \| ((?:{'|'.join(names)}) [^|]*) \|", page, re.MULTILINE)
    told = {precision: re.findall(rf"({'|'.join(names)}) ([0-9.e-]+)", limits) for precision, limits in rows}
    found = {key: Limits(**{names[name]: float(value) for name, value in limits}) for key, limits in told.items()}
    assert found == LIMITS


def test_limits_are_parsed_on_top_of_the_defaults() -> None:
    parsed = parse_limits(["int8.min_spearman=0.99", "int8.max_error=0.5"])
    assert parsed["int8"] == Limits(max_error=0.5, max_relative_error=0.25, min_spearman=0.99)
    assert parsed["fp32"] == LIMITS["fp32"] == Limits(max_error=1e-4, max_relative_error=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int4.max_error=1",
        "int8.error=1",
        "int8.max_error",
        "int8.max_error=little",
    ],
)
def test_a_limit_that_is_none_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(ExportError, match=text):
        parse_limits([text])


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("int8.max_error=-1", "0 or more"),
        ("int8.max_error=inf", "0 or more, and finite"),
        ("fp32.max_error=nan", "0 or more, and finite"),
        ("int8.max_relative_error=-0.1", "0 or more, and finite"),
        ("int8.min_spearman=97", "-1 to 1"),
        ("int8.min_spearman=-5", "-1 to 1"),
        ("int8.min_spearman=nan", "-1 to 1"),
        ("bf16.min_winner_agreement=99", "0 to 1"),
        ("bf16.min_winner_agreement=-0.1", "0 to 1"),
    ],
)
def test_a_limit_that_no_scores_or_all_scores_keep_is_refused_with_its_bounds(text: str, bounds: str) -> None:
    name, _, value = text.partition(".")[2].partition("=")
    with pytest.raises(ValueError, match=f"limit '{text}': {name} must be {bounds}.*, got {value}"):
        parse_limits([text])


@pytest.mark.parametrize("text", ["int8.max_error=0", "int8.min_spearman=-1", "int8.min_winner_agreement=1"])
def test_a_limit_may_be_one_of_its_bounds(text: str) -> None:
    name, _, value = text.removeprefix("int8.").partition("=")
    assert getattr(parse_limits([text])["int8"], name) == float(value)


@pytest.mark.parametrize("spread", [0.0, 0.35, 1.0])
def test_scores_of_cappys_spread_have_the_limits_as_they_stand(spread: float) -> None:
    assert default_limits(spread) == LIMITS


def test_errors_may_grow_with_the_spread_of_the_scores_and_ranks_may_not() -> None:
    wide = default_limits(50.0)
    assert wide["fp32"] == Limits(max_error=50 * 1e-4, max_relative_error=0.1)
    assert wide["fp16"] == Limits(max_error=50 * 5e-3, max_relative_error=0.1)
    assert wide["int8"] == LIMITS["int8"]


def test_a_limit_that_was_asked_for_is_taken_as_it_is() -> None:
    parsed = parse_limits(["fp32.max_error=1e-4", "int8.max_error=0.5"], spread=50.0)
    assert (parsed["fp32"].max_error, parsed["int8"].max_error) == (1e-4, 0.5)
