"""Lists what can be asked of `cappy bench run`. Knows nothing of how it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cappy_bench.peers.specs import SPECS
from cappy_bench.speed.workloads import DESCRIPTIONS, PROOF, Sizes
from cappy_engine.bundle import EMBEDDED
from cappy_engine.options import Asked, check_asked

SUITES = {
    "quick": (3, Sizes(interactive=32, lengths=4, rerank=4, bulk=128, long=12, proof=100)),
    "full": (3, Sizes(interactive=8, lengths=1, rerank=1, bulk=32, long=2, proof=200)),
    "smoke": (2, Sizes(interactive=4, lengths=1, rerank=1, bulk=16, long=2)),
    "questions": (3, Sizes(interactive=0, lengths=0, rerank=0, bulk=0, long=0, questions=64, proof=200)),
}
"""Rounds, and the sizes of the workloads: quick is meant for cappy-mini, full for a model of cappy-large's size.

questions has the one workload of its name, which stands beside published figures."""
RESULTS = Path("bench/results")
"""Where results are written, and read for a report."""

RUNNERS = tuple(spec.name for spec in SPECS)
ENVIRONMENTS = tuple(sorted({spec.environment for spec in SPECS}))


@dataclass(frozen=True)
class RunOptions:
    """What is measured, and where the result goes.

    >>> RunOptions(suite="smoke", runners=("cappy-int8",))
    """

    bundle: Annotated[Path, Asked("folder of the bundle (default: cappy-mini)", metavar="BUNDLE")] = EMBEDDED
    checkpoint: Annotated[
        Path | None,
        Asked("the bundle's checkpoint: scores are compared with it, and other tools measured", metavar="CHECKPOINT"),
    ] = None
    out: Annotated[
        Path | None, Asked(f"the result, as JSON (default: {RESULTS}/MODEL-CPU.json)", metavar="RESULT.json")
    ] = None
    force: Annotated[bool, Asked("replace the result if it exists")] = False
    suite: Annotated[str, Asked("sizes of the workloads", choices=tuple(SUITES))] = "quick"
    title: Annotated[str, Asked("heads the tables and the report's section (default: the model's name)")] = ""
    work: Annotated[
        Path, Asked("folder for what other tools convert, and for notes to go on from", metavar="FOLDER")
    ] = Path("bench")
    tools: Annotated[Path, Asked("folder of the environments of other tools, .venv-bench-NAME", metavar="FOLDER")] = (
        Path()
    )
    runners: Annotated[
        tuple[str, ...],
        Asked("one of `cappy bench list`; repeat for more (default: all)", "--runner", RUNNERS, metavar="RUNNER"),
    ] = ()
    environments: Annotated[
        tuple[str, ...], Asked("only its runners; repeat for more (default: all)", "--environment", ENVIRONMENTS)
    ] = ()
    workloads: Annotated[
        tuple[str, ...], Asked("only this one; repeat for more (default: all)", "--workload", (*DESCRIPTIONS, PROOF))
    ] = ()
    rounds: Annotated[int | None, Asked("how often each workload is scored (default: the suite's)", least=1)] = None
    threads: Annotated[int | None, Asked("CPU threads (default: one for each usable core)", least=1)] = None
    seed: Annotated[int, Asked("seed of the workloads", least=0)] = 0
    max_seconds: Annotated[
        float, Asked("a runner that is slower at a workload does it once", metavar="SECONDS", least=0)
    ] = 60.0
    pairs: Annotated[Path | None, Asked("take the texts from these pairs", metavar="PAIRS.jsonl")] = None
    data: Annotated[
        Path | None, Asked("take the texts from PromptSource's and BIG-Bench's tasks", metavar="FOLDER")
    ] = None

    def __post_init__(self) -> None:
        check_asked(self)
        if self.pairs is not None and self.data is not None:
            raise ValueError("the texts are those of --pairs or those of --data, and both are given; leave one out")
