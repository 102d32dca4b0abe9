"""Limits of parity, as texts."""

from __future__ import annotations

import pytest

from cappy_engine.errors import ExportError
from cappy_export.proof.limits import LIMITS, Limits, parse_limits


def test_limits_are_parsed_on_top_of_the_defaults() -> None:
    parsed = parse_limits(["int8.min_spearman=0.99", "int8.max_error=0.5"])
    assert parsed["int8"] == Limits(max_error=0.5, min_spearman=0.99)
    assert parsed["fp32"] == LIMITS["fp32"] == Limits(max_error=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int4.max_error=1",
        "int8.error=1",
        "int8.max_error",
        "int8.max_error=little",
        "int8.max_error=inf",
        "fp32.max_error=nan",
    ],
)
def test_a_limit_that_is_none_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(ExportError, match=text):
        parse_limits([text])
