r"""Find the lone surrogate for which msgspec does not decode a body: the field, and the pair that it is a part of.

A lone surrogate is half of a character, such as of an emoji that was cut. JSON may hold one, escaped as "\ud83d", but
no tokenizer takes it. msgspec says at best at which byte it stopped. So such a body is read again, for the error only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from cappy_engine.errors import InvalidPair, InvalidRequest
from cappy_engine.pairs import text_problem

Step = str | int
"""A field's name, or a place in a list."""
ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")
"""A surrogate, alone or not."""
TEXTS = frozenset(
    ("pairs", "candidates", "texts", "documents", "text_1", "text_2", "queries", "items", "data_1", "data_2")
)
"""The fields with a text of each pair, or an object with it."""
TEXTS_OF_ALL = frozenset(
    ("instruction", "query", "documents", "text_1", "text_2", "queries", "items", "data_1", "data_2")
)
"""The fields that may have one text for all pairs; the first of them is named."""
MOST_STEPS = 8
"""The steps to a text that an error tells."""
PLAIN_NAME = re.compile(r"\w{1,40}", re.ASCII)


def check_surrogates(body: bytes) -> None:
    r"""Raise InvalidPair if a pair of a JSON body has a lone surrogate.

    Raises InvalidRequest if another part of the body has one.

    >>> check_surrogates(rb'{"pairs": [{"instruction": "Is the sky blue?", "response": "\ud83d"}]}')
    Traceback (most recent call last):
    cappy_engine.errors.InvalidPair: pair 0: $.pairs[0].response has a lone surrogate '\ud83d' at character 0; ...
    """
    if not ESCAPED.search(body):
        return
    try:
        document: object = json.loads(body.decode(), parse_int=str, parse_float=str)
    except (ValueError, RecursionError):  # it is not JSON: msgspec says why
        return
    if found := _find(document):
        steps, problem, is_name = found
        pair = None if is_name else _pair_at(steps)
        where = f"{'a field of ' * is_name}{_written(steps)}"
        if pair is None:
            raise InvalidRequest(f"{where}: {problem}")
        raise InvalidPair(pair, f"{where} {problem}")


def _find(document: object) -> tuple[list[Step], str, bool] | None:
    """Find the first text that is not Unicode: the steps to it, what is wrong, and whether it is a field's name.

    It goes through all of a document once, and not by recursion: a client chose how deep it is.
    """
    steps: list[Step] = []
    levels = [iter(_inner([document]))]
    while levels:
        for step, value in levels[-1]:
            if isinstance(step, str) and (problem := text_problem(step)):
                return steps[1:], problem, True
            if isinstance(value, str) and (problem := text_problem(value)):
                return [*steps, step][1:], problem, False
            if isinstance(value, (list, dict)):
                steps.append(step)
                levels.append(iter(_inner(value)))
                break
        else:
            levels.pop()
            del steps[-1:]
    return None


def _inner(value: list[object] | dict[str, object]) -> Iterable[tuple[Step, object]]:
    return value.items() if isinstance(value, dict) else enumerate(value)


def _pair_at(steps: Sequence[Step]) -> int | None:
    """Tell the place of the pair that a text is a part of, or None: by where the dialects have their texts."""
    name, *rest = steps or [""]
    if name in TEXTS_OF_ALL and not rest:
        return 0
    if name in TEXTS and rest and isinstance(rest[0], int):
        return rest[0]
    if name == "inputs" and rest[1:2] == ["data"]:  # a tensor of KServe's
        return next((step for step in rest[2:3] if isinstance(step, int)), None)
    if name == "inputs" and len(rest) == 1:  # TEI's only pair
        return 0
    if name == "inputs" and len(rest) == 2 and isinstance(rest[0], int):  # a list of TEI's pairs
        return rest[0] if isinstance(rest[1], int) else None
    return None


def _written(steps: Sequence[Step]) -> str:
    """Write a place as msgspec does; long and strange names are left out."""
    parts = [
        f"[{step}]" if isinstance(step, int) else f".{step}" if PLAIN_NAME.fullmatch(step) else "[...]"
        for step in steps
    ]
    return "$" + "".join(parts if len(parts) <= MOST_STEPS else [*parts[:MOST_STEPS], "..."])
