"""What a dataclass of options says of its fields is checked by its constructor, as it is on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.cli.bulk_work import BulkOptions
from cappy_engine.cli.scoring import RankTexts
from cappy_engine.options import Asked, ScorerOptions, check_asked
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.triton import TritonOptions
from tests.support.asked_fields import wrong_values

CLASSES = (BulkOptions, RankTask, RankTexts, RowOptions, ScoreTask, ScorerOptions, ServerOptions, TritonOptions)


@dataclass(frozen=True)
class Meal:
    """Options of every kind."""

    guests: Annotated[int, Asked("how many eat", least=1)] = 1
    seats: Annotated[tuple[int, ...] | None, Asked("their numbers")] = None
    share: Annotated[float, Asked("of the bill", least=0.5)] = 0.5
    longest: Annotated[float, Asked("hours")] = 2.0
    recipe: Annotated[Path | None, Asked("where it is written")] = None
    dish: Annotated[str, Asked("what to eat", check=str.lower)] = "soup"
    drinks: Annotated[tuple[str, ...], Asked("what to drink", choices=("water", "wine"))] = ()
    notes: Annotated[Mapping[str, Any] | None, Asked("for the cook")] = None
    hot: Annotated[bool, Asked("not from the fridge")] = False
    price: float = 9.5

    def __post_init__(self) -> None:
        check_asked(self)


@pytest.mark.parametrize(
    ("cls", "name", "value", "shown"),
    [(cls, *wrong) for cls in (Meal, *CLASSES) for wrong in wrong_values(cls)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_value_is_refused_by_its_name(cls: type[Any], name: str, value: Any, shown: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{shown}"):
        cls(**{name: value})


@pytest.mark.parametrize("cls", [Meal, *CLASSES])
def test_every_default_is_a_right_value(cls: type[Any]) -> None:
    assert cls() == cls()


def test_values_get_one_form() -> None:
    given: dict[str, Any] = {
        "guests": np.int64(2),
        "seats": np.array([3, 4]),
        "share": np.float32(0.5),
        "longest": float("inf"),
        "recipe": "a/b",
        "dish": "SOUP",
        "drinks": ["wine", "water"],
        "hot": np.True_,
    }
    meal = Meal(**given)
    assert meal == Meal(2, (3, 4), 0.5, float("inf"), Path("a/b"), "soup", ("wine", "water"), hot=True)
    assert [type(value) for value in (meal.guests, meal.share, meal.hot)] == [int, float, bool]


def test_a_number_with_a_bound_is_finite() -> None:
    for share in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"share must be finite, got {share}"):
            Meal(share=share)


def test_a_number_is_not_larger_than_what_counts_with_it() -> None:
    Meal(guests=10**30, seats=(10**30,))
    with pytest.raises(ValueError, match="port must be at most 65535, got 100000000000000000000"):
        ServerOptions(port=10**20)
    with pytest.raises(ValueError, match="threads must be at most 4096, got 100000000000000000000"):
        ScorerOptions(threads=10**20)
    for share in (10**400, -(10**400)):
        with pytest.raises(ValueError, match="share must be finite, got"):
            Meal(share=share)


def test_a_field_that_is_not_asked_for_is_not_checked() -> None:
    assert Meal(price="free").price == "free"  # type: ignore[arg-type, comparison-overlap]
