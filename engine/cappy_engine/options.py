"""Say what was asked of a scorer, and what was chosen.

`ScorerOptions` is the one list of options: `Scorer.open`, the command line, servers and clusters all build it.
`ScorerInfo` says what runs, and why.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, cast

from cappy_engine.batching import Padding
from cappy_engine.bundle import PRECISIONS, TARGETS
from cappy_engine.checks import check_count, check_word, described
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
fp32. bf16 is for whoever asks for it: it is fast on some CPUs only. fp16 is slow on a CPU, and was not measured on a
GPU."""


MOST_THREADS = 4096
"""More than a machine has cores. A number with some digits too many would start as many threads."""


@dataclass(frozen=True)
class Asked:
    """How a command asks for a field of a dataclass of options: `Annotated[type, Asked(...)]`.

    `flag` is the option's name, or several with spaces between (empty: the field's). `choices` are the words that it
    takes, `least` is the smallest number that it takes. A field whose type is a tuple takes the option several times.
    `alone` is the value of an option without one, `check` raises ValueError for a word that is not one.

        >>> @dataclass(frozen=True)
        ... class Options:
        ...     threads: Annotated[int | None, Asked("CPU threads", least=1)] = None
    """

    help: str
    flag: str = ""
    choices: tuple[str, ...] = ()
    metavar: str = ""
    least: float | None = None
    alone: str = ""
    check: Callable[[str], str] | None = None


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
    threads: Annotated[int | None, Asked("CPU threads (default: one for each usable core)", least=1)] = None
    mode: Annotated[
        Mode,
        Asked(
            "all threads on one batch, one for each of several, or both with the weights held twice",
            choices=("auto", *MODES),
        ),
    ] = "auto"
    max_batch_tokens: Annotated[int | None, Asked("tokens in a batch (default: as tuned, or by device)", least=1)] = (
        None
    )
    max_text_chars: Annotated[int, Asked("a longer text is refused before it takes memory", least=1)] = MAX_TEXT_CHARS

    def __post_init__(self) -> None:
        for name, choices in (("device", DEVICES), ("precision", PRECISIONS), ("mode", MODES)):
            check_word(name, getattr(self, name), ("auto", *choices))
        for name in ("threads", "max_batch_tokens", "max_text_chars"):
            value = getattr(self, name)
            if value is not None or name == "max_text_chars":
                object.__setattr__(self, name, check_count(name, value))
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {self.threads}")
        if self.gpus is not None:
            object.__setattr__(self, "gpus", _check_gpus(self.gpus, self.device))

    def to_json(self) -> str:
        """Write the options as a JSON object; `from_json` reads it.

        >>> ScorerOptions.from_json(ScorerOptions(threads=2).to_json()) == ScorerOptions(threads=2)
        True
        """
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError for anything else, also for an option that does not exist."""
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


def _check_gpus(gpus: object, device: str) -> tuple[int, ...]:
    """Return the numbers of GPUs; ValueError for anything else, and for a device that has none."""
    if isinstance(gpus, (str, bytes)) or not isinstance(gpus, Iterable):
        problem = f"gpus must be a list of GPUs' numbers, as in [0, 1], got {described(gpus)}"
        raise ValueError(problem)  # noqa: TRY004 - as for all options
    numbers = tuple(check_count("a number in gpus", number, least=0) for number in gpus)
    if not numbers:
        raise ValueError("gpus must name at least one GPU, as in [0], got an empty list")
    if device not in ("cuda", "tensorrt"):
        raise ValueError(f"gpus {list(numbers)} need a device that has some: cuda or tensorrt, not {device!r}")
    return numbers
