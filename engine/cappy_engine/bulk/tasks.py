"""Say which pairs a row holds, and what their scores add to it.

Pure: fields in, fields out. Knows nothing of files and formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from cappy_engine.activations import ACTIVATIONS, Activation, activated_score
from cappy_engine.checks import described
from cappy_engine.errors import InvalidLine
from cappy_engine.options import Asked, check_asked
from cappy_engine.pairs import Pair, text_problem
from cappy_engine.ranking import first_best

AskedActivation = Annotated[
    Activation, Asked("what is put on raw scores; the order of a ranking stays", choices=ACTIVATIONS)
]


class Task(Protocol):
    """What is done with rows.

    `texts` are the fields of a row that must hold a text, and `lists` the fields that must hold a list of texts.
    `added` are the fields that a row gets, with the kind of each (`tables.TYPES`); the option `name_option` renames
    them. `results` takes raw scores.
    """

    @property
    def name_option(self) -> str: ...

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def lists(self) -> tuple[str, ...]: ...

    @property
    def added(self) -> Mapping[str, str]: ...

    def pairs(self, fields: Mapping[str, Any], number: int, unit: str) -> tuple[Pair, ...]: ...

    def results(
        self, pairs: Sequence[Pair], scores: Sequence[float], truncated: Sequence[bool]
    ) -> dict[str, object]: ...


@dataclass(frozen=True)
class ScoreTask:
    """Score the one pair of each row.

    >>> ScoreTask().results([("q", "a")], [0.5], [False])
    {'score': 0.5, 'score_truncated': False}
    """

    instruction_column: Annotated[str, Asked("the name of the instructions' column or field", metavar="NAME")] = (
        "instruction"
    )
    response_column: Annotated[str, Asked("the name of the responses' column or field", metavar="NAME")] = "response"
    score_field: Annotated[str, Asked("the name of the field to add", metavar="NAME")] = "score"
    activation: AskedActivation = "identity"

    def __post_init__(self) -> None:
        check_asked(self)
        if self.instruction_column == self.response_column:
            raise ValueError(f"instruction and response cannot both be the column {self.response_column!r}")
        if self.score_field in ("", self.instruction_column, self.response_column):
            raise ValueError(
                f"the score's field ({self.name_option}, in Python score_field) must be a name of its own, "
                f"got {self.score_field!r}"
            )

    @property
    def name_option(self) -> str:
        """Name the option that gives the score another name."""
        return "--score-field"

    @property
    def texts(self) -> tuple[str, ...]:
        """Name the two fields of a pair."""
        return (self.instruction_column, self.response_column)

    @property
    def lists(self) -> tuple[str, ...]:
        """Name nothing."""
        return ()

    @property
    def added(self) -> Mapping[str, str]:
        """Name the score, and whether the pair was truncated."""
        return {self.score_field: "float", f"{self.score_field}_truncated": "bool"}

    def pairs(self, fields: Mapping[str, Any], number: int, unit: str) -> tuple[Pair, ...]:
        """Give the pair of a row. Raises InvalidLine for what is not a text."""
        return (
            (_text(fields, self.instruction_column, number, unit), _text(fields, self.response_column, number, unit)),
        )

    def results(self, pairs: Sequence[Pair], scores: Sequence[float], truncated: Sequence[bool]) -> dict[str, object]:
        """Give what is added to a row."""
        return {
            self.score_field: activated_score(scores[0], self.activation),
            f"{self.score_field}_truncated": truncated[0],
        }


@dataclass(frozen=True)
class RankTask:
    """Find the best of each row's candidates by raw scores. The first wins a tie.

    >>> RankTask().results([("q", "a"), ("q", "b")], [0.25, 0.75], [False, False])["winner"]
    'b'
    """

    instruction_column: Annotated[str, Asked("the name of the instructions' column or field", metavar="NAME")] = (
        "instruction"
    )
    candidates_column: Annotated[
        str, Asked("the name of the column or field with lists of candidates", metavar="NAME")
    ] = "candidates"
    prefix: Annotated[str, Asked("what the names of the fields to add begin with", metavar="TEXT")] = ""
    activation: AskedActivation = "identity"

    def __post_init__(self) -> None:
        check_asked(self)
        if self.instruction_column == self.candidates_column:
            raise ValueError(f"instruction and candidates cannot both be the column {self.candidates_column!r}")

    @property
    def name_option(self) -> str:
        """Name the option that gives other names."""
        return "--prefix"

    @property
    def texts(self) -> tuple[str, ...]:
        """Name the instruction."""
        return (self.instruction_column,)

    @property
    def lists(self) -> tuple[str, ...]:
        """Name the list of candidates."""
        return (self.candidates_column,)

    @property
    def added(self) -> Mapping[str, str]:
        """Name the winner, its place from 0, all scores, the margin, the truncated ones."""
        kinds = {"winner": "text", "winner_index": "int", "scores": "floats", "margin": "float", "truncated": "ints"}
        return {self.prefix + name: kind for name, kind in kinds.items()}

    def pairs(self, fields: Mapping[str, Any], number: int, unit: str) -> tuple[Pair, ...]:
        """Pair the instruction with each candidate. Raises InvalidLine for what is not a list of at least one text."""
        instruction = _text(fields, self.instruction_column, number, unit)
        candidates = fields[self.candidates_column]
        if not isinstance(candidates, list):
            problem = f"{self.candidates_column} must be a list of texts, got {described(candidates)}"
            raise InvalidLine(number, problem, unit)
        if not candidates:
            raise InvalidLine(number, f"{self.candidates_column} is empty; there is nothing to rank", unit)
        for candidate in candidates:
            problem = text_problem(candidate) or ""
            if problem:
                raise InvalidLine(number, f"a candidate {problem}", unit)
        return tuple((instruction, candidate) for candidate in candidates)

    def results(self, pairs: Sequence[Pair], scores: Sequence[float], truncated: Sequence[bool]) -> dict[str, object]:
        """Give what is added to a row; a lone candidate has no margin."""
        best = first_best(scores)
        shown = [activated_score(score, self.activation) for score in scores]
        others = [*shown[:best], *shown[best + 1 :]]
        values = {
            "winner": pairs[best][1],
            "winner_index": best,
            "scores": shown,
            "margin": shown[best] - max(others) if others else None,
            "truncated": [place for place, is_cut in enumerate(truncated) if is_cut],
        }
        return {self.prefix + name: value for name, value in values.items()}


def _text(fields: Mapping[str, Any], name: str, number: int, unit: str) -> str:
    value = fields[name]
    if isinstance(value, UnicodeDecodeError):
        raise InvalidLine(number, f"{name} is not UTF-8 ({value.reason})", unit)
    problem = text_problem(value)
    if problem:
        raise InvalidLine(number, f"{name} {problem}", unit)
    return str(value)
