"""What the value of an option or argument may be, for click."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))
NAMED_AS_FOLDERS = f"{__name__}.named_as_folders"
"""Where click's context keeps them."""


def not_empty(path: Any) -> Any:
    """Return a path, or a word that may be one. Raises ValueError for an empty word.

    >>> not_empty("pairs.jsonl")
    'pairs.jsonl'
    """
    if path == "":
        raise ValueError("an empty path; is a variable not set?")
    return path


class FilePath(click.Path):
    """A path; an empty word, as of a variable that is not set, is none: it would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Accept a path."""
        try:
            path = super().convert(not_empty(value), param, ctx)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if ctx is not None and str(value).endswith(SEPARATORS):  # which a Path does not keep
            ctx.meta.setdefault(NAMED_AS_FOLDERS, set()).add(path)
        return path


PATH = FilePath(path_type=Path)


def is_named_as_folder(path: Path) -> bool:
    """Tell if a path of the running command was given with a final /.

    >>> is_named_as_folder(Path("scored"))
    False
    """
    context = click.get_current_context(silent=True)
    return context is not None and path in context.meta.get(NAMED_AS_FOLDERS, ())


class Words(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A choice of words that says how to give several of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Accept one of the words."""
        words = str(value).split(",")
        if param is not None and len(words) > 1 and set(words) <= set(self.choices):
            several = " ".join(f"{param.opts[0]} {word}" for word in words)
            hint = f"repeat the option: {several}" if param.multiple else f"choose one: {' or '.join(words)}"
            self.fail(f"{value!r} is not one of the words; {hint}", param, ctx)
        return str(super().convert(value, param, ctx))


class Checked(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A word that a function accepts, or refuses by a ValueError."""

    name = "text"

    def __init__(self, check: Callable[[str], str]) -> None:
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Accept the word."""
        try:
            return self._check(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Real(click.FloatRange):
    """A finite number within bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Accept a number."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"must be finite, got {value}", param, ctx)
        return found


def json_object(text: str) -> dict[str, Any]:
    """Accept the text of a JSON object.

    >>> json_object('{"top_k": -1}')
    {'top_k': -1}
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"must be JSON, got {text!r} ({error})") from error
    if not isinstance(found, dict):
        raise click.BadParameter(f"must be a JSON object, got {text!r}")
    return found
