"""What a dataclass of options says of its fields is checked by its constructor, as it is on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from cappy_export import ExportOptions, VerifyOptions
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from tests.support.asked_fields import wrong_values


@pytest.mark.parametrize(
    ("cls", "name", "value", "shown"),
    [(cls, *wrong) for cls in (AdaptOptions, ExportOptions, Recipe, VerifyOptions) for wrong in wrong_values(cls)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_value_is_refused_by_its_name(cls: type[Any], name: str, value: Any, shown: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{shown}"):
        cls(**{name: value})
