"""Defines a GPU check: steps, each of which measures or provokes one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cappy_bench.gpu.host import Environment, Machine
from cappy_bench.gpu.results import Figures
from cappy_engine.batching import Grouping
from cappy_engine.bundle import open_bundle
from cappy_engine.gpu.plan import BATCH_TOKENS, GpuModel
from cappy_engine.session import Session


class CheckFailed(Exception):
    """A step did not end as it must; `figures` were measured all the same."""

    def __init__(self, reason: str, figures: Figures | None = None) -> None:
        super().__init__(reason)
        self.figures = figures


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    A batch is run `runs` times, a batch of one `single_runs` times. The mixed workload has so many `pairs`; where there
    are no real texts, they are taken from a `pool` of so many. Attention is compared on batches of at most `tokens`.
    """

    runs: int
    single_runs: int
    pairs: int
    pool: int
    tokens: int


FULL, QUICK = Effort(15, 100, 2000, 4000, BATCH_TOKENS), Effort(2, 3, 24, 400, 1024)


@dataclass(frozen=True)
class Check:
    """What is checked, and where.

    `work` is a folder for files between the steps, `data` one with real texts, and `questions` a file with pairs of
    Natural Questions, if there are any.
    """

    machine: Machine
    checkpoint: Path
    bundle: Path
    work: Path
    data: Path | None
    questions: Path | None
    effort: Effort

    @property
    def cache(self) -> Path:
        """The folder of TensorRT's engines: CAPPY_CACHE of the steps."""
        return self.work / "cache"

    def open(self, contestant: str) -> tuple[Session, GpuModel]:
        """Open one of CONTESTANTS, with its batches: "cuda fp16", "pytorch bf16".

        >>> session, model = check.open("cuda fp16")
        """
        device, _, precision = contestant.partition(" ")
        if device != "pytorch":
            return self.machine.open_session(self.bundle, device, precision)
        batches = GpuModel(open_bundle(self.bundle), "cuda", precision, (0,), Grouping(BATCH_TOKENS, "allowed"))
        return self.machine.open_torch(self.checkpoint, precision), batches


@dataclass(frozen=True)
class Step:
    """One step: `run` returns figures, or raises (CheckFailed, where it has figures to keep).

    It needs `device`, and runs in a process with `environment` beside the usual one. The part of `name` before the
    first slash is its group.
    """

    name: str
    device: str
    run: Callable[[Check], Figures]
    environment: Environment = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The word by which `--only` takes the step."""
        return self.name.partition("/")[0]
