"""Lists what can be asked of `cappy bench serve`. Knows nothing of how it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cappy_engine.bundle import EMBEDDED
from cappy_engine.options import Asked, check_asked

RESULTS = Path("bench/load")
"""Where results and logs are written; not where `cappy bench report` reads the results of `cappy bench run`."""


@dataclass(frozen=True)
class LoadOptions:
    """What a server is asked for, how hard, and where the result goes.

    >>> LoadOptions(seconds=10.0, overload=3.0)
    """

    bundle: Annotated[Path, Asked("folder of the bundle (default: cappy-mini)", metavar="BUNDLE")] = EMBEDDED
    url: Annotated[
        str, Asked("measure a server that runs already and serves the bundle (default: start one)", metavar="URL")
    ] = ""
    out: Annotated[
        Path | None, Asked(f"the result, as JSON (default: {RESULTS}/MODEL.json)", metavar="RESULT.json")
    ] = None
    force: Annotated[bool, Asked("replace the result, and the requests, if they exist")] = False
    seconds: Annotated[float, Asked("how long each step takes", least=0.5)] = 60.0
    overload: Annotated[float, Asked("load of the last step, as a multiple of the capacity", least=0.1)] = 2.0
    soak: Annotated[
        float, Asked("then as long at 70% of the capacity (default: not at all)", metavar="MINUTES", least=0.0)
    ] = 0.0
    connections: Annotated[
        int | None, Asked("requests under way at saturation (default: what the queue holds, up to 32)", least=1)
    ] = None
    sizes: Annotated[
        tuple[int, ...], Asked("a size of requests; repeat for more", "--pairs-per-request", least=1, metavar="PAIRS")
    ] = (1, 4, 16, 64)
    requests: Annotated[int, Asked("different requests; they are sent again and again", least=1)] = 128
    deadline: Annotated[float, Asked("a request without an answer by then hangs", metavar="SECONDS", least=0.1)] = 30.0
    seed: Annotated[int, Asked("seed of the requests and of their times", least=0)] = 0
    pairs: Annotated[Path | None, Asked("take the texts from these pairs", metavar="PAIRS.jsonl")] = None
    data: Annotated[
        Path | None, Asked("take the texts from PromptSource's and BIG-Bench's tasks", metavar="FOLDER")
    ] = None
    bodies: Annotated[
        Path | None, Asked("write the requests too, one a line, for another generator", metavar="BODIES.jsonl")
    ] = None
    infinity: Annotated[
        Path | None, Asked("do the same with infinity's server on this checkpoint", metavar="CHECKPOINT")
    ] = None
    tools: Annotated[Path, Asked("folder of the environment .venv-bench-infinity", metavar="FOLDER")] = Path()

    def __post_init__(self) -> None:
        check_asked(self)
        if self.pairs is not None and self.data is not None:
            raise ValueError("the texts are those of --pairs or those of --data, and both are given; leave one out")
        if self.out is not None and self.out == self.bodies:
            raise ValueError(f"the result and the requests need two files, got {self.out} for both")
