"""Settings that changed are named."""

from __future__ import annotations

from typing import Any

import pytest

from cappy_engine.bulk.resume.settings import changes


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ({"a": {"b": [1]}}, {"a": {"b": (1,)}}, ""),
        ({"a": {"b": 1}, "c": None}, {"a": {"b": 1}}, ""),
        ({"a": 1}, {"a": {"b": 1}}, "a was 1, is not set; a.b was not set, is 1"),
    ],
)
def test_changes_are_named_by_their_path(before: dict[str, Any], after: dict[str, Any], shown: str) -> None:
    assert changes(before, after) == shown
