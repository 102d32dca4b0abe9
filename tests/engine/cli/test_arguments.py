"""A dataclass of options becomes options of a command, and their values an object of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
from click.testing import CliRunner

from cappy_engine.cli.arguments import command, flags_given, group, takes
from cappy_engine.cli.extras import extra
from cappy_engine.errors import InstallationError
from cappy_engine.options import Asked, ScorerOptions


@dataclass(frozen=True)
class Meal:
    """Options of every kind."""

    dish: Annotated[str, Asked("what to eat")]
    guests: Annotated[int | None, Asked("how many eat", least=1)] = None
    drinks: Annotated[tuple[str, ...], Asked("what to drink", flag="--drink", choices=("water", "wine"))] = ("water",)
    tables: Annotated[tuple[int, ...] | None, Asked("their numbers", flag="--table")] = None
    share: Annotated[float, Asked("of the bill (default: half)", least=0)] = 0.5
    recipe: Annotated[Path | None, Asked("where it is written")] = None
    notes: Annotated[Mapping[str, Any] | None, Asked("for the cook", metavar="JSON")] = None
    hot: Annotated[bool, Asked("not from the fridge")] = False
    price: float = 9.5

    def __post_init__(self) -> None:
        if self.dish == "stone":
            raise ValueError("dish must be food, got 'stone'")


def call(*words: str, cls: type[Any] = Meal, **takes_options: Any) -> tuple[Any, str]:
    """Call a command that takes the class: what it got, and what was printed."""
    got: list[Any] = []

    @command("examples:\n  cappy eat --dish soup")
    @takes(cls, "meal", **takes_options)
    def eat(meal: Any) -> None:
        """Eat."""
        got.append(meal)

    result = CliRunner().invoke(eat, words)
    return (got[0] if got else result.exit_code), result.output


def test_every_field_is_an_option_with_its_default() -> None:
    assert call("--dish", "soup") == (Meal("soup"), "")


def test_every_kind_of_value_is_read() -> None:
    words = "--dish soup --guests 3 --drink wine --drink water --table 4 --table 5 --share 1 --recipe a/b --hot".split()
    meal, _ = call(*words, "--notes", '{"salt": 1}')
    assert meal == Meal("soup", 3, ("wine", "water"), (4, 5), 1.0, Path("a/b"), {"salt": 1}, hot=True)
    assert type(meal.share) is float


def test_a_field_that_is_not_asked_for_is_not_an_option() -> None:
    status, output = call("--dish", "soup", "--price", "3")
    assert status == 2
    assert "--price" in output


def test_only_some_fields_may_be_asked_for() -> None:
    meal, _ = call("--threads", "3", cls=ScorerOptions, only=("threads",))
    assert meal == ScorerOptions(threads=3)
    assert call("--device", "cpu", cls=ScorerOptions, only=("threads",))[0] == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "Missing option '--dish'"),
        ("--dish soup --guests 0", "'--guests': 0 is not in the range x>=1"),
        ("--dish soup --guests some", "'some' is not a valid integer"),
        ("--dish soup --drink milk", "'milk' is not one of 'water', 'wine'"),
        ("--dish soup --drink water,wine", "repeat the option: --drink water --drink wine"),
        ("--dish soup --share -1", "-1.0 is not in the range x>=0"),
        ("--dish soup --share nan", "must be finite, got nan"),
        ("--dish soup --notes [1]", "must be a JSON object, got '[1]'"),
        ("--dish soup --notes {", "must be JSON, got '{'"),
        ("--dish stone", "dish must be food, got 'stone'"),
        ("--dish soup salt", "unexpected argument 'salt'\n"),
    ],
)
def test_a_wrong_value_is_wrong_usage_that_says_why(words: str, problem: str) -> None:
    status, output = call(*words.split())
    assert status == 2
    assert problem in output


def test_help_shows_what_is_asked_and_a_default_once() -> None:
    _, output = call("--help", section="With a table")
    assert "With a table:\n" in output
    text = " ".join(output.split())
    assert "--dish TEXT what to eat [required]" in text
    assert "--drink [water|wine] what to drink [default: water]" in text
    assert "of the bill (default: half) [x>=0]" in text
    assert "--hot not from the fridge --" not in text
    assert output.endswith("\nexamples:\n  cappy eat --dish soup\n")


def test_flags_on_the_command_line_are_told_from_defaults() -> None:
    found: list[str] = []

    @command("")
    @takes(Meal)
    def eat(options: Meal) -> None:
        found.extend(flags_given([field.name for field in dataclasses.fields(Meal)]))

    CliRunner().invoke(eat, ["--dish", "soup", "--drink", "water"])
    assert found == ["--dish", "--drink"]


def test_a_command_of_a_group_is_verbose_before_and_after_its_name() -> None:
    @group("examples:\n  cappy zoo feed")
    def zoo() -> None:
        """Look after animals."""

    @command("", name="feed", of=zoo)
    def feed_animals() -> None:
        click.echo("fed")

    runner = CliRunner()
    for words in (["feed"], ["--verbose", "feed"], ["feed", "--verbose"]):
        assert runner.invoke(zoo, words).output == "fed\n"
    assert runner.invoke(zoo, []).exit_code == 2


def test_a_missing_package_is_an_error_that_says_how_to_install_it() -> None:
    problem = r"needs the package 'no_such'; in a clone of .* '\.\[cpu,llm\]'"
    with pytest.raises(InstallationError, match=problem), extra("cpu,llm"):
        import no_such.module  # type: ignore[import-not-found]  # noqa: F401


def test_a_module_of_ours_that_is_missing_is_a_bug_and_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError), extra("cpu"):
        import cappy_engine.no_such_module  # type: ignore[import-not-found]  # noqa: F401
