"""Read bodies strictly: what is not of its type, or is not known, is refused with its place.

A field that an object has twice is refused as well: parsers drop the first.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from typing import Any, TypeVar

import msgspec

from cappy_engine.activations import sigmoid
from cappy_engine.checks import shown
from cappy_engine.errors import InvalidRequest
from cappy_engine.pairs import TooLong
from cappy_engine.ranking import best_first
from cappy_engine.serving.dialects.surrogates import check_surrogates
from cappy_engine.serving.requests import ScoringResult

Shape = TypeVar("Shape")
PLACE = re.compile(r" - at (?:`key` in )?`(\$(?:\.\w+|\[[\d.]+\])*)`\Z")
"""Where msgspec says that something is wrong: behind its problem, such as "`$.pairs[3].response`"."""
STEP = re.compile(r"\.(\w+)|\[")
MOST_SHOWN = 200
"""Characters at each end of a problem that an answer has."""


def _check_once(fields: list[tuple[str, object]]) -> None:
    """Raise InvalidRequest if an object has a field twice. Any name counts, however it is written."""
    if len(dict(fields)) < len(fields):
        name = Counter(name for name, _ in fields).most_common(1)[0][0]
        raise InvalidRequest(f"the body: has the field {shown(name)} twice; send it once")


FIELDS_ONCE = json.JSONDecoder(object_pairs_hook=_check_once, parse_int=str, parse_float=str)
"""Looks at the fields of all objects, and keeps nothing of them; numbers were read before, by msgspec."""


def decoded(body: bytes, shape: type[Shape]) -> Shape:
    """Decode a JSON body. Raises InvalidRequest: 400 for what is not JSON, 422 for what has another shape.

    Raises InvalidPair for a pair with a lone surrogate, which JSON can hold and no tokenizer takes.

    >>> decoded(b"[1, 2]", list[int])
    [1, 2]
    """
    with _refusing(body, shape):
        found = msgspec.json.decode(body, type=shape)
        FIELDS_ONCE.decode(body.decode())
    return found


def field_names(body: bytes) -> Set[str]:
    """List the names of a JSON object's fields, without a look at their values. Raises InvalidRequest.

    >>> sorted(field_names(b'{"query": "Is the sky blue?", "texts": []}'))
    ['query', 'texts']
    """
    with _refusing(body):
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys()


@contextlib.contextmanager
def _refusing(body: bytes, shape: object = None) -> Iterator[None]:
    """Translate the errors of parsers. They say what `shape` has where the body has something else."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise InvalidRequest(_placed(str(error), shape)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # what of UTF-8 is wrong is told by either
        _check_utf8(body)
        check_surrogates(body)
        raise InvalidRequest(f"the body is not JSON: {error}", 400) from error
    except RecursionError as error:
        raise InvalidRequest("the body is not JSON: its lists or objects are nested too deeply", 400) from error


def _check_utf8(body: bytes) -> None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{body[error.start]:02x} at offset {error.start}"
        raise InvalidRequest(f"the body is not UTF-8: {where}; send JSON in UTF-8", 400) from error


def wants_sigmoid(**asked: bool | None) -> bool:
    """Say whether a request asks for the sigmoid of scores. Raises InvalidRequest if it contradicts itself.

    Each name says what its true means: `raw_scores` the scores themselves, every other one the sigmoid. None asks for
    nothing: then scores are raw.

        >>> wants_sigmoid(raw_scores=False)
        True
    """
    wanted = {name: value != (name == "raw_scores") for name, value in asked.items() if value is not None}
    if len(set(wanted.values())) > 1:
        raise InvalidRequest(f"{' and '.join(wanted)} ask for different scores; send one of them")
    return any(wanted.values())


def scores_of(result: ScoringResult, *, is_sigmoid: bool) -> list[float]:
    """List the scores of a result, or the sigmoid of each.

    >>> scores_of(result, is_sigmoid=False)
    [0.93, 0.12]
    """
    raw: list[float] = result.scored.scores.tolist()
    return [sigmoid(score) for score in raw] if is_sigmoid else raw


def ranked_places(result: ScoringResult, top_n: int | None) -> list[int]:
    """List the places of the best `top_n` pairs, or of all, the best first; the first wins a tie.

    >>> ranked_places(result, 1)
    [0]
    """
    return best_first(result.scored.scores, result.exact)[:top_n]


def too_long_of(truncate: bool | None) -> TooLong:
    """Say what happens to pairs that are too long; without an answer they are truncated.

    >>> too_long_of(False)
    'refuse'
    """
    return "refuse" if truncate is False else "truncate"


def refuse_others(name: str, value: object, harmless: Iterable[object], why: str) -> None:
    """Raise InvalidRequest if a field asks for what cannot be done: only `harmless` values change nothing.

    >>> refuse_others("truncation_side", "right", (None, "right"), "texts are cut at their ends")
    """
    known = tuple(harmless)
    if not any(value == each and type(value) is type(each) for each in known):
        given = " or ".join(msgspec.json.encode(each).decode() for each in known if each is not None)
        written = msgspec.json.encode(value).decode()[:60]
        raise InvalidRequest(
            f"{name} {written} is not supported: {why}; leave it out{f', or send {given}' if given else ''}"
        )


def _placed(problem: str, shape: object) -> str:
    """Write where it is wrong first: "$.pairs[3].response: expected `str`, got `int`".

    A problem may hold what the client sent: that is cut, and searched in linear time.
    """
    if len(problem) > 2 * MOST_SHOWN:
        problem = f"{problem[:MOST_SHOWN]}...{problem[-MOST_SHOWN:]}"
    found = PLACE.search(problem)
    what, where = (problem[: found.start()], found[1]) if found else (problem, "the body")
    known: list[str] = []
    if what.startswith("Object contains unknown field"):
        known = _fields_of(_types_at(where, shape))
    elif what.startswith("Invalid enum value"):
        known = _values_of(_types_at(where, shape))
    verb = "have" if what.startswith("Object") else "be"
    return f"{where}: {what[:1].lower()}{what[1:]}{f'; it may {verb} ' * bool(known)}{', '.join(known)}"


def _types_at(where: str, shape: object) -> list[Any]:
    """List the types that the value at a place such as `$.pairs[0]` may have."""
    found: list[Any] = [msgspec.inspect.type_info(shape)]
    for step in STEP.finditer(where):
        found = [inner for each in found for inner in _inner(each, step[1])]
    return found


def _fields_of(types: Iterable[Any]) -> list[str]:
    """List the fields that an object of one of the types may have."""
    return [field.encode_name for each in types for kind in _kinds(each) for field in getattr(kind, "fields", ())]


def _values_of(types: Iterable[Any]) -> list[str]:
    """List the values that the types may have, as the API's description does; empty if it has no such list."""
    found: list[object] = []
    for each in types:
        described = getattr(each, "extra_json_schema", None) or {}
        found += described.get("enum") or [value for kind in _kinds(each) for value in getattr(kind, "values", ())]
    return [str(value) for value in found if value is not None]


def _inner(shape: Any, name: str | None) -> Iterator[Any]:
    """Yield the types of the field `name`. Without a name, yield those of a list's or an object's values."""
    for kind in _kinds(shape):
        if name:
            yield from (field.type for field in getattr(kind, "fields", ()) if field.encode_name == name)
        else:
            yield from (getattr(kind, part) for part in ("item_type", "value_type") if hasattr(kind, part))


def _kinds(shape: Any) -> Iterable[Any]:
    """List what a value may be, without what is said about it."""
    while isinstance(shape, msgspec.inspect.Metadata):
        shape = shape.type
    return getattr(shape, "types", (shape,))
