"""Say what was asked of a scorer, and what was chosen.

`ScorerOptions` is the one list of options: `Scorer.open`, the command line, servers and clusters all build it.
`ScorerInfo` says what runs, and why.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from cappy_engine.batching import Padding
from cappy_engine.bundle import PRECISIONS, TARGETS
from cappy_engine.checks import check_count, check_flag, check_number, check_word, described
from cappy_engine.cpu.execution import MODES
from cappy_engine.errors import DeviceUnavailable, PrecisionUnavailable
from cappy_engine.pairs import MAX_TEXT_CHARS
from cappy_engine.session import DEVICES

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "int8"]
Mode = Literal["auto", "latency", "throughput", "both"]

AUTO_PRECISIONS = {"cpu": ("fp32", "int8", "fp16"), "cuda": ("fp32", "fp16"), "tensorrt": ("fp32", "fp16", "int8")}
"""The precisions that precision "auto" tries on a device, in this order. Others that it runs are asked for by name.

Exact scores come before fast ones: int8 changes scores by more than rounding, so it must be asked for where there is
fp32. bf16 is fast on some CPUs only. fp16 is slow on a CPU. On an H200 its error was about a thousand times fp32's
(docs/gpu.md)."""


MOST_THREADS = 4096
"""More than a machine has cores. A number with some digits too many would start as many threads."""


@dataclass(frozen=True)
class Asked:
    """What a field of a dataclass of options takes: `Annotated[type, Asked(...)]`.

    `cli.arguments.takes` makes an option of a command of it, `check_asked` checks the field. `flag` is the option's
    name, or several with spaces between (empty: the field's). `choices` are the words that it takes, `least` is the
    smallest number (without it a whole one is 0 or more), `most` the largest whole one. A field whose type is a tuple
    takes the option several times. `alone` is the value if the option is given bare. `check` raises ValueError for a
    wrong word; it is not asked where there are `choices`.

        >>> @dataclass(frozen=True)
        ... class Options:
        ...     threads: Annotated[int | None, Asked("CPU threads", least=1)] = None
    """

    help: str
    flag: str = ""
    choices: tuple[str, ...] = ()
    metavar: str = ""
    least: float | None = None
    most: int | None = None
    alone: str = ""
    check: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Question:
    """A field that is `Asked`: what one value is, whether it takes several or None, and how it is asked for."""

    field: dataclasses.Field[Any]
    kind: Any
    is_many: bool
    may_be_none: bool
    how: Asked


def questions(cls: type[Any]) -> Mapping[str, Question]:
    """Read which fields of a dataclass are `Asked`, and what they take.

    >>> list(questions(ScorerOptions))
    ['device', 'gpus', 'precision', 'threads', 'mode', 'max_batch_tokens', 'max_text_chars']
    """
    hints, found = typing.get_type_hints(cls, include_extras=True), {}
    for field in dataclasses.fields(cls):
        kind, *notes = typing.get_args(hints[field.name]) or (None,)
        how = next((note for note in notes if isinstance(note, Asked)), None)
        if how is not None:
            kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
            kind = next(each for each in kinds if each is not types.NoneType)
            one = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
            found[field.name] = Question(field, one, one is not kind, types.NoneType in kinds, how)
    return found


def check_asked(options: object) -> None:
    """Check every `Asked` field of a dataclass, and give its value one form: Python's numbers, a tuple, a Path.

        >>> check_asked(ScorerOptions(threads=4))

    Raises ValueError, with the name and the value, for what the command line refuses too.
    """
    for name, question in questions(type(options)).items():
        value = getattr(options, name)
        if value is not None or not question.may_be_none:
            check = _check_many if question.is_many else _check_one
            object.__setattr__(options, name, check(name, value, question))  # they are frozen for everyone else


def _check_many(name: str, value: Any, question: Question) -> tuple[Any, ...]:
    what, choices = "number" if question.kind in (int, float) else "text", question.how.choices
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    values = tuple(value) if is_list else ()
    if not is_list or (choices and not all(each in choices for each in values)):
        wanted = f"from {', '.join(choices)}" if choices else f"of {what}s"
        raise ValueError(f"{name} must be a list {wanted}, got {described(value)}")
    return tuple(_check_one(f"a {what} in {name}", each, question) for each in values)


def _check_one(name: str, value: Any, question: Question) -> Any:
    kind, how = question.kind, question.how
    if kind is bool:
        check_flag(name, value)
        return bool(value)
    if kind is int:
        return check_count(name, value, least=math.ceil(how.least or 0), most=how.most)
    if kind is float:
        return check_number(name, value, least=how.least)
    if how.choices:
        check_word(name, value, how.choices)
        return value
    wanted: Any = (str, os.PathLike) if kind is Path else typing.get_origin(kind) or str
    if not isinstance(value, wanted) or (kind is Path and value == ""):
        raise ValueError(f"{name} must be a {kind.__name__.lower()}, got {described(value)}")
    return Path(value) if kind is Path else how.check(value) if how.check else value


@dataclass(frozen=True)
class ScorerOptions:
    """The options of a scorer, as `Scorer.open` describes them.

    >>> ScorerOptions(precision="int8", threads=4)

    Raises ValueError, with the name and the value, for an option that no scorer has.
    """

    device: Annotated[Device, Asked("auto: CUDA where it works, else the CPU", choices=("auto", *DEVICES))] = "auto"
    gpus: Annotated[
        tuple[int, ...] | None,
        Asked("a GPU's number; repeat to share the work (default: 0)", flag="--gpu", metavar="NUMBER"),
    ] = None
    precision: Annotated[Precision, Asked("auto: fp32, if the bundle has it", choices=("auto", *PRECISIONS))] = "auto"
    threads: Annotated[
        int | None, Asked("CPU threads (default: one for each usable core)", least=1, most=MOST_THREADS)
    ] = None
    mode: Annotated[
        Mode,
        Asked(
            "all threads on one batch, one for each of several, or both with two sessions",
            choices=("auto", *MODES),
        ),
    ] = "auto"
    max_batch_tokens: Annotated[int | None, Asked("tokens in a batch (default: as tuned, or by device)", least=1)] = (
        None
    )
    max_text_chars: Annotated[int, Asked("a longer text is refused before it takes memory", least=1)] = MAX_TEXT_CHARS

    def __post_init__(self) -> None:
        check_asked(self)
        if self.gpus == ():
            raise ValueError("gpus must name at least one GPU, as in [0], got an empty list")
        if self.gpus is not None and self.device not in ("cuda", "tensorrt"):
            raise ValueError(
                f"gpus {list(self.gpus)} need a device that has some: cuda or tensorrt, not {self.device!r}"
            )

    def to_json(self) -> str:
        """Write the options as a JSON object; `from_json` reads it.

        >>> ScorerOptions.from_json(ScorerOptions(threads=2).to_json()) == ScorerOptions(threads=2)
        True
        """
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError for anything else, also for an option that does not exist."""
        if not isinstance(text, (str, bytes, bytearray)):
            raise ValueError(f"scorer options are a JSON object in a text, got {described(text)}")  # noqa: TRY004 - as for all
        try:
            fields = json.loads(text)
        except RecursionError as error:
            raise ValueError("scorer options are a JSON object, got one that is nested too deeply") from error
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not fields.keys() <= names:
            raise ValueError(f"scorer options are a JSON object with some of {sorted(names)}, got {text[:80]!r}")
        return cls(**fields)


@dataclass(frozen=True)
class ScorerInfo:
    """The choices that a scorer runs with, and why; `padding` is one of `batching.Padding`.

    `kernels` names the instructions that the native library uses on a CPU, as in "avx512", or says why it is
    not used: "none: they were switched off by CAPPY_KERNELS=none". It is empty on GPUs.
    """

    bundle: str
    device: str
    device_reason: str
    precision: str
    precision_reason: str
    threads: int
    mode: str
    mode_reason: str
    padding: Padding
    max_batch_tokens: int
    max_length: int
    gpus: tuple[int, ...] = ()
    buckets: tuple[int, ...] = ()
    kernels: str = ""

    def exact(self) -> ScorerOptions:
        """Make the options that open the same bundle in fp32, with the same settings."""
        return ScorerOptions(
            device=cast(Device, self.device),
            precision="fp32",
            threads=self.threads,
            mode=cast(Mode, self.mode),
            max_batch_tokens=self.max_batch_tokens,
            gpus=self.gpus or None,
        )


def choose_precision(asked: str, device: str, available: Sequence[str]) -> tuple[str, str]:
    """Choose the precision to run, and say why.

    It is `asked`, or for "auto" the first of AUTO_PRECISIONS that is available. Raises DeviceUnavailable if the device
    does not run that precision, PrecisionUnavailable if nothing is available, or only what is asked for by name.

        >>> choose_precision("auto", "cpu", ["fp16", "int8"])
        ('int8', 'auto: the first of fp32, int8, fp16 in the bundle')
    """
    runs, order = TARGETS[device], AUTO_PRECISIONS[device]
    if asked == "auto" and not available:
        raise PrecisionUnavailable(f"the bundle has no model for {device}; export it with --target {device}")
    found = asked if asked != "auto" else next((name for name in order if name in available), available[0])
    if found not in runs:
        raise DeviceUnavailable(f"{found} does not run on {device}, which runs {', '.join(runs)}")
    if asked == "auto" and found not in order:
        raise PrecisionUnavailable(
            f"the bundle has only {found} for {device}, which auto does not choose; ask for {found}"
        )
    return found, "asked for" if asked != "auto" else f"auto: the first of {', '.join(order)} in the bundle"
