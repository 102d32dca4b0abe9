"""Say what is asked of an export and of a proof: one frozen dataclass each, for Python and for the command line.

Knows nothing of PyTorch, so that `cappy export --help` starts fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cappy_engine.bundle import PRECISIONS, TARGETS
from cappy_engine.errors import ExportError
from cappy_engine.options import Asked, check_asked
from cappy_export.proof.limits import check_measured, parse_limits

Say = Callable[[str], object]
"""Is told of every step, and of what a user should know."""

Revision = Annotated[str | None, Asked("hub revision: a branch, tag or commit")]
OwnPairs = Annotated[Path | None, Asked("JSON Lines with your own parity pairs (default: those of the package)")]
ChangedLimits = Annotated[
    tuple[str, ...],
    Asked(
        "change one parity limit: max_error, max_relative_error, min_spearman or min_winner_agreement; repeatable",
        flag="--limit",
        metavar="PRECISION.NAME=VALUE",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Say what is asked of `export`.

    >>> ExportOptions(precisions=("fp32", "int8"), limits=("int8.min_spearman=0.99",))

    Every one of `precisions` is made and proven for each of `targets` (devices) that runs it. With `keep` only these of
    the CPU's are written; the manifest has the parity of all. TensorRT gets at most `buckets` lengths (or 4). `pairs`
    (JSON Lines) replaces the package's parity pairs, and `limits` changes what scores must keep (`proof.limits`).
    Under the CPU's int8 matrix products whose names hold one of `float32_products` stay in float32.

    Raises ValueError for an option out of range, and ExportError for options that would come to nothing together.
    """

    precisions: Annotated[
        tuple[str, ...], Asked("repeat for several (default: fp32)", flag="--precision", choices=PRECISIONS)
    ] = ("fp32",)
    targets: Annotated[
        tuple[str, ...],
        Asked(
            "a device to export for, in those of the precisions that it runs; repeatable (default: cpu)",
            flag="--target",
            choices=tuple(TARGETS),
        ),
    ] = ("cpu",)
    buckets: Annotated[
        int | None,
        Asked("at most so many lengths for TensorRT's engines, chosen for those of --pairs (default: 4)", least=1),
    ] = None
    keep: Annotated[
        tuple[str, ...] | None,
        Asked("write only these of the CPU's precisions; repeatable (default: all)", choices=PRECISIONS),
    ] = None
    float32_products: Annotated[
        tuple[str, ...],
        Asked(
            "leave matrix products whose names hold PART (layer.0/output/dense) in float32 under int8; repeatable",
            flag="--float32-product",
            metavar="PART",
        ),
    ] = ()
    revision: Revision = None
    max_length: Annotated[int, Asked("longest pair in tokens (default: 512)", least=1)] = 512
    pairs: OwnPairs = None
    limits: ChangedLimits = ()

    def __post_init__(self) -> None:
        check_asked(self)
        _order(self, "precisions", PRECISIONS)
        _order(self, "targets", tuple(TARGETS))
        _order(self, "keep", PRECISIONS)
        parse_limits(self.limits)
        self._check_targets()
        check_measured(self.limits, self.measured)
        self._check_for_cpus()

    @property
    def for_cpus(self) -> tuple[str, ...]:
        """List the precisions that are asked for on CPUs."""
        return self._runnable("cpu") if "cpu" in self.targets else ()

    @property
    def for_gpus(self) -> dict[str, tuple[str, ...]]:
        """List the precisions of each target but the CPU, of those that were asked for."""
        return {target: self._runnable(target) for target in self.targets if target != "cpu"}

    @property
    def measured(self) -> frozenset[str]:
        """Name the precisions that are proven: those asked for, and fp32, which the CPU's others are made from."""
        on_cpus = {"fp32", *self.for_cpus} if self.for_cpus else set[str]()
        return frozenset(on_cpus.union(*self.for_gpus.values()))

    @property
    def kept(self) -> tuple[str, ...]:
        """List the CPU's precisions that are written."""
        return self.for_cpus if self.keep is None else self.keep

    def _runnable(self, target: str) -> tuple[str, ...]:
        return tuple(name for name in TARGETS[target] if name in self.precisions)

    def _check_targets(self) -> None:
        """Raise ExportError for a target or a precision that would come to nothing."""
        for target in self.targets:
            if not self._runnable(target):
                raise ExportError(f"{target} runs {', '.join(TARGETS[target])}, not {', '.join(self.precisions)}")
        for precision in self.precisions:
            if not any(precision in TARGETS[target] for target in self.targets):
                raise ExportError(f"{precision} does not run on {', '.join(self.targets)}; add a --target that runs it")
        if self.buckets is not None and "tensorrt" not in self.targets:
            raise ExportError("buckets are TensorRT's lengths; add --target tensorrt, or leave them out")

    def _check_for_cpus(self) -> None:
        """Raise ExportError for an option of a precision that is not made for CPUs."""
        if not set(self.kept) <= set(self.for_cpus):
            raise ExportError(
                f"cannot keep {', '.join(self.kept)} of {', '.join(self.for_cpus)}; name it as a precision too"
            )
        if self.float32_products and "int8" not in self.for_cpus:
            raise ExportError("float32 products are for the CPU's int8; name it as a precision too")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Say what is asked of `verify`: by default all models of the bundle are measured.

    >>> VerifyOptions(precisions=("int8",))

    `precisions` are the CPU's. Raises ValueError for an unknown precision or a limit out of its bounds, and ExportError
    for a text that is not a limit.
    """

    revision: Revision = None
    precisions: Annotated[
        tuple[str, ...] | None,
        Asked(
            "of the models for CPUs; repeat for several (default: all models, those for GPUs too)",
            flag="--precision",
            choices=PRECISIONS,
        ),
    ] = None
    pairs: OwnPairs = None
    limits: ChangedLimits = ()

    def __post_init__(self) -> None:
        check_asked(self)
        _order(self, "precisions", PRECISIONS)
        parse_limits(self.limits)


def _order(options: object, name: str, choices: Sequence[str]) -> None:
    """Put the names in a field into the order of `choices`, each once; raises ValueError for an empty list."""
    names = getattr(options, name)
    if names == ():
        raise ValueError(f"{name} must be a list from {', '.join(choices)}, got an empty one")
    if names is not None:  # the dataclass is frozen for everyone else
        object.__setattr__(options, name, tuple(choice for choice in choices if choice in names))
